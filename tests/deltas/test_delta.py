"""`SparseDelta`: apply gives the tuned bits, revert the original ones; deltas compose; what does not fit is refused."""

import copy
import warnings

import pytest
import torch
from helpers.backends import using
from helpers.bits import DTYPES, same_bits, weights
from helpers.tied_model import DENSE, EMBEDDING, TiedModel
from safetensors.torch import save_file

import ltp_sparse as ls
from ltp_sparse import SparseDelta, Ticket
from ltp_sparse.deltas.delta import applied_deltas
from ltp_sparse.selection import pools
from ltp_sparse.tickets.ticket import pack_sets
from ltp_sparse.weights import files
from ltp_sparse.weights.reading import FileFormatError

LANGUAGE, TASK = 1, 2


def tuned_copy(model, seed, scale=1e-2):
    """A version of the model after a tuning run that moved everything."""
    tuned = copy.deepcopy(model)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_((scale * torch.randn(parameter.shape, generator=g)).to(parameter.dtype))
    return tuned


def unchanged(model, before) -> bool:
    return all(same_bits(p, before[name]) for name, p in ls.canonical_parameters(model).items())


def ticket_of(model, tuned, density=0.3, pool=pools.maskable) -> Ticket:
    return ls.select(model, tuned, density=density, pool=pool)


def delta_of(model, seed, density=0.3, **kwargs) -> SparseDelta:
    tuned = tuned_copy(model, seed)
    return SparseDelta.between(model, tuned, ticket_of(model, tuned, density), **kwargs)


@pytest.fixture
def model():
    return TiedModel()


@pytest.mark.parametrize("saved", [False, True], ids=["made", "loaded"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_apply_gives_the_tuned_bits_and_revert_the_original_ones(model, dtype, saved, tmp_path):
    """In every dtype; outside the ticket nothing changes."""
    model = model.to(dtype)
    before, tuned = weights(model), tuned_copy(model, LANGUAGE)
    ticket = ticket_of(model, tuned)
    delta = SparseDelta.between(model, tuned, ticket)
    assert unchanged(model, before)
    if saved:
        delta.save(tmp_path / "delta.safetensors")
        delta = SparseDelta.load(tmp_path / "delta.safetensors")
    delta.apply(model)
    after, wanted = weights(model), weights(tuned)
    moved = 0
    for name, tensor in after.items():
        mask = ticket.mask(name) if name in ticket.names else torch.zeros(tensor.shape, dtype=torch.bool)
        assert same_bits(tensor, torch.where(mask, wanted[name], before[name]))
        moved += int((tensor != before[name]).sum())
    assert moved == ticket.k
    delta.revert(model)
    assert unchanged(model, before) and applied_deltas(model) == []


def test_odd_bits_survive(model):
    """Values that arithmetic would lose: negative zero, denormals, huge and tiny."""
    odd = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, 1e-20, 1.0, 1 + 2**-23])
    base, tuned = {"w": torch.cat([odd, torch.ones(8)])}, {"w": torch.cat([torch.ones(8), odd])}
    holder = torch.nn.Module()
    holder.w = torch.nn.Parameter(base["w"].clone())
    delta = SparseDelta.between(base, tuned, Ticket.full(base))
    delta.apply(holder)
    assert same_bits(holder.w, tuned["w"])
    delta.revert(holder)
    assert same_bits(holder.w, base["w"])


@pytest.mark.parametrize("step", ["apply", "revert"])
@pytest.mark.parametrize("stop_at", [0, 1, 4, 9])
def test_a_swap_interrupted_half_way_is_undone(model, step, stop_at, monkeypatch):
    """Between two writes of the reference, to a tensor or to slots: each has the old value in one of them."""
    delta, writes, write = delta_of(model, TASK), [], torch.Tensor.__setitem__

    def counted(tensor, *args):
        writes.extend([tensor] if tensor.is_floating_point() else [])
        if len(writes) == stop_at + 1 and tensor is writes[-1]:
            raise KeyboardInterrupt
        write(tensor, *args)

    with using("reference"):
        if step == "revert":
            delta.apply(model)
        before = weights(model)
        monkeypatch.setattr(torch.Tensor, "__setitem__", counted)
        with pytest.raises(KeyboardInterrupt):
            getattr(delta, step)(model)
        assert len(writes) > stop_at + 1, "what was changed is written back"
    assert unchanged(model, before) and len(applied_deltas(model)) == (step == "revert")


def test_strided_parameters_are_written_in_place(model):
    """A parameter that is a view keeps its memory."""
    storage = torch.randn(16, 40)
    model.embedding.weight.data = storage.t()
    before = weights(model)
    delta = delta_of(model, TASK)
    delta.apply(model)
    assert not unchanged(model, before) and model.embedding.weight.data_ptr() == storage.data_ptr()
    delta.revert(model)
    assert unchanged(model, before) and same_bits(storage.t(), before[EMBEDDING])


def test_from_a_checkpoint_and_a_wrapped_model(model, tmp_path):
    tuned = tuned_copy(model, TASK)
    ticket = ticket_of(model, tuned)
    save_file({f"module.{name}": t for name, t in weights(model).items()}, tmp_path / "base.safetensors")
    from_disk = SparseDelta.between(tmp_path / "base.safetensors", tuned, ticket)
    in_memory = SparseDelta.between(model, torch.nn.DataParallel(tuned), ticket)
    for a, b in ((from_disk.values, in_memory.values), (from_disk.originals, in_memory.originals)):
        assert a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)
    assert from_disk.ticket.fingerprint == in_memory.ticket.fingerprint
    wrapped = torch.nn.DataParallel(model)
    before = weights(model)
    from_disk.apply(wrapped)
    from_disk.revert(model)
    assert unchanged(model, before)


# --- composition ---


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_language_and_task_compose_in_both_orders(model, dtype):
    """Where only one delta acts, its tuned bits; where both do, base + both differences (LT-SFT), in any order."""
    model = model.to(dtype)
    base = weights(model)
    language, task = delta_of(model, LANGUAGE), delta_of(model, TASK)
    results = []
    for first, second in ((language, task), (task, language)):
        composed = copy.deepcopy(model)
        first.apply(composed)
        second.apply(composed)
        results.append(weights(composed))
        second.revert(composed)
        first.revert(composed)
        assert unchanged(composed, base), "revert undoes both"
    for name in base:
        if name not in language.ticket.names:
            continue
        masks = [delta.ticket.mask(name) for delta in (language, task)]
        for delta, mask, other in ((language, *masks), (task, *reversed(masks))):
            alone = torch.zeros_like(base[name]).masked_scatter(mask, delta.values[name])
            for result in results:
                assert same_bits(result[name][mask & ~other], alone[mask & ~other])
        both = masks[0] & masks[1]
        assert bool(both.any()) or base[name].numel() < 20
        moved = [
            torch.zeros(base[name].shape).masked_scatter(m, d.values[name].float() - d.originals[name].float())[both]
            for m, d in zip(masks, (language, task), strict=True)
        ]
        wanted = base[name][both].double() + moved[0].double() + moved[1].double()
        spacing = torch.finfo(dtype).eps * wanted.abs().clamp(min=0.1)
        for result in results:
            assert bool(((result[name][both].double() - wanted).abs() <= spacing).all())


def test_disjoint_deltas_come_off_in_any_order(model):
    base = weights(model)
    tuned = tuned_copy(model, TASK)
    deltas = [
        SparseDelta.between(model, tuned, ticket_of(model, tuned, pool=pool))
        for pool in ([r"layer\.0"], [r"layer\.1"], ["embeddings"])
    ]
    for delta in deltas:
        delta.apply(model)
    for delta in (deltas[1], deltas[0], deltas[2]):
        delta.revert(model)
    assert unchanged(model, base)


def test_out_of_order_revert_with_overlap_is_an_error(model):
    """Revert undoes the latest apply; below it, only what does not overlap."""
    base = weights(model)
    language, task = delta_of(model, LANGUAGE), delta_of(model, TASK)
    language.apply(model)
    between = weights(model)
    task.apply(model)
    composed = weights(model)
    with pytest.raises(ValueError, match="was applied later and overlaps in .*revert that one first"):
        language.revert(model)
    assert unchanged(model, composed)
    task.revert(model)
    assert unchanged(model, between)
    language.revert(model)
    assert unchanged(model, base)
    with pytest.raises(ValueError, match="not applied"):
        language.revert(model)


def test_a_delta_applied_twice_is_added_twice_and_comes_off_twice(model):
    base, delta = weights(model), delta_of(model, TASK)
    delta.apply(model)
    once = weights(model)
    delta.apply(model)
    assert not unchanged(model, once)
    delta.revert(model)
    assert unchanged(model, once)
    delta.revert(model)
    assert unchanged(model, base)


def test_without_originals_no_composition(model):
    language, task = delta_of(model, LANGUAGE), delta_of(model, TASK, originals=False)
    assert task.nbytes < 0.6 * language.nbytes and "without originals" in repr(task)
    task.apply(model)
    task.revert(model)
    language.apply(model)
    before = weights(model)
    with pytest.raises(ValueError, match="made without originals"):
        task.apply(model)
    assert unchanged(model, before)


# --- dense tensors ---


def test_dense_tensors_replace_and_come_back(model, tmp_path):
    model.register_buffer("prompt", torch.zeros(3))
    tuned = tuned_copy(model, TASK)
    dense = {"lm_head.decoder.bias": torch.randn(40), "prompt": torch.ones(3)}
    base = weights(model)
    delta = SparseDelta.between(model, tuned, ticket_of(model, tuned), dense=dense)
    dense["prompt"][0] = 7  # the delta has its own copy
    delta.save(tmp_path / "delta.safetensors")
    loaded = SparseDelta.load(tmp_path / "delta.safetensors")
    loaded.apply(model)
    assert model.prompt.tolist() == [1, 1, 1]
    assert same_bits(model.lm_head["decoder"].bias, dense["lm_head.decoder.bias"])
    loaded.revert(model)
    assert unchanged(model, base) and model.prompt.tolist() == [0, 0, 0]


def test_dense_tensors_of_two_deltas_come_off_in_order(model):
    base = weights(model)
    bias = "lm_head.decoder.bias"
    deltas = [
        SparseDelta.between(model, model, Ticket({}, {}), dense={bias: torch.full((40,), value)})
        for value in (1.0, 2.0)
    ]
    for delta in deltas:
        delta.apply(model)
    with pytest.raises(ValueError, match=f"overlaps in '{bias}'"):
        deltas[0].revert(model)
    deltas[1].revert(model)
    deltas[0].revert(model)
    assert unchanged(model, base)


@pytest.mark.parametrize("whole_first", [False, True])
def test_entries_and_a_whole_tensor_of_one_parameter_come_off_in_order(model, whole_first):
    base, wanted = weights(model), tuned_copy(model, TASK)
    entries = delta_of(model, LANGUAGE)
    whole = SparseDelta.between(model, wanted, Ticket({}, {}), dense={DENSE: weights(wanted)[DENSE]})
    first, second = (whole, entries) if whole_first else (entries, whole)
    first.apply(model)
    second.apply(model)  # on the same base, without the first
    both = weights(model)
    for name in entries.ticket.active_names:
        moved = entries.ticket.mask(name) & (both[name] != (weights(wanted) if name == DENSE else base)[name])
        assert moved.any() == (whole_first or name != DENSE)
    with pytest.raises(ValueError, match=f"overlaps in '{DENSE}'"):
        first.revert(model)
    assert unchanged(model, both)
    second.revert(model)
    first.revert(model)
    assert unchanged(model, base)
    whole.apply(model)
    with pytest.raises(ValueError, match=f"overlaps another one in '{DENSE}' and was made without originals"):
        SparseDelta(entries.ticket, entries.values).apply(model)


# --- what does not fit is refused before anything changes ---


def other_base(model):
    with torch.no_grad():
        model.embedding.weight[-1, -1] += 1e-6


def wrong_shape(model):
    model.roberta["encoder"]["layer"][1]["dense"].weight = torch.nn.Parameter(torch.zeros(16, 17))


def no_name(model):
    model.roberta["encoder"]["layer"] = model.roberta["encoder"]["layer"][:1]


MISFITS = {
    "other-base": (other_base, f"'{EMBEDDING}' is not the tensor this delta was made from"),
    "other-dtype": (
        lambda model: model.half(),
        'is torch.float16 in the model.*torch.float32 in the delta.*dtype="cast"',
    ),
    "other-shape": (wrong_shape, r"has shape \[16, 17\], the ticket was made for \[16, 16\]"),
    "missing-name": (no_name, "of the ticket are not in the model.*layer.1.dense.bias' is missing"),
}


@pytest.mark.parametrize(("spoil", "message"), MISFITS.values(), ids=MISFITS)
def test_misfits_are_refused_before_anything_changes(model, spoil, message):
    delta = delta_of(model, TASK)
    spoil(model)
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        delta.apply(model)
    assert unchanged(model, before) and applied_deltas(model) == []


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        ({"lm_head.decoder.bias": torch.zeros(41)}, r"no tensor 'lm_head.decoder.bias' of shape \[41\]"),
        ({"lm_head.decoder.bais": torch.zeros(40)}, "closest: 'lm_head.decoder.bias'"),
        ({"lm_head.decoder.bias": torch.zeros(40).half()}, "is torch.float32 in the model.*torch.float16 in the delta"),
    ],
    ids=["shape", "name", "dtype"],
)
def test_dense_misfits_are_refused_before_anything_changes(model, dense, message):
    delta = delta_of(model, TASK, dense=dense)
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        delta.apply(model)
    assert unchanged(model, before)


def test_no_name_in_common(model):
    holder = torch.nn.Module()
    holder.other = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="no name of the ticket is in the model.*closest there: 'other'"):
        delta_of(model, TASK).apply(holder)


def test_a_delta_made_on_top_of_another_does_not_fit_the_base(model):
    language = delta_of(model, LANGUAGE)
    base = weights(model)
    language.apply(model)
    task = delta_of(model, TASK)
    language.revert(model)
    with pytest.raises(ValueError, match="is not the tensor this delta was made from"):
        task.apply(model)
    assert unchanged(model, base)


@pytest.mark.parametrize("form", ["module", "mapping"])
def test_the_base_is_that_of_the_delta_not_of_its_ticket(model, form, tmp_path):
    """A ticket can be selected on one version and used for the training of a later one."""
    later, last = tuned_copy(model, LANGUAGE), tuned_copy(model, TASK)
    ticket = ticket_of(model, last)
    pair = (later, last) if form == "module" else (weights(later), weights(last))
    delta = SparseDelta.between(*pair, ticket)
    delta.save(tmp_path / "delta.safetensors")
    for found in (delta, SparseDelta.load(tmp_path / "delta.safetensors")):
        with pytest.raises(ValueError, match="is not the tensor this delta was made from"):
            found.apply(model)
        found.apply(later)
        assert torch.equal(
            later.embedding.weight[ticket.mask(EMBEDDING)], last.embedding.weight[ticket.mask(EMBEDDING)]
        )
        found.revert(later)


def test_between_refuses_models_that_do_not_fit_the_ticket(model):
    ticket = Ticket.full(model, [DENSE])
    shrunk = TiedModel(hidden=8)
    for pair, side in (((shrunk, model), "the initial model"), ((model, shrunk), "the tuned model")):
        with pytest.raises(ValueError, match=rf"{side}: '{DENSE}' has shape \[8, 8\]"):
            SparseDelta.between(*pair, ticket)
    with pytest.raises(ValueError, match="no name of the ticket is in the tuned model"):
        SparseDelta.between(model, {"a": torch.zeros(1)}, ticket)


def test_strict_false_overrides_and_says_so(model):
    delta = delta_of(model, TASK)
    other_base(model)
    before = weights(model)
    with pytest.warns(UserWarning, match="strict=False, the base model is not compared"):
        delta.apply(model, strict=False)
    assert same_bits(model.embedding.weight.detach()[delta.ticket.mask(EMBEDDING)], delta.values[EMBEDDING])
    delta.revert(model)
    assert unchanged(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_the_same_base_in_another_dtype_is_accepted_by_cast(model, dtype):
    delta = delta_of(model, TASK, dense={"lm_head.decoder.bias": torch.ones(40)})
    exact = copy.deepcopy(model)
    cast = copy.deepcopy(model).to(dtype)
    before = weights(cast)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delta.apply(exact, dtype="cast")
        delta.apply(cast, dtype="cast")
    assert unchanged(cast, {name: t.to(dtype) for name, t in weights(exact).items()})
    delta.revert(cast)
    assert unchanged(cast, before)
    with pytest.raises(ValueError, match='must be "same" or "cast", got \'half\''):
        delta.apply(cast, dtype="half")


def test_cast_of_a_base_that_was_tuned_in_another_dtype(model):
    """From a bfloat16 base to a float32 version: neither dtype is that of base and values, so both need a cast."""
    half = copy.deepcopy(model).bfloat16()
    tuned = tuned_copy(copy.deepcopy(half).float(), TASK)
    delta = SparseDelta.between(half, tuned, Ticket.full(tuned))
    for base in (half, copy.deepcopy(half).float()):
        before = weights(base)
        with pytest.raises(ValueError, match='pass dtype="cast" if it is the same base in another dtype'):
            delta.apply(base)
        delta.apply(base, dtype="cast")
        assert unchanged(base, {name: t.to(base.embedding.weight.dtype) for name, t in weights(tuned).items()})
        delta.revert(base)
        assert unchanged(base, before)
    with pytest.raises(ValueError, match="is not the tensor this delta was made from"):
        delta.apply(TiedModel(), dtype="cast")


@pytest.mark.parametrize("originals", [True, False], ids=["originals", "values-only"])
def test_cast_still_refuses_another_base(model, originals):
    delta = delta_of(model, TASK, originals=originals)
    wrong = TiedModel()
    for other in (wrong, copy.deepcopy(wrong).half()):
        before = weights(other)
        with pytest.raises(ValueError, match="is not the tensor|cannot be compared"):
            delta.apply(other, dtype="cast")
        assert unchanged(other, before)


def test_cast_compares_with_the_base_below_other_deltas(model):
    language, task = delta_of(model, LANGUAGE), delta_of(model, TASK)
    half = model.half()
    before = weights(half)
    language.apply(half, dtype="cast")
    task.apply(half, dtype="cast")
    task.revert(half)
    language.revert(half)
    assert unchanged(half, before)


def test_fingerprint_covers_the_tensors_of_the_ticket_only(model):
    """A head that differs does not matter to a delta on the encoder."""
    delta = delta_of(model, TASK)
    with torch.no_grad():
        model.lm_head["decoder"].bias.add_(1)
    delta.apply(model)


# --- construction and files ---


def test_values_must_fit_the_ticket():
    ticket = Ticket.full({"a": [3], "b": [2]})
    with pytest.raises(ValueError, match=r"values of 'a' do not fit the ticket, got \[2\]"):
        SparseDelta(ticket, {"a": torch.zeros(2), "b": torch.zeros(2)})
    with pytest.raises(ValueError, match="no values for 'b'"):
        SparseDelta(ticket, {"a": torch.zeros(3)})
    with pytest.raises(ValueError, match="originals of 'c'"):
        SparseDelta(ticket, {"a": torch.zeros(3), "b": torch.zeros(2)}, {"c": torch.zeros(1)})


def test_file_holds_everything_and_is_of_size_k(model, tmp_path):
    """Contract 12: O(k)."""
    delta = delta_of(model, TASK, dense={"prompt": torch.randn(2, 3)}, metadata={"epoch": 3})
    path = tmp_path / "delta.safetensors"
    delta.save(path)
    loaded = SparseDelta.load(path)
    assert loaded.ticket == delta.ticket and loaded.ticket.fingerprint == delta.ticket.fingerprint
    assert loaded.metadata == {"epoch": 3} and loaded.ticket.metadata == delta.ticket.metadata
    for part in ("values", "originals", "dense"):
        a, b = getattr(delta, part), getattr(loaded, part)
        assert a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)
    assert path.stat().st_size < delta.nbytes + 6000
    assert "composable" in repr(loaded) and "1 dense" in repr(loaded)


def test_damaged_files_are_refused(model, tmp_path, rng):
    """Contract 10; `test_ticket.py` goes through the format itself."""
    path = tmp_path / "delta.safetensors"
    delta_of(model, TASK).save(path)
    whole = path.read_bytes()
    for length in torch.randint(len(whole), (60,), generator=rng).tolist():
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError):
            SparseDelta.load(path)
    header = 8 + int.from_bytes(whole[:8], "little")
    for bit in torch.randint(8 * header, 8 * len(whole), (150,), generator=rng).tolist():
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="damaged"):
            SparseDelta.load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, _: tensors.update({f"values/{DENSE}": torch.zeros(1)}),
        lambda tensors, _: tensors.pop(f"values/{DENSE}"),
        lambda tensors, _: tensors.update({"originals/unknown": torch.zeros(1)}),
        lambda _, metadata: metadata.pop("ticket"),
        lambda _, metadata: metadata["parameters"][DENSE].update(k=1),
    ],
    ids=["short-values", "no-values", "unknown-originals", "no-ticket", "other-k"],
)
def test_files_with_a_valid_checksum_and_wrong_content_are_refused(model, change, tmp_path):
    path = tmp_path / "delta.safetensors"
    delta_of(model, TASK).save(path)
    tensors, metadata = files.load(path, "delta")
    change(tensors, metadata)
    files.save(path, "delta", tensors, metadata)
    with pytest.raises(ValueError, match="not that of a delta"):
        SparseDelta.load(path)


@pytest.mark.parametrize("name", ["values/w", "originals/w", "dense/w"])
def test_names_that_are_keys_of_the_file_are_refused(tmp_path, name):
    """Their indices would be read as values of a parameter w.bitmap, and could replace them."""
    path = tmp_path / "delta.safetensors"
    base, tuned = ({name: torch.full((9,), value), "w.values/": torch.full((9,), value)} for value in (0.0, 1.0))
    delta = SparseDelta.between(base, tuned, Ticket.random(base, k=9, seed=0))
    with pytest.raises(ValueError, match=f"the indices of '{name}' would be taken for {name[:-2]}; rename"):
        delta.save(path)
    assert not path.exists()
    tensors, described = pack_sets(delta.ticket.sets, delta.ticket.shapes)
    metadata = {"parameters": described, "fingerprint": {}, "ticket": {}, "metadata": {}}
    files.save(path, "delta", tensors | {f"values/{key}": values for key, values in delta.values.items()}, metadata)
    with pytest.raises(FileFormatError, match="not that of a delta|would be taken for"):
        SparseDelta.load(path)


# --- bits, and what a delta carries ---


@pytest.mark.parametrize("cast", [False, True])
def test_bits_are_compared_where_bits_are_promised(cast):
    """0 and -0 are equal and not the same; NaN is the same and not equal."""
    base = torch.nn.Module()
    base.w = torch.nn.Parameter(torch.tensor([0.0, float("nan"), 1.0]))
    ticket = Ticket.full({"w": [3]}).fingerprinted(base)
    tuned = torch.tensor([-0.0, 2.0, 3.0])
    delta = SparseDelta(ticket, {"w": tuned}, {"w": base.w.detach().clone()})
    model = copy.deepcopy(base)
    if cast:
        model = model.to(torch.bfloat16)
    delta.apply(model, dtype="cast" if cast else "same")
    assert same_bits(model.w, tuned.to(model.w.dtype))
    delta.revert(model)
    assert same_bits(model.w, base.w.to(model.w.dtype))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.w[0] = -0.0
    with pytest.raises(ValueError, match="'w' is not the tensor this delta was made from"):
        delta.apply(other, dtype="cast" if cast else "same")


def test_zeros_that_change_their_sign_outside_the_ticket_are_told():
    base, tuned = {"w": torch.tensor([0.0, 1.0, -0.0, 0.0])}, {"w": torch.tensor([-0.0, 2.0, -0.0, 0.0])}
    ticket = ls.select(base, tuned, k=1)
    with pytest.warns(UserWarning, match="1 zeros outside the ticket changed only their sign"):
        SparseDelta.between(base, tuned, ticket)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SparseDelta.between(base, tuned, Ticket.full(base))


def test_a_delta_with_a_head_is_applied_to_a_model_without_one_by_dense_false():
    model = torch.nn.ModuleDict({"body": torch.nn.Linear(2, 2)})
    ticket = Ticket.full(model)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned["body"].weight += 1
    delta = SparseDelta.between(model, tuned, ticket, dense={"module.lm_head.weight": torch.ones(3)})
    assert list(delta.dense) == ["lm_head.weight"]
    with pytest.raises(ValueError, match=r"no tensor 'lm_head.weight'.*Pass dense=False to leave the 1 whole"):
        delta.apply(model)
    before = copy.deepcopy(model)
    delta.apply(model, dense=False)
    assert same_bits(model["body"].weight, tuned["body"].weight)
    delta.revert(model)
    assert same_bits(model["body"].weight, before["body"].weight)


def test_buffers_of_a_wrapped_model_are_found_by_their_bare_names():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    delta = SparseDelta.between(model, model, Ticket.full(model), dense={"1.running_mean": torch.full((2,), 7.0)})
    wrapped = torch.nn.DataParallel(torch.compile(model, backend="eager"))
    delta.apply(wrapped)
    assert model[1].running_mean.tolist() == [7, 7]
    delta.revert(wrapped)
    assert model[1].running_mean.tolist() == [0, 0]
