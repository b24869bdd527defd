"""One source of names and tensors: modules, mappings, files and wrapped models agree on names, ties and buffers."""

import copy
import json
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save_file, save_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.optim.swa_utils import AveragedModel

import ltp_sparse as ls
from ltp_sparse.selection import MixedDtypes
from ltp_sparse.weights.checkpoints import open_checkpoint
from ltp_sparse.weights.names import tie_key
from ltp_sparse.weights.reading import FileFormatError
from ltp_sparse.weights.versions import open_weights

INDEX = "model.safetensors.index.json"


class FSDP(nn.Module):
    """The nesting of FSDP1, which needs a process group."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module


class Peft(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.base_model = nn.ModuleDict({"model": model})


def compiled(module):
    return torch.compile(module, backend="eager")


INNER = [nn.DataParallel, compiled, checkpoint_wrapper, offload_wrapper, FSDP]
OUTER = [*INNER, Peft, AveragedModel]


class Model(nn.Module):
    """Parameters that are tied, modules that are shared, buffers, and names that look like those of wrappers."""

    def __init__(self, tied, shared, buffers, odd, wrap=lambda module: module):
        super().__init__()
        self.head = nn.Linear(3, 5, bias=False)
        self.word_embeddings = nn.Embedding(5, 3)
        if tied:
            self.head.weight = self.word_embeddings.weight
        first = wrap(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)))
        self.layers = nn.ModuleList([first, first if shared else nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))])
        if buffers:
            self.norm = wrap(nn.BatchNorm1d(3))
            self.register_buffer("position_ids", torch.arange(4))
            self.register_buffer("scale", torch.ones(3))  # of a name that no list knows
        if odd:
            self.in_orig_mod = nn.Linear(3, 1)
            self.module = nn.Linear(3, 1)


def two_versions(**options):
    torch.manual_seed(3)
    initial = Model(**options)
    tuned = copy.deepcopy(initial)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter))
        for buffer in tuned.buffers():
            if buffer.is_floating_point():
                buffer.add_(100)
    return initial, tuned


def save_shards(tensors, folder, shards=2):
    folder.mkdir()
    weight_map = {}
    for shard in range(shards):
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, folder / f"model-{shard}-of-{shards}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{shard}-of-{shards}.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def unshared(state):
    """As `save_pretrained` stores it: tensors that share memory once, under the name of the embedding."""
    kept = {}
    for name, tensor in sorted(state.items(), key=lambda item: tie_key(item[0])):
        kept.setdefault((tensor.data_ptr(), tensor.shape), (name, tensor))
    return {name: tensor.clone() for name, tensor in kept.values()}


def routes(model, wrapped, folder, prefix):
    """The same weights as everything that `select` takes."""
    folder.mkdir()
    yield "module", model
    yield "wrapped", wrapped
    yield "state dict", model.state_dict()
    yield "state dict of the wrapped", wrapped.state_dict()
    yield "parameters", dict(model.named_parameters())
    save_model(model, str(folder / "model.safetensors"))
    yield "save_model", folder
    state = {prefix + name: tensor for name, tensor in unshared(model.state_dict()).items()}
    save_file(state, folder / "one.safetensors")
    yield "file", folder / "one.safetensors"
    yield "shards", save_shards(state, folder / "shards")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@seed(5)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tied=st.booleans(), shared=st.booleans(), buffers=st.booleans(), odd=st.booleans(),
    inner=st.sampled_from([lambda module: module, *INNER]), outer=st.lists(st.sampled_from(OUTER), max_size=3),
    prefix=st.sampled_from(["", "module.", "_orig_mod.module.", "base_model.model."]),
)  # fmt: skip
def test_all_routes_give_the_same_names_ties_and_ticket(
    tmp_path_factory, tied, shared, buffers, odd, inner, outer, prefix
):
    what = {"tied": tied, "shared": shared, "buffers": buffers, "odd": odd}
    initial, tuned = two_versions(**what)
    expected = ls.select(initial, tuned, density=0.5)
    wrapped = []
    for model in (initial, tuned):
        around = Model(**what, wrap=inner)
        with torch.no_grad():
            for name, parameter in ls.canonical_parameters(around).items():
                parameter.copy_(ls.canonical_parameters(model)[name])
        for wrap in outer:
            around = wrap(around)
        wrapped.append(around)
    folder = tmp_path_factory.mktemp("routes")
    ways = [
        dict(routes(m, w, folder / str(i), prefix))
        for i, (m, w) in enumerate(zip((initial, tuned), wrapped, strict=True))
    ]
    names = list(expected.names)
    assert "layers.1.0.weight" in names or shared
    for what, source in ways[0].items():
        # what a mapping does not tell the other side does: that a part is wrapped in DataParallel, and that
        # named_parameters() has the tied matrix under the name that was registered first
        alone = {"state dict of the wrapped": inner is nn.DataParallel, "parameters": tied}.get(what, False)
        for other in ("module",) if alone else ("module", what):
            ticket = ls.select(source, ways[1][other], density=0.5, allow_missing=["^scale$"])
            if "scale" in ticket.names:  # neither side is a module
                assert buffers and what not in ("module", "wrapped", "parameters")
                ticket = ls.select(source, ways[1][other], density=0.5, pool=lambda name: name != "scale")
            assert ticket == expected, (what, other)
            assert ticket.fingerprint == expected.fingerprint, (what, other)
            assert ticket.names == names, (what, other)
    ls.MaskedAdamW(wrapped[0], expected)


def transformers_models():
    transformers = pytest.importorskip("transformers")
    words = {"vocab_size": 40}
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "hidden_size": 8, **words}
    bart = {
        "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "pad_token_id": 1,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 16,
        "decoder_start_token_id": 1, **words,
    }  # fmt: skip
    t5 = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, **words}
    gpt = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0, **words}
    kinds = {
        "T5ForConditionalGeneration": t5,
        "BartForConditionalGeneration": bart,
        "MBartForConditionalGeneration": bart,
        "MarianMTModel": bart,
        "GPT2LMHeadModel": gpt,
        "BertForMaskedLM": {**small, "max_position_embeddings": 16},
        "AlbertForMaskedLM": {**small, "embedding_size": 8, "max_position_embeddings": 16},
        "ElectraForMaskedLM": {**small, "embedding_size": 8, "max_position_embeddings": 16},
        "LlamaForCausalLM": {**small, "tie_word_embeddings": True},
        "XLMRobertaForMaskedLM": {**small, "max_position_embeddings": 16},
    }
    for name, options in kinds.items():
        cls = getattr(transformers, name)
        yield name, cls, cls.config_class(**options)


@pytest.mark.parametrize(
    ("cls", "config"),
    [pytest.param(cls, config, id=name) for name, cls, config in transformers_models()],
)
def test_models_of_transformers_and_their_files_give_one_ticket(cls, config, tmp_path):
    """Encoder-decoders share one embedding under four names: from the files to the optimizer and back."""
    torch.manual_seed(0)
    initial, tuned = cls(config), cls(config)
    for name, model in (("a", initial), ("b", tuned)):
        model.save_pretrained(tmp_path / name)
        save_model(model, str(tmp_path / f"{name}.safetensors"))
        model.save_pretrained(tmp_path / f"{name}-shards", max_shard_size="2KB")
    expected = ls.select(initial, tuned, density=0.2)
    saved = {name: set(open_checkpoint(tmp_path / name)) for name in "ab"}
    assert set(expected.names) <= saved["a"]  # the canonical name is the one that is saved
    # constants of Marian, which its class does not save: only the module tells
    pool = (lambda name: "embed_positions" not in name) if "Marian" in cls.__name__ else None
    # named_parameters() may call the tied matrix by its name in the head, which a folder knows nothing of
    pairs = [(initial, dict(tuned.named_parameters())), (dict(initial.named_parameters()), tmp_path / "b.safetensors")]
    files = (tmp_path / "b", tmp_path / "b.safetensors", tuned)
    for one in (initial, initial.state_dict(), tmp_path / "a", tmp_path / "a.safetensors", tmp_path / "a-shards"):
        pairs += [(one, other) for other in files]
    for one, other in pairs:
        ticket = ls.select(one, other, density=0.2, pool=pool)
        assert ticket == expected and ticket.names == expected.names
    optimizer = ls.MaskedAdamW(initial, ticket, lr=0.1)
    base = {name: p.detach().clone() for name, p in ls.canonical_parameters(initial).items()}
    for parameter in ls.canonical_parameters(initial).values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    delta = ls.SparseDelta.between(tmp_path / "a", initial, ticket)
    again = cls.from_pretrained(tmp_path / "a")
    delta.apply(again)
    changed = 0
    for name, parameter in ls.canonical_parameters(again).items():
        assert torch.equal(parameter, ls.canonical_parameters(initial)[name])
        changed += int((parameter != base[name]).sum())
    assert changed == ticket.k


def test_the_names_of_ties_are_those_that_transformers_saves():
    names = {
        "shared.weight": ["decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "lm_head.weight"],
        "roberta.embeddings.word_embeddings.weight": ["lm_head.decoder.weight"],
        "prophetnet.word_embeddings.weight": ["prophetnet.decoder.word_embeddings.weight"],
        "transformer.wte.weight": ["lm_head.weight"],
        "cls.predictions.bias": ["cls.predictions.decoder.bias"],
    }
    for canonical, others in names.items():
        assert min([*others, canonical], key=tie_key) == canonical


# --- tickets and deltas that call a tied parameter by another of its names ---


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Embedding(6, 4)
        self.decoder = nn.ModuleDict({"embed_tokens": nn.Embedding(6, 4)})
        self.decoder["embed_tokens"].weight = self.shared.weight
        self.lm_head = nn.Linear(4, 6)


OLD = "decoder.embed_tokens.weight"  # what an earlier version of the library called it


def test_a_ticket_under_an_alias_trains_the_parameter():
    model = Tied()
    ticket = ls.Ticket.from_indices({OLD: torch.tensor([1, 5])}, {OLD: (6, 4)})
    before, digests = model.shared.weight.detach().clone(), ls.frozen_digests(model, ticket)
    model.shared.weight.grad = torch.ones(6, 4)
    ls.MaskedAdamW(model, ticket, lr=0.1).step()
    assert (model.shared.weight != before).flatten().nonzero().flatten().tolist() == [1, 5]
    ls.verify_frozen(digests, model, ticket)
    assert ls.PackedParameters(model, ticket).named_parameters()


def test_two_names_of_one_parameter_with_other_entries_are_refused():
    shapes = {OLD: (6, 4), "shared.weight": (6, 4)}
    same = ls.Ticket.from_indices(dict.fromkeys(shapes, torch.tensor([1])), shapes)
    assert same.named_as(ls.canonical_parameters(Tied())).names == ["shared.weight"]
    ticket = ls.Ticket.from_indices({OLD: torch.tensor([1]), "shared.weight": torch.tensor([2])}, shapes)
    with pytest.raises(ValueError, match=f"'{OLD}' and 'shared.weight' are one tied parameter"):
        ls.MaskedAdamW(Tied(), ticket)


def test_deltas_under_aliases_know_of_each_other():
    """Overlap and revert go by parameters, not by what a delta calls them."""
    base = Tied()
    deltas = []
    for name in (OLD, "shared.weight"):
        tuned = copy.deepcopy(base)
        with torch.no_grad():
            tuned.shared.weight += 1
        ticket = ls.Ticket.from_indices({name: torch.tensor([1, 2])}, {name: (6, 4)})
        values = {name: tuned.shared.weight.detach().flatten()[[1, 2]]}
        originals = {name: base.shared.weight.detach().flatten()[[1, 2]]}
        deltas.append(ls.SparseDelta(ticket.fingerprinted(base), values, originals))
    model = copy.deepcopy(base)
    for delta in deltas:
        delta.apply(model)
    assert torch.allclose(model.shared.weight.flatten()[[1, 2]], base.shared.weight.flatten()[[1, 2]] + 2)
    with pytest.raises(ValueError, match="applied later and overlaps in 'shared.weight'"):
        deltas[0].revert(model)
    deltas[1].revert(model)
    deltas[0].revert(model)
    assert torch.equal(model.shared.weight, base.shared.weight)


def test_what_one_side_ties_and_the_other_does_not():
    """A twin of equal bits is the tie, stored twice; one of other bits is a parameter of its own on both sides."""
    tied, moved = Tied(), Tied()
    with torch.no_grad():
        moved.shared.weight += 1
    twice = {**{n: t.clone() for n, t in moved.state_dict().items()}}
    assert ls.select(tied, twice, k=3) == ls.select(tied, moved, k=3)
    twice[OLD] = twice[OLD] + torch.arange(24.0).view(6, 4)
    ticket = ls.select(tied, twice, k=3)
    assert ticket.names == [OLD, "lm_head.bias", "lm_head.weight", "shared.weight"]
    assert ticket.indices(OLD).tolist() == [21, 22, 23]


@pytest.mark.parametrize("cloned", ["initial", "tuned"])
def test_copies_of_tied_weights_are_told_where_only_memory_ties_the_other_side(cloned):
    """Of a state dict: two names of one memory may be chance, so the copies stay two parameters, which is said."""
    base, moved = Tied(), Tied()
    with torch.no_grad():
        moved.shared.weight += 1
    sides = {"initial": base.state_dict(), "tuned": moved.state_dict()}
    sides[cloned] = {name: tensor.clone() for name, tensor in sides[cloned].items()}
    told = f"'{OLD}' equals 'shared.weight' bit for bit, .* copies of tied weights"
    with pytest.warns(UserWarning, match=told):
        ticket = ls.select(sides["initial"], sides["tuned"], k=3)
    with pytest.warns(UserWarning, match=told):
        ls.SparseDelta.between(sides["initial"], sides["tuned"], ticket)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        modules = {"initial": base, "tuned": moved, cloned: sides[cloned]}  # a module knows its ties
        assert OLD not in ls.select(modules["initial"], modules["tuned"], k=3).names
        sides[cloned][OLD] = sides[cloned][OLD] + 1  # of other bits: a parameter of its own
        assert OLD in ls.select(sides["initial"], sides["tuned"], k=3).names


# --- strictness ---


@pytest.fixture
def layers():
    base = {f"layer.{i}.weight": torch.zeros(4) for i in range(10)}
    return base, {name: torch.arange(1.0, 5) for name in base}


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_on_one_side_only_is_an_error_that_names_it(layers, on_disk, tmp_path):
    base, tuned = layers
    del tuned["layer.7.weight"]
    tuned["lm_head.weight"] = torch.ones(2)
    if on_disk:
        for name, side in (("a", base), ("b", tuned)):
            save_file(side, tmp_path / name)
        base, tuned = tmp_path / "a", tmp_path / "b"
    message = r"1 of 10 parameters of the initial model .*'layer.7.weight'.*1 of 10 parameters of the tuned .*'lm_head"
    for allowed in (False, ["lm_head"], "^layer", []):
        with pytest.raises(ValueError, match=message if allowed in (False, []) else "are not in the other"):
            ls.select(base, tuned, density=0.5, allow_missing=allowed)
    for allowed in (True, [r"layer\.7", "lm_head"], "layer.7.weight|lm_head"):
        ticket = ls.select(base, tuned, density=0.5, allow_missing=allowed)
        assert ticket.n == 36 and ticket.k == 18
        assert ticket.metadata["left_out"] == {"only in initial model": 1, "only in tuned model": 1}
    assert ls.select(base, tuned, density=0.5, pool=r"layer\.[0-5]\.").n == 24  # outside the pool is outside


def test_scores_of_a_part_are_an_error(layers):
    base, _ = layers
    with pytest.raises(ValueError, match="9 of 10 parameters of the initial model are not in the other"):
        ls.select(base, score={"layer.3.weight": torch.ones(4)}, k=2)
    ticket = ls.select(base, score={"layer.3.weight": torch.ones(4)}, k=2, allow_missing=True)
    assert ticket.metadata["left_out"] == {"only in initial model": 9}


def test_the_same_infinity_on_both_sides_is_told():
    base = {"mask": torch.tensor([0.0, float("-inf"), float("-inf"), 1.0]), "w": torch.zeros(2)}
    tuned = {"mask": base["mask"].clone(), "w": torch.ones(2)}
    with pytest.raises(ValueError, match=r"'mask'.*2 entries are the same infinity in both versions.*pool="):
        ls.select(base, tuned, k=1)
    assert ls.select(base, tuned, k=1, pool="^w$").k == 1


# --- dtypes ---


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_versions_of_two_dtypes_warn_with_the_cure(dtype, on_disk, tmp_path):
    torch.manual_seed(0)
    base = {"w": torch.randn(100, 40)}
    tuned = {"w": base["w"].clone()}
    tuned["w"][:25] += 0.1 * torch.randn(25, 40)
    rounded = {"w": tuned["w"].to(dtype)}
    expected = ls.select({"w": base["w"].to(dtype)}, rounded, k=500)
    if on_disk:
        for name, side in (("a", base), ("b", rounded)):
            save_file(side, tmp_path / name)
        base, rounded = tmp_path / "a", tmp_path / "b"
    with pytest.warns(MixedDtypes, match=f"'w' is torch.float32 in the initial .* Pass compare_in={dtype}"):
        assert ls.select(base, rounded, k=500).metadata["mixed_dtypes"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ticket = ls.select(base, rounded, k=500, compare_in=dtype)
    assert ticket == expected and ticket.metadata["compared_in"] == str(dtype)
    assert int(ticket.indices("w").max()) < 25 * 40


ODD = {
    "float64": torch.zeros(2, dtype=torch.float64),
    "complex64": torch.zeros(2, dtype=torch.complex64),
    "float8": torch.zeros(2).to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_what_cannot_be_ranked_is_refused_in_the_pool_only(odd, on_disk, tmp_path):
    base, tuned = {"w": torch.zeros(4), "x": odd}, {"w": torch.tensor([0.0, 1, 0, 3]), "x": odd}
    if on_disk:
        for name, side in (("a", base), ("b", tuned)):
            save_file(side, tmp_path / name)
        base, tuned = tmp_path / "a", tmp_path / "b"
    assert ls.select(base, tuned, k=1, pool="^w$").indices("w").tolist() == [3]
    with pytest.raises((TypeError, ValueError), match="'x' must be float32, bfloat16, float16"):
        ls.select(base, tuned, k=1)


def test_quantised_tensors_are_no_weights_and_counted(tmp_path):
    """As bitsandbytes stores 4-bit (uint8) and 8-bit (int8) weights, and what lies beside them."""
    kept = {"head.weight": torch.zeros(4), "a.bias": torch.zeros(2), "other.scales": torch.zeros(2)}
    packed = {
        "a.weight": torch.zeros(8, dtype=torch.uint8),
        "a.weight.absmax": torch.zeros(2),
        "a.weight.quant_map": torch.zeros(16),
        "a.weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8),
        "b.weight": torch.zeros(4, dtype=torch.int8),
        "b.SCB": torch.zeros(2),
    }
    save_file({**kept, **packed}, tmp_path / "a")
    with pytest.warns(UserWarning, match="2 quantised tensors, e.g. 'a.weight', are left out"):
        weights = open_weights(tmp_path / "a")
    assert list(weights) == sorted(kept)
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    model["a"].weight = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    with pytest.warns(UserWarning, match="1 quantised"):
        assert ls.Ticket.full(model).names == ["a.bias", "head.bias", "head.weight"]
    with pytest.warns(UserWarning, match="1 quantised"):
        ticket = ls.select(model, score=lambda name, start, stop: torch.ones(stop - start), k=2)
    assert ticket.metadata["left_out"] == {"quantised": 1}
    ls.MaskedAdamW(model, ticket)


def test_tensors_without_memory_of_their_own_are_refused():
    """A DTensor holds a part of a parameter; reading its memory as that of the whole would fault."""
    from torch import distributed
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        sharded = DTensor.from_local(torch.randn(4, 4), init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(TypeError, match="must be a plain tensor, got DTensor"):
            ls.weights.digests.fingerprint({"w": sharded})
        with pytest.raises(TypeError, match="'w' is a DTensor.*select_sharded"):
            ls.select({"w": sharded}, {"w": torch.zeros(4, 4)}, k=1)
    finally:
        distributed.destroy_process_group()


# --- shards and their index ---


def shard(folder, number, tensors):
    save_file(tensors, folder / f"model-0000{number}-of-00002.safetensors")


@pytest.fixture
def sharded(tmp_path):
    """(folder, weight_map): w in the first shard, v in the second."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    shard(folder, 1, {"w": torch.zeros(4)})
    shard(folder, 2, {"v": torch.zeros(4)})
    return folder, {"w": "model-00001-of-00002.safetensors", "v": "model-00002-of-00002.safetensors"}


def test_the_index_says_which_copy_of_a_tensor_counts(sharded):
    folder, weight_map = sharded
    shard(folder, 2, {"v": torch.zeros(4), "w": torch.full((4,), 9.0)})
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert open_checkpoint(folder)["w"].piece(0, 4).tolist() == [0, 0, 0, 0]


def test_an_index_may_write_a_name_in_several_ways(sharded):
    """One shard as a bare name and with ./ before it is one file, and no other lies beside it."""
    folder, weight_map = sharded
    shard(folder, 2, {"v": torch.ones(4), "u": torch.full((2,), 2.0)})
    weight_map |= {"v": f"./{weight_map['v']}", "u": f".//{weight_map['v']}", "w": f"././{weight_map['w']}"}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert {name: tensor.piece(0, 2).tolist() for name, tensor in open_checkpoint(folder).items()} == {
        "u": [2, 2], "v": [1, 1], "w": [0, 0]
    }  # fmt: skip


def test_the_index_stands_for_its_folder(sharded):
    folder, weight_map = sharded
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert set(open_checkpoint(folder / INDEX)) == {"v", "w"}


@pytest.mark.parametrize("legacy", [False, True])
def test_other_kinds_of_files_are_known(tmp_path, legacy):
    torch.save({"w": torch.zeros(3)}, tmp_path / "model.bin", _use_new_zipfile_serialization=not legacy)
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    for name, cure in (("model.bin", "it is pickled: pass what torch.load"), ("lfs.safetensors", "by git lfs pull")):
        with pytest.raises(FileFormatError, match=f"{name}: not a readable safetensors file.*{cure}"):
            open_checkpoint(tmp_path / name)


def test_extra_state_of_modules_is_left_out():
    one, two = ({"w": torch.full((3,), x), "layer._extra_state": None} for x in (0.0, 1.0))
    assert ls.select(one, two, k=2).indices("w").tolist() == [0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder, index: index.clear(), "names no tensor"),
        (lambda folder, index: index.update(w=index["v"], v=index["w"]), "'w' is in .*00002.*but it is in model-00001"),
        (lambda folder, index: index.pop("v"), r"does not name model-00002"),
        (lambda folder, index: index.update(x=index["v"]), "says that 'x' is in .* none of its shards"),
        (lambda folder, index: shard(folder, 1, {"w": torch.zeros(4), "u": torch.zeros(1)}), "does not name 'u'"),
        (lambda folder, index: index.update(w="/etc/passwd"), "'/etc/passwd' is outside the folder"),
        (lambda folder, index: index.update(w="../w.safetensors"), "'../w.safetensors' is outside the folder"),
        (lambda folder, index: index.update(w="gone.safetensors"), "shard gone.safetensors, which is missing"),
        (lambda folder, index: index.update(w=3), "name of a shard, got 3"),
        (lambda folder, index: save_file({"w": torch.ones(4)}, folder / "model.safetensors"), "name model.safetensors"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(sharded, change, message):
    folder, weight_map = sharded
    change(folder, weight_map)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FileFormatError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"weight_map": {"w": "a", "w": "b"}}', "'w' occurs twice"),
        ("[]", "expected an index of shards, a JSON object"),
        ('{"weight_map": []}', "expected a mapping to shards, got list"),
        ("[" * 100_000, "nested"),
        ("\udcff", "not UTF-8"),
    ],
    ids=["twice", "list", "list of shards", "deep", "bytes"],
)
def test_an_index_that_is_none_is_refused(sharded, text, message):
    folder, _ = sharded
    (folder / INDEX).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(FileFormatError, match=message):
        open_checkpoint(folder)


def test_two_names_of_a_file_that_become_one_are_refused(tmp_path):
    save_file({"_orig_mod.w": torch.zeros(1), "w": torch.ones(1)}, tmp_path / "a")
    with pytest.raises(FileFormatError, match="'_orig_mod.w' and 'w' are both called 'w'|'w' and '_orig_mod.w'"):
        open_checkpoint(tmp_path / "a")
    save_file({"module.w": torch.zeros(1), "w": torch.ones(1)}, tmp_path / "b")
    assert list(open_checkpoint(tmp_path / "b")) == ["module.w", "w"]  # a child called "module", as in a module


def test_a_file_that_changes_while_it_is_read_is_told(tmp_path):
    save_file({"w": torch.zeros(4000)}, tmp_path / "a")
    tensor = open_checkpoint(tmp_path / "a")["w"]
    assert tensor.piece(0, 10).sum() == 0
    with (tmp_path / "a").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(FileFormatError, match="was changed while it was read"):
        tensor.piece(0, 10)


def test_indices_and_densities_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"from_indices: 'w' of shape \[2, 2\]: .*indices"):
        ls.Ticket.from_indices({"w": torch.tensor([4])}, {"w": (2, 2)})
    with pytest.raises(TypeError, match=r"density must be a number, got a tensor; pass density=0.5"):
        ls.select({"w": torch.zeros(2)}, {"w": torch.ones(2)}, density=torch.tensor(0.5))
