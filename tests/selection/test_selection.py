"""`select`: counts, budgets, pools, sources in memory and on disk, what the ticket tells (contracts 1 and 2)."""

import json
import sys

import pytest
import torch
from helpers.backends import BACKENDS, using
from helpers.bits import DTYPES
from helpers.process_memory import printed
from helpers.selections import tune
from helpers.tied_model import EMBEDDING, TiedModel
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import ltp_sparse as ls
from ltp_sparse.ops import routes, sources
from ltp_sparse.ops.routes import NonFiniteDelta
from ltp_sparse.selection import ShortTicket, pools
from ltp_sparse.selection.budgets import share_out
from ltp_sparse.testing import random_weights, tuned_weights, xlmr_shapes
from ltp_sparse.tickets.bits import TILE
from ltp_sparse.tickets.counts import entries_for
from ltp_sparse.weights.checkpoints import open_checkpoint

SHAPES = xlmr_shapes(layers=3, hidden=16, intermediate=40, vocabulary=60, positions=9)


@pytest.fixture
def versions():
    initial = random_weights(SHAPES)
    return initial, tuned_weights(initial, untouched_rows=0.3)


# --- contract 1: how many ---


@pytest.mark.parametrize(
    ("density", "pool", "k"),
    [
        (0.29, 100, 29),  # 0.29 * 100 is 28.999999999999996
        (0.57, 100, 57),
        (0.07, 100, 7),
        (0.3, 10, 3),
        (0.7, 10, 7),
        (1e-05, 100_000, 1),
        (0.2, 277_414_656, 55_482_931),
        (0.75, 277_414_656, 208_060_992),
        (0.1, 10**18 + 9, 10**17),
        (0, 7, 0),
        (1, 7, 7),
        (1.0, 7, 7),
    ],
)
def test_density_counts_in_exact_decimals(density, pool, k):
    """Contract 1: k = floor(density * pool)."""
    assert entries_for(pool, density=density) == k


@given(st.integers(0, 10**6), st.integers(0, 10**12))
def test_density_is_the_decimal_that_is_written(millionths, pool):
    assert entries_for(pool, density=float(f"{millionths}e-6")) == millionths * pool // 10**6


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"k": 11}, r"k must be in \[0, 10\], the entries of the pool, got 11"),
        ({"k": -1}, "got -1"),
        ({"density": 1.01}, r"density must be in \[0, 1\], got 1.01"),
        ({"density": -0.1}, "got -0.1"),
        ({"density": float("nan")}, "got nan"),
        ({}, "either density= or k="),
        ({"k": 1, "density": 0.1}, "either density= or k="),
    ],
    ids=str,
)
def test_impossible_counts_name_both_numbers(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ls.select({"a": torch.zeros(10)}, {"a": torch.ones(10)}, **kwargs)


def test_full_size_counts():
    """The maskable entries of XLM-R-base, and 20 % of them."""
    pool = sum(shape.numel() for shape in xlmr_shapes().values())
    assert (pool, entries_for(pool, density=0.2)) == (277_414_656, 55_482_931)


def test_ticket_holds_exactly_k_and_tells_its_origin(versions):
    initial, tuned = versions
    ticket = ls.select(initial, tuned, density=0.2, method="ltp", metadata={"language": "sw"})
    n = sum(t.numel() for t in initial.values())
    assert ticket.k == n // 5 and ticket.n == n
    deltas = torch.cat([(tuned[name] - initial[name]).abs().view(-1) for name in initial])
    threshold = deltas.sort(descending=True).values[ticket.k - 1].item()
    assert ticket.metadata == {
        "method": "ltp",
        "density": 0.2,
        "budget": "global",
        "requested_k": ticket.k,
        "k": ticket.k,
        "thresholds": {"all": threshold},
        "language": "sw",
    }
    for name in ticket.names:
        moved = (tuned[name] - initial[name]).abs()
        assert bool((moved[ticket.mask(name)] >= threshold).all())
        assert bool((moved[~ticket.mask(name)] <= threshold).all())
    assert ticket.fingerprint == ticket.fingerprinted(initial).fingerprint != ticket.fingerprinted(tuned).fingerprint


def test_shortfall_warns_and_is_stored():
    """Contract 1: entries that did not move are never selected."""
    tuned = {"a": torch.tensor([0.0, 1.0, 0.0]), "b": torch.tensor([2.0])}
    with pytest.warns(ShortTicket, match="3 entries were requested, but only 2 of 4 moved"):
        ticket = ls.select({"a": torch.zeros(3), "b": torch.zeros(1)}, tuned, density=0.75)
    assert (ticket.k, ticket.metadata["requested_k"], ticket.metadata["k"]) == (2, 3, 2)
    assert ticket.indices("a").tolist() == [1]


@pytest.mark.filterwarnings("error")
def test_all_entries_that_moved_are_no_shortfall():
    assert ls.select({"a": torch.zeros(4)}, {"a": torch.tensor([0.0, 1, 2, 3])}, k=3).k == 3
    assert ls.select({"a": torch.zeros(4)}, {"a": torch.ones(4)}, k=0).k == 0


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_nonfinite_delta_names_the_parameter(versions, on_disk, tmp_path):
    """Contract 1."""
    initial, tuned = versions
    name = "roberta.encoder.layer.1.output.dense.weight"
    tuned[name][3, 1] = float("nan")
    if on_disk:
        save_file(tuned, tmp_path / "tuned.safetensors")
        tuned = tmp_path / "tuned.safetensors"
    with pytest.raises(NonFiniteDelta, match=f"the delta of '{name}' holds NaN"):
        ls.select(initial, tuned, density=0.1)


def test_score_replaces_the_delta(versions):
    initial, _ = versions
    score = {name: torch.arange(float(t.numel())).view_as(t) * -1 for name, t in initial.items()}
    ticket = ls.select(initial, score=score, k=5)
    assert ticket.indices(EMBEDDING).tolist() == [955, 956, 957, 958, 959]
    for wrong in ({}, {"tuned": initial, "score": score}):
        with pytest.raises(ValueError, match="either tuned= or score="):
            ls.select(initial, k=5, **wrong)


# --- order, names, pools ---


def test_ticket_does_not_depend_on_the_order_of_the_tensors(versions):
    """Contract 1: ties go by canonical parameter order, however a file or a module sorts its tensors."""
    initial, tuned = versions
    levels = {name: torch.sign(tuned[name] - initial[name]) for name in initial}
    zeros = {name: torch.zeros_like(t) for name, t in initial.items()}
    ticket = ls.select(zeros, levels, density=0.1)
    backwards = [dict(reversed(side.items())) for side in (zeros, levels)]
    assert ls.select(*backwards, density=0.1) == ticket
    assert ticket.active_names == ticket.names[: len(ticket.active_names)]


def test_tied_parameters_are_counted_once_in_modules():
    model, tuned = TiedModel(), TiedModel()
    ticket = ls.select(model, torch.nn.DataParallel(tuned), density=0.5, pool=pools.maskable)
    assert ticket.n == 40 * 16 + 2 * (16 * 16 + 16)
    assert "lm_head.decoder.weight" not in ticket.names
    assert ls.select(model, ls.canonical_parameters(tuned), density=0.5, pool=pools.maskable) == ticket


@pytest.mark.parametrize(
    ("pool", "layers"),
    [
        (None, {"embeddings", "layer 0", "layer 1", "layer 2"}),
        (pools.maskable, {"embeddings", "layer 0", "layer 1", "layer 2"}),
        (pools.without_embeddings, {"layer 0", "layer 1", "layer 2"}),
        (pools.layers(1, 2), {"layer 1", "layer 2"}),
        (pools.segment("middle", 3), {"layer 1"}),
        ([r"layer\.0\.", "word_embeddings"], {"embeddings", "layer 0"}),
        (lambda name: "layer.2" in name, {"layer 2"}),
    ],
    ids=["all", "maskable", "without-embeddings", "layers", "segment", "expressions", "predicate"],
)
def test_pools(versions, pool, layers):
    ticket = ls.select(*versions, density=0.3, pool=pool)
    assert set(ticket.counts("layer")) == layers
    assert ticket.k == entries_for(ticket.n, density=0.3)


def test_maskable_leaves_out_layer_norms_and_heads():
    """LayerNorms of the base model and everything of the head."""
    for name in (
        "roberta.embeddings.LayerNorm.weight",
        "roberta.encoder.layer.0.output.LayerNorm.bias",
        "lm_head.dense.weight",
        "lm_head.layer_norm.bias",
        "classifier.weight",
    ):
        assert not pools.maskable(name)


@pytest.mark.parametrize(("which", "first", "last"), [("lower", 0, 3), ("middle", 4, 7), ("upper", 8, 11)])
def test_segments_of_twelve_layers(which, first, last):
    segment = pools.segment(which, 12)
    inside = [i for i in range(12) if segment(f"roberta.encoder.layer.{i}.output.dense.weight")]
    assert inside == list(range(first, last + 1))


def test_empty_pool_and_unrelated_models_are_errors(versions):
    initial, tuned = versions
    with pytest.raises(ValueError, match="the pool holds none of the"):
        ls.select(initial, tuned, density=0.1, pool=["nothing"])
    with pytest.raises(ValueError, match=f"share no parameter.*'{EMBEDDING}'"):
        ls.select(initial, {"roberta.embeddings.word_embedding.weight": torch.zeros(1)}, density=0.1)
    tuned[EMBEDDING] = tuned[EMBEDDING][:-1]
    with pytest.raises(ValueError, match=rf"'{EMBEDDING}' has shape \[60, 16\].*\[59, 16\]"):
        ls.select(initial, tuned, density=0.1)
    with pytest.raises(TypeError, match="module or a mapping"):
        ls.select([torch.zeros(1)], [torch.zeros(1)], density=0.1)


# --- budgets ---


@pytest.mark.parametrize("budget", ["layer", "tensor"])
def test_equal_density_in_every_group(versions, budget):
    initial, tuned = versions
    ticket = ls.select(initial, tuned, density=0.29, budget=budget)
    groups = ticket.counts("layer" if budget == "layer" else "parameter")
    assert {name: k for name, (k, _) in groups.items()} == {
        name: entries_for(n, density=0.29) for name, (_, n) in groups.items()
    }
    for name in initial:
        alone = ls.select(initial, tuned, density=0.29, pool=[f"^{name}$"], budget="tensor")
        assert budget == "layer" or torch.equal(alone.indices(name), ticket.indices(name))


def test_shares_of_scsft():
    """K = 14,155,776, shares of embeddings, layers 10, 11 and 0 to 9 pooled."""
    shares = {"embeddings": 0.02, r"layer\.10\.": 0.02, r"layer\.11\.": 0.02, r"layer\.\d\.": 0.94}
    names, groups, labels, ks = share_out(xlmr_shapes(), shares, density=None, k=14_155_776)
    assert dict(zip(labels, ks, strict=True)) == {
        "embeddings": 283_115,
        r"layer\.10\.": 283_115,
        r"layer\.11\.": 283_115,
        r"layer\.\d\.": 13_306_429,
    }
    assert len(names) == len(groups) == 147 and sum(ks) == 14_155_776 - 2


def test_shares_take_the_most_moved_of_each_group(versions):
    initial, tuned = versions
    shares = {"embeddings": 0.5, r"layer\.0\.": 0.25}
    ticket = ls.select(initial, tuned, k=400, budget=shares)
    assert {layer: k for layer, (k, _) in ticket.counts("layer").items()} == {"embeddings": 200, "layer 0": 100}
    for pattern, k in (("embeddings", 200), (r"layer\.0\.", 100)):
        alone = ls.select(initial, tuned, k=k, pool=[pattern])
        assert ticket.restrict([pattern]) == alone
    assert ticket.metadata["budget"] == shares and set(ticket.metadata["thresholds"]) == set(shares)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"nothing": 1.0}, "'nothing' matches no parameter"),
        ({"embeddings": 0.6, "layer": 0.6}, "must not exceed 1, got 1.2"),
        ({"token_type": 1.0}, "400 entries are requested from 'token_type', which has 16"),
        ("row", "got 'row'"),
    ],
    ids=str,
)
def test_impossible_budgets(versions, budget, message):
    with pytest.raises(ValueError, match=message):
        ls.select(*versions, k=400, budget=budget)


# --- from checkpoints: the same bits, streamed ---


def save_sharded(tensors, folder, shards=3, prefix=""):
    folder.mkdir()
    weight_map = {}
    for shard in range(shards):
        part = dict(list(tensors.items())[shard::shards])
        file = f"model-{shard}.safetensors"
        save_file({prefix + name: tensor for name, tensor in part.items()}, folder / file)
        weight_map |= {prefix + name: file for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoints_give_the_ticket_of_the_tensors_in_memory(backend, dtype, versions, tmp_path, monkeypatch):
    """Contract 2: a single file, shards with an index, one side in memory; in pieces that end inside rows and tiles."""
    monkeypatch.setattr(sources, "_PIECE", TILE)
    versions = [{**side, "roberta.big": torch.randn(700, 301)} for side in versions]
    initial, tuned = ({name: t.to(dtype) for name, t in side.items()} for side in versions)
    save_file(initial, tmp_path / "initial.safetensors")
    (tmp_path / "tuned").mkdir()
    save_file(tuned, tmp_path / "tuned" / "model.safetensors")
    sharded = save_sharded(tuned, tmp_path / "sharded", prefix="module.")
    with using(backend):
        expected = ls.select(initial, tuned, density=0.2)
        for before, after in (
            (tmp_path / "initial.safetensors", tmp_path / "tuned"),
            (str(tmp_path / "initial.safetensors"), sharded),
            (initial, sharded),
            (tmp_path / "initial.safetensors", tuned),
        ):
            ticket = ls.select(before, after, density=0.2)
            assert ticket == expected
            assert ticket.fingerprint == expected.fingerprint
            assert ticket.metadata == expected.metadata


def test_a_checkpoint_that_is_read_is_not_overwritten(tmp_path):
    folder = save_sharded({"a": torch.zeros(4), "b": torch.zeros(4)}, tmp_path / "base", shards=2)
    before = (folder / "model-0.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is a file that is read; choose another name"):
        ls.select(folder, {"a": torch.ones(4), "b": torch.ones(4)}, k=3, output=folder / "model-0.safetensors")
    assert (folder / "model-0.safetensors").read_bytes() == before


def test_scores_and_scalars_from_disk(tmp_path):
    score = {"scale": torch.tensor(5.0), "weight": torch.tensor([[1.0, -7.0], [0.0, 2.0]])}
    save_file(score, tmp_path / "score.safetensors")
    base = {name: torch.zeros_like(t) for name, t in score.items()}
    for source in (score, open_checkpoint(tmp_path / "score.safetensors")):
        assert {n: t.shape for n, t in source.items()} == {n: t.shape for n, t in base.items()}
    ticket = ls.select(base, tmp_path / "score.safetensors", k=2)
    assert ticket.indices("scale").tolist() == [0] and ticket.indices("weight").tolist() == [1]


def test_progress_counts_the_bytes_that_are_read(versions, tmp_path, capsys):
    for name, side in zip(("a", "b"), versions, strict=True):
        save_file(side, tmp_path / f"{name}.safetensors")
    ls.select(tmp_path / "a.safetensors", tmp_path / "b.safetensors", density=0.2, progress=True)
    assert "select: 100%" in capsys.readouterr().err


def test_the_bar_grows_where_ties_make_more_readings_necessary(tmp_path, capsys):
    tensors = {"weight": torch.arange(600_000).remainder(2).float()}
    save_file({"weight": torch.zeros(600_000)}, tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "b.safetensors")
    ls.select(tmp_path / "a.safetensors", tmp_path / "b.safetensors", density=0.2, progress=True)
    shown = capsys.readouterr().err
    assert "select: 100%" in shown and "19.2M/19.2M" in shown  # four readings of both files


@pytest.mark.parametrize("kept", [1 << 30, 0])
@pytest.mark.parametrize("deltas", ["normal", "levels"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_checkpoints_are_sampled(backend, deltas, kept, tmp_path, capsys, monkeypatch, rng):
    """One reading of what has no crowd of equal deltas, two else; whether the files stay mapped or not."""
    tune(monkeypatch.setattr, SAMPLE_FROM=1000, _SPARE_CANDIDATES=20_000)
    monkeypatch.setattr(sources, "_KEPT", kept)
    monkeypatch.setattr(sources, "_SAMPLED", 100_000)
    shapes = {"bias": (7,), "roberta.big": (700, 301), "weight": (300, 1000)}
    initial = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    change = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    if deltas == "levels":
        initial = {name: t.round() for name, t in initial.items()}
        change = {name: t.sign() for name, t in change.items()}
    tuned = {name: initial[name] + change[name] for name in shapes}
    for name, side in (("a", initial), ("b", tuned)):
        save_file(side, tmp_path / f"{name}.safetensors")
    with using(backend):
        ticket = ls.select(tmp_path / "a.safetensors", tmp_path / "b.safetensors", density=0.2, progress=True)
        monkeypatch.setattr(routes, "SAMPLE_FROM", 10**9)
        assert ticket == ls.select(initial, tuned, density=0.2)
    read = {"normal": "4.09M/4.09M", "levels": "8.17M/8.17M"}[deltas]
    shown = capsys.readouterr().err
    assert "select: 100%" in shown and read in shown


def test_integer_buffers_of_a_checkpoint_are_no_weights(versions, tmp_path):
    """Checkpoints on the Hub carry position ids."""
    initial, tuned = versions
    save_file({**tuned, "roberta.embeddings.position_ids": torch.arange(9)}, tmp_path / "tuned.safetensors")
    assert ls.select(initial, tmp_path / "tuned.safetensors", density=0.2) == ls.select(initial, tuned, density=0.2)


@pytest.mark.parametrize("damage", ["missing", "pickle", "truncated", "no-shard", "no-index", "lost-tensor", "float64"])
def test_unusable_checkpoints_are_clear_errors(damage, versions, tmp_path):
    initial, tuned = versions
    folder = save_sharded(tuned, tmp_path / "tuned")
    shard, index = folder / "model-1.safetensors", folder / "model.safetensors.index.json"
    error, message = ValueError, ""
    if damage == "missing":
        folder, error, message = tmp_path / "nowhere", FileNotFoundError, "nowhere: expected a safetensors file"
    elif damage == "pickle":
        index.unlink()
        torch.save(tuned, folder / "pytorch_model.bin")
        error, message = FileNotFoundError, r"\(\.bin\) are not read"
    elif damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
        message = "model-1.safetensors: not a readable"
    elif damage == "no-shard":
        shard.unlink()
        message = "names the shard model-1.safetensors, which is missing"
    elif damage == "no-index":
        index.write_text('{"weight_map": ')
        message = "index.json, line 1: not JSON"
    elif damage == "lost-tensor":
        save_file({EMBEDDING + "2": torch.zeros(1)}, shard)
        message = "is in model-1.safetensors, but it is in none of its shards"
    else:
        save_file({**tuned, EMBEDDING: tuned[EMBEDDING].double()}, tmp_path / "f64.safetensors")
        folder, message = tmp_path / "f64.safetensors", f"'{EMBEDDING}' must be float32, .*, got F64 in .*f64"
    with pytest.raises(error, match=message):
        ls.select(initial, folder, density=0.2)


STREAMING = """
import sys
import ltp_sparse as ls
from helpers.process_memory import anonymous_peak

ls.select(sys.argv[1], sys.argv[1], density=0)  # code and pools that stay
with anonymous_peak() as peak:
    ticket = ls.select(sys.argv[1], sys.argv[2], density=0.2)
print(ticket.digest(), *peak)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_streaming_needs_no_memory_of_the_size_of_the_model(tmp_path):
    """Contract 2: anonymous memory stays under 0.205 n bytes + 8 MB while files are read; same bits."""
    n = 20_000_000
    initial = {"a": torch.randn(n // 2000, 1000), "b": torch.randn(n // 2)}
    tuned = {name: t + 1e-3 * torch.randn(t.shape) for name, t in initial.items()}
    save_file(initial, tmp_path / "initial.safetensors")
    folder = save_sharded(tuned, tmp_path / "tuned", shards=2)
    digest, peak = printed(STREAMING, tmp_path / "initial.safetensors", folder).split()
    assert digest == ls.select(initial, tuned, density=0.2).digest()
    assert int(peak) <= 0.205 * n + 8e6, f"{int(peak) / 1e6:.1f} MB"


RESIDENT = """
import sys
import ltp_sparse as ls
from helpers.process_memory import forget_peak, status

ls.select(sys.argv[3], sys.argv[3], density=0)  # code and pools that stay
forget_peak()
before = status()["VmRSS"]
ticket = ls.select(sys.argv[1], sys.argv[2], density=0.2)
print(ticket.digest(), status()["VmHWM"] - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_pair_of_checkpoints_is_read_through_a_small_window(tmp_path):
    """All memory, that of the mapped files included, is that of contract 2 and a window of both files.

    Of larger pairs: smaller ones stay mapped.
    """
    n = 60_000_000
    assert 8 * n > sources._KEPT
    initial = {f"layer.{i}.weight": torch.empty(n // 5000, 1000).normal_() for i in range(5)}
    folders = [save_sharded(initial, tmp_path / "initial")]
    tuned = {name: t.add_(torch.empty(t.shape).normal_(), alpha=1e-3) for name, t in initial.items()}
    folders.append(save_sharded(tuned, tmp_path / "tuned"))
    small = tmp_path / "small.safetensors"
    save_file({"a": torch.ones(2_000_000)}, small)
    digest, peak = printed(RESIDENT, *folders, small).split()
    assert digest == ls.select(open_checkpoint(folders[0]), tuned, density=0.2).digest()
    window = 2 * 2 * 4 * sources.VIEW  # the fingerprint is taken by two threads
    assert int(peak) <= 0.205 * n + 8e6 + window, f"{int(peak) / 1e6:.1f} MB of a pair of {8 * n / 1e6:.0f}"
