"""`Ticket`: making, algebra, counts, random tickets, and files that load the same or not at all (contract 10)."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from helpers.backends import using
from helpers.tied_model import EMBEDDING, TiedModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import ltp_sparse as ls
from ltp_sparse import Ticket
from ltp_sparse.selection import pools
from ltp_sparse.testing import random_weights, tuned_weights, xlmr_shapes
from ltp_sparse.tickets.bits import TILE
from ltp_sparse.tickets.index_set import Encoding
from ltp_sparse.weights import files

SHAPES = xlmr_shapes(layers=2, hidden=16, intermediate=40, vocabulary=60, positions=9)


@pytest.fixture
def ticket():
    """All encodings, a parameter without active entries, an empty one; with fingerprint and metadata."""
    masks = {
        "full": torch.ones(3, 5, dtype=torch.bool),
        "bitmap": torch.arange(300).view(10, 30) % 3 == 0,
        "list16": torch.arange(TILE + 1000) % 500 == 7,
        "none": torch.zeros(7, dtype=torch.bool),
        "empty": torch.zeros(0, 4, dtype=torch.bool),
        "scalar": torch.tensor(True),
    }
    ticket = Ticket.from_masks(masks, {"method": "made", "note": "für alle", "share": 0.1})
    assert {s.encoding for s in ticket.sets.values()} == set(Encoding)
    return ticket.fingerprinted({name: torch.zeros(mask.shape) for name, mask in masks.items()})


def same(a: Ticket, b: Ticket) -> bool:
    return (
        a == b
        and a.shapes == b.shapes
        and a.metadata == b.metadata
        and a.fingerprint == b.fingerprint
        and all(torch.equal(a.mask(name), b.mask(name)) for name in a.names)
    )


# --- making and reading ---


def test_masks_and_indices_make_the_same_ticket(ticket):
    masks = {name: ticket.mask(name) for name in ticket.names}
    shuffled = {name: mask.view(-1).nonzero().view(-1).flip(0) for name, mask in masks.items()}
    assert Ticket.from_masks(masks) == Ticket.from_indices(shuffled, ticket.shapes) == ticket
    assert {name: mask.shape for name, mask in masks.items()} == ticket.shapes
    assert ticket.k == sum(int(mask.sum()) for mask in masks.values())
    assert ticket.n == sum(mask.numel() for mask in masks.values())
    assert ticket.active_names == ["bitmap", "full", "list16", "scalar"]


def test_names_are_canonical_however_a_ticket_is_made():
    model = TiedModel()
    mask = torch.zeros(40, 16, dtype=torch.bool)
    mask[3] = True
    made = [
        Ticket.from_masks({f"module.{EMBEDDING}": mask}),
        Ticket.from_indices({f"_orig_mod.{EMBEDDING}": mask.view(-1).nonzero().view(-1)}, {EMBEDDING: mask.shape}),
        Ticket.full(model, [EMBEDDING]) & Ticket.from_masks({EMBEDDING: mask}),
    ]
    assert all(ticket.names == [EMBEDDING] and ticket == made[0] for ticket in made)
    assert Ticket.full(torch.nn.DataParallel(model)) == Ticket.full(dict(ls.canonical_parameters(model)))
    assert Ticket.full(model).n == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Ticket.from_masks({"a": torch.ones(3)}), TypeError, "mask of 'a' must be bool, got torch.float32"),
        (lambda: Ticket.from_indices({"a": torch.tensor([1])}, {"b": [3]}), ValueError, "no shape for 'a'"),
        (lambda: Ticket.from_indices({"a": torch.tensor([1, 1])}, {"a": [3]}), ValueError, "unique"),
        (lambda: Ticket.from_indices({"a": torch.tensor([3])}, {"a": [3]}), ValueError, r"lie in \[0, 3\)"),
        (lambda: Ticket.full({"a": [3]}, ["b"]), ValueError, "the pool holds none"),
        (lambda: Ticket.full({"a": [3]}).mask("b"), KeyError, "no parameter 'b'; closest: 'a'"),
        (lambda: Ticket.full({"a": [3]}) | Ticket.full({"a": [1, 3]}), ValueError, "different models"),
        (lambda: Ticket.full({"a": [3]}).counts("row"), ValueError, "must be layer, module or parameter"),
        (lambda: Ticket(Ticket.full({"a": [3]}).sets, {"a": [4]}), ValueError, r"shape \[4\], its index set covers 3"),
    ],
)
def test_wrong_arguments_say_what_was_expected(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_pool_may_be_one_expression():
    shapes = {"layer.0.weight": [3], "layer.1.weight": [3], "head": [2]}
    assert Ticket.full(shapes, "layer.1").names == Ticket.full(shapes, ["layer.1"]).names == ["layer.1.weight"]


def test_the_algebra_keeps_what_is_known_of_the_base():
    """A ticket of two languages belongs to the base of both; another base must not pass for it."""
    base = {name: torch.randn(6) for name in "abc"}
    mask = torch.tensor([True, False] * 3)
    one = Ticket.from_masks({"a": mask, "b": mask, "c": ~mask}).fingerprinted(base)
    two = Ticket.from_masks({"a": mask, "b": ~mask, "c": mask}).fingerprinted({**base, "c": base["c"] + 1})
    assert (one | two).fingerprint == {name: one.fingerprint[name] for name in "ab"}  # they differ in c
    assert (one & two).fingerprint == {"a": one.fingerprint["a"]}  # nothing else is active
    assert (one - Ticket.from_masks({"a": mask})).fingerprint == {name: one.fingerprint[name] for name in "bc"}


def test_counts_by_layer_module_and_parameter():
    ticket = Ticket.full(SHAPES) - Ticket.full(SHAPES, ["query"])
    layer = sum(shape.numel() for name, shape in SHAPES.items() if ".layer.0." in name)
    query = 16 * 16 + 16
    embeddings = (60 + 9 + 1) * 16
    assert ticket.counts() == {
        "embeddings": (embeddings, embeddings),
        "layer 0": (layer - query, layer),
        "layer 1": (layer - query, layer),
    }
    attention, forward = 2 * 4 * query, 2 * (2 * 16 * 40 + 40 + 16)
    assert ticket.counts("module") == {
        "embeddings": (embeddings, embeddings),
        "attention": (attention - 2 * query, attention),
        "feed-forward": (forward, forward),
    }
    assert ticket.counts("parameter")["roberta.encoder.layer.1.attention.self.query.weight"] == (0, 256)


def test_rows_are_the_ticket_of_a_shard(ticket):
    for start, stop in ((0, 10), (0, 0), (3, 7), (9, 10)):
        shard = ticket.rows("bitmap", start, stop)
        assert torch.equal(shard.mask(), ticket.mask("bitmap")[start:stop].reshape(-1))
    for start, stop in ((-1, 3), (4, 3), (3, 11)):
        with pytest.raises(ValueError, match="10 rows"):
            ticket.rows("bitmap", start, stop)


def test_repr_tells(ticket):
    assert repr(ticket) == (
        f"Ticket({ticket.k} of {ticket.n:,} entries active ({100 * ticket.density:.4g} %) in 4 of 6 parameters, made, "
        f"{ticket.nbytes:,} bytes)"
    )


def test_digest_depends_on_active_entries_names_and_shapes_only(ticket):
    bitmaps = {n: s if s.n == 0 else s.encoded(Encoding.BITMAP) for n, s in ticket.sets.items()}
    assert Ticket(bitmaps, ticket.shapes).digest() == ticket.digest()
    assert ticket.restrict(ticket.active_names).digest() == ticket.digest()
    mask = torch.tensor([[True, False], [False, False]])
    others = [{"a": mask}, {"b": mask}, {"a": mask.view(4)}, {"a": ~mask}, {"a": mask.t() | mask}]
    assert len({Ticket.from_masks(masks).digest() for masks in others[:4]}) == 4
    assert Ticket.from_masks(others[4]) == Ticket.from_masks(others[0]) != "a ticket"


# --- algebra ---

MASKS = st.dictionaries(st.sampled_from("abc"), st.lists(st.booleans(), min_size=5, max_size=5), min_size=1)


def entries(ticket: Ticket) -> set[tuple[str, int]]:
    return {(name, i) for name in ticket.names for i in ticket.indices(name).tolist()}


@pytest.mark.slow
@settings(max_examples=60)
@given(MASKS, MASKS)
def test_algebra_is_that_of_sets(a, b):
    """A parameter that only one ticket has is without active entries in the other."""
    x, y = (Ticket.from_masks({n: torch.tensor(m) for n, m in masks.items()}) for masks in (a, b))
    p, q = entries(x), entries(y)
    universe = {(name, i) for name in {*a, *b} for i in range(5)}
    assert entries(x & y) == p & q and entries(x | y) == p | q
    assert entries(x - y) == p - q and entries(x ^ y) == p ^ q
    assert entries(~x) == {e for e in universe if e[0] in a} - p
    assert (x | y).names == sorted({*a, *b}) and (x | y).n == len(universe)
    assert x.jaccard(y) == y.jaccard(x) == (len(p & q) / len(p | q) if p | q else 1.0)
    assert ~~x == x and (x & y) | (x ^ y) == x | y and x - y == x & (x ^ y)
    assert (x & y).k == len(p & q)


def test_results_of_the_algebra_name_their_operands(ticket):
    assert (ticket & ~ticket).metadata["method"] == "(made & ~made)"
    with pytest.raises(TypeError, match="combined with a ticket, got dict"):
        ticket | {}


# --- random tickets ---


@pytest.mark.parametrize("backend", ["reference", None], ids=["reference", "auto"])
def test_random_ticket_is_exact_and_reproducible(backend):
    with using(backend):
        ticket = Ticket.random(SHAPES, density=0.2, seed=3)
        again = Ticket.random(random_weights(SHAPES), density=0.2, seed=3)
    assert ticket.k == ticket.n // 5 == again.k and ticket == again
    assert Ticket.random(SHAPES, k=17, seed=3).k == 17
    assert ticket.jaccard(Ticket.random(SHAPES, density=0.2, seed=4)) < 0.2
    assert ticket.metadata == {"method": "random", "seed": 3, "density": 0.2}


def test_random_ticket_of_a_seed_stays_the_same():
    """Results of papers hang on it: a seed must mean the same ticket in later versions."""
    ticket = Ticket.random({"a": [50], "b": [7, 9]}, k=6, seed=1)
    assert {name: ticket.indices(name).tolist() for name in ticket.names} == {"a": [8, 47], "b": [7, 14, 47, 56]}


def test_random_ticket_is_uniform():
    shapes = {"a": [90_000], "b": [10_000]}
    ticket = Ticket.random(shapes, density=0.2, seed=0)
    for name, n in (("a", 90_000), ("b", 10_000)):
        mask = ticket.mask(name).float().view(10, -1).mean(1)
        deviation = (0.2 * 0.8 / (n / 10)) ** 0.5
        assert bool(((mask - 0.2).abs() < 4 * deviation).all())


def test_random_ticket_like_another_matches_every_count():
    initial = random_weights(SHAPES)
    model = ls.select(initial, tuned_weights(initial), density=0.2, pool=pools.without_embeddings)
    ticket = Ticket.random(SHAPES, like=model, seed=5)
    assert ticket.counts("parameter") == model.counts("parameter") and ticket != model
    assert ticket.metadata["method"] == "random matched"


def test_bernoulli_ticket_draws_every_entry():
    ticket = Ticket.random({"a": [100_000]}, density=0.2, seed=0, bernoulli=True)
    assert ticket.k != 20_000 and abs(ticket.k - 20_000) < 4 * (0.16 * 100_000) ** 0.5
    for density, k in ((0.0, 0), (1.0, 100_000)):
        assert Ticket.random({"a": [100_000]}, density=density, bernoulli=True).k == k


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"density": 0.2, "k": 3},
        {"k": 6},
        {"density": 1.2},
        {"k": 3, "bernoulli": True},
        {"density": 1.2, "bernoulli": True},
        {"like": Ticket.full({"a": [5]}), "k": 3},
        {"like": Ticket.full({"a": [5]}), "bernoulli": True},
    ],
    ids=lambda wrong: "-".join(wrong) or "nothing",
)
def test_random_ticket_refuses_what_does_not_fit(wrong):
    with pytest.raises(ValueError):
        Ticket.random({"a": [5]}, **wrong)


# --- contract 10: files ---


@pytest.fixture
def saved(ticket, tmp_path):
    path = tmp_path / "ticket.safetensors"
    ticket.save(path)
    return path


def test_save_and_load_give_the_same_ticket(ticket, saved):
    loaded = Ticket.load(saved)
    assert same(loaded, ticket) and repr(loaded) == repr(ticket)
    loaded.save(saved)
    assert same(Ticket.load(saved), ticket), "a loaded ticket can be saved over its own file"


def test_selected_tickets_share_memory_and_save_all_the_same(tmp_path):
    initial = random_weights(SHAPES)
    ticket = ls.select(initial, tuned_weights(initial), density=0.2)
    ticket.save(tmp_path / "deep" / "ticket.safetensors")
    assert same(Ticket.load(tmp_path / "deep" / "ticket.safetensors"), ticket)
    assert os.path.getsize(tmp_path / "deep" / "ticket.safetensors") < ticket.n / 8 + 12_000


def test_file_has_one_metadata_key_of_sorted_json(saved):
    with safe_open(saved, "pt") as file:
        assert list(file.metadata()) == ["ltp_sparse"]
        header = file.metadata()["ltp_sparse"]
    content = json.loads(header)
    assert header == json.dumps(content, sort_keys=True)
    assert {"kind", "format", "checksum", "fingerprint", "metadata", "parameters", "k", "n"} == set(content)


def loads_right_or_raises(path, ticket) -> bool:
    """True if the file was refused; a wrong ticket or another error than ValueError fails the test."""
    try:
        loaded = Ticket.load(path)
    except ValueError as error:
        assert str(path) in str(error)
        return True
    assert same(loaded, ticket), "a damaged file was loaded as another ticket"
    return False


def test_truncated_files_are_refused(ticket, saved, tmp_path):
    whole = saved.read_bytes()
    broken = tmp_path / "broken.safetensors"
    for length in [*range(0, len(whole), 41), *range(8), len(whole) - 1]:
        broken.write_bytes(whole[:length])
        assert loads_right_or_raises(broken, ticket), length
    broken.write_bytes(whole + b"\0")
    assert loads_right_or_raises(broken, ticket)


@pytest.mark.slow
def test_flipped_bits_are_refused(ticket, saved, tmp_path, rng):
    """Every bit of the length, and bits of the header and of the payload."""
    whole = saved.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    some = torch.randint(8 * len(whole), (600,), generator=rng).tolist()
    in_header = torch.randint(64, 8 * (8 + header), (600,), generator=rng).tolist()
    broken = tmp_path / "broken.safetensors"
    for bit in [*range(64), *some, *in_header]:
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        broken.write_bytes(changed)
        refused = loads_right_or_raises(broken, ticket)
        assert refused or bit < 8 * (8 + header), "a flipped bit of the payload must be noticed"


@pytest.mark.slow
def test_overwritten_and_random_bytes_are_refused(ticket, saved, tmp_path, rng):
    whole = saved.read_bytes()
    broken = tmp_path / "broken.safetensors"
    for at in torch.randint(len(whole) - 16, (150,), generator=rng).tolist():
        noise = bytes(torch.randint(256, (16,), generator=rng).tolist())
        broken.write_bytes(whole[:at] + noise + whole[at + 16 :])
        loads_right_or_raises(broken, ticket)
        broken.write_bytes(noise * (at % 50))
        assert loads_right_or_raises(broken, ticket)


def test_foreign_files_are_refused(ticket, tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="not one of ltp_sparse; expected a ticket"):
        Ticket.load(path)
    torch.save({"a": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        Ticket.load(path)
    with pytest.raises(FileNotFoundError, match="nowhere: no such file; expected a ticket"):
        Ticket.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        Ticket.load(tmp_path)


def test_other_kinds_and_versions_are_refused(ticket, saved, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="expected a delta, got a ticket"):
        ls.SparseDelta.load(saved)
    monkeypatch.setattr(files, "FORMAT_VERSION", 3)
    ticket.save(tmp_path / "newer.safetensors")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="format 3 is none that this version reads, 1 to 2; update"):
        Ticket.load(tmp_path / "newer.safetensors")


def rewritten(saved, change) -> None:
    """Changes tensors and metadata of a file and gives it a valid checksum."""
    tensors, metadata = files.load(saved, "ticket")
    change(tensors, metadata)
    files.save(saved, "ticket", tensors, metadata)


def parameter(name, **changes):
    return lambda tensors, metadata: metadata["parameters"][name].update(changes)


def tensor(name, value):
    return lambda tensors, metadata: tensors.update({name: value})


FORGED = {
    "out-of-range": tensor("list16.list16", torch.full((134,), 65535, dtype=torch.int32).to(torch.uint16)),
    "unsorted": lambda tensors, _: tensors["list16.list16"].view(torch.int16)[:2].fill_(7),
    "position-past-the-end": lambda tensors, _: tensors["list16.list16"].view(torch.int16)[-1:].fill_(1000),
    "bits-past-the-end": tensor("bitmap.bitmap", torch.full((10,), -1, dtype=torch.int32)),
    "short-bitmap": tensor("bitmap.bitmap", torch.zeros(8, dtype=torch.int32)),
    "float-bitmap": tensor("bitmap.bitmap", torch.zeros(10)),
    "odd-list": tensor("list16.list16", torch.zeros(133, dtype=torch.uint8)),
    "negative-counts": tensor("list16.tile_counts", torch.tensor([-1, 135], dtype=torch.int32)),
    "large-counts": tensor("list16.tile_counts", torch.tensor([2**31 - 1, 135], dtype=torch.int32)),
    "float-counts": tensor("list16.tile_counts", torch.tensor([float("nan"), 1.0])),
    "no-tensor": lambda tensors, _: tensors.pop("bitmap.bitmap"),
    "no-parameters": lambda _, metadata: metadata.pop("parameters"),
    "parameters-are-a-list": lambda _, metadata: metadata.update(parameters=[1]),
    "no-shape": lambda _, metadata: metadata["parameters"]["full"].pop("shape"),
    "other-shape": parameter("bitmap", shape=[10, 40]),
    "negative-shape": parameter("none", shape=[-7]),
    "huge-shape": parameter("none", shape=[2**41]),
    "overflowing-shape": parameter("none", shape=[2**40, 2**40]),
    "text-shape": parameter("none", shape="7"),
    "other-k": parameter("bitmap", k=99),
    "other-encoding": parameter("bitmap", encoding="list16"),
    "unknown-encoding": parameter("bitmap", encoding="gaps"),
    "full-of-less": parameter("none", encoding="full"),
    "fingerprint-is-a-list": lambda _, metadata: metadata.update(fingerprint=[1]),
}


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED)
def test_files_with_a_valid_checksum_and_wrong_content_are_refused(saved, ticket, change):
    """Kernels trust the indices, so every one of them is checked."""
    rewritten(saved, change)
    assert loads_right_or_raises(saved, ticket)


@pytest.mark.parametrize("failing", ["save_file", "fsync", "replace"])
def test_failing_write_leaves_the_old_file_and_nothing_else(failing, ticket, saved, monkeypatch):
    """Contract 10: written atomically."""

    def fail(*_args, **_kwargs):
        raise OSError("no space left on device")

    owner, name = {
        "save_file": (safetensors.torch, "save_file"),
        "fsync": (os, "fsync"),
        "replace": (type(saved), "replace"),
    }[failing]
    before = saved.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(OSError, match="no space left"):
            Ticket.full({"a": [5]}).save(saved)
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


@pytest.mark.slow
def test_killed_write_leaves_the_old_file(saved, ticket):
    script = (
        "import os, sys; from pathlib import Path; import ltp_sparse as ls; Path.replace = lambda *_: os._exit(9);"
        "ls.Ticket.full({'a': [5]}).save(sys.argv[1])"
    )
    assert subprocess.run([sys.executable, "-c", script, str(saved)]).returncode == 9
    assert same(Ticket.load(saved), ticket)


def test_files_are_readable_for_others_as_the_umask_says(ticket, tmp_path):
    before = os.umask(0o027)
    try:
        ticket.save(tmp_path / "ticket.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "ticket.safetensors").stat().st_mode & 0o777 == 0o640


def test_loaded_ticket_does_not_hold_on_to_the_file(ticket, saved):
    loaded = Ticket.load(saved)
    saved.write_bytes(b"\0" * saved.stat().st_size)
    assert same(loaded, ticket)


# --- slices for flat shards ---


@pytest.mark.parametrize("density", [0.001, 0.3, 1.0])
def test_entries_of_any_range(density, rng):
    """Ranges that start and end inside words, tiles and rows; the parts put together are the whole."""
    n = 3 * 65_536 + 77
    mask = torch.rand(n, generator=rng) < density
    ticket = Ticket.from_masks({"a": mask})
    for start, stop in ((0, n), (5, 5), (1, 33), (31, 32), (64, 128), (65_537, n), (99_999, 140_001)):
        part = ticket.entries("a", start, stop)
        assert torch.equal(part.mask(), mask[start:stop])
    cuts = [0, *torch.randint(n, (40,), generator=rng).sort().values.tolist(), n]
    parts = [ticket.entries("a", *cut).mask() for cut in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(parts), mask)
    with pytest.raises(ValueError, match=f"'a' has {n} entries, expected 0 <= start <= stop, got 3 to 2"):
        ticket.entries("a", 3, 2)


def test_a_checkpoint_has_the_tickets_of_its_model(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(8, 9), torch.nn.Linear(9, 7))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for path in (tmp_path, str(tmp_path / "model.safetensors")):
        assert Ticket.random(path, density=0.3, seed=1) == Ticket.random(model, density=0.3, seed=1)
        assert Ticket.full(path) == Ticket.full(model)
