"""`TicketSwitcher`: the bits of apply and revert, in one pass from one delta to the next."""

import copy
import itertools

import pytest
import torch
from helpers.bits import DTYPES, same_bits, weights
from helpers.tied_model import TiedModel

import ltp_sparse as ls
from ltp_sparse.deltas import entries
from ltp_sparse.deltas.delta import applied_deltas

BIAS = "lm_head.decoder.bias"


@pytest.fixture
def model():
    model = TiedModel()
    model.register_buffer("prompt", torch.zeros(3))
    return model


def delta_of(model, seed, density=0.3, **options):
    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_((1e-2 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    ticket = ls.select(model, tuned, density=density, pool=lambda name: name != BIAS)
    return ls.SparseDelta.between(model, tuned, ticket, **options)


def everything(model):
    return {**weights(model), "prompt": model.prompt.clone()}


def same(a, b):
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def deltas_of(model):
    """Overlapping ones, one inside another, one of the same entries, with whole tensors, and one without originals."""
    first = delta_of(model, 1)
    return {
        "first": first,
        "same entries": ls.SparseDelta(first.ticket, {n: 2 * v for n, v in first.values.items()}, first.originals),
        "few": delta_of(model, 1, 0.02, originals=False),
        "dense": delta_of(model, 2, dense={BIAS: torch.ones(40, dtype=model.embedding.weight.dtype)}),
        "prompt": delta_of(model, 3, 1.0, dense={"prompt": torch.ones(3)}),
    }


def applied(model, delta):
    delta.apply(model)
    found = everything(model)
    delta.revert(model)
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ltp_sparse.selection.outcome.ShortTicket")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_switch_gives_the_bits_of_apply(model, dtype):
    model = model.to(dtype)
    model.prompt = model.prompt.float()
    deltas = deltas_of(model)
    wanted = {None: everything(model), **{name: applied(model, delta) for name, delta in deltas.items()}}
    switcher = ls.TicketSwitcher(model, deltas, pairs=3)
    assert same(everything(model), wanted[None]) and switcher.active is None and switcher.names == list(deltas)
    for old, new in itertools.permutations(wanted, 2):
        switcher.switch(old)
        switcher.switch(new)
        assert switcher.active == new and same(everything(model), wanted[new]), (old, new)
    assert len(switcher._pairs) == 3 and switcher.nbytes > 0 and repr(switcher.active) in repr(switcher)
    switcher.switch(None)
    assert same(everything(model), wanted[None]) and applied_deltas(model) == []


def test_the_same_base_in_another_dtype(model):
    deltas = deltas_of(model)
    del deltas["few"]  # without originals it cannot be compared
    half = copy.deepcopy(model).half()
    half.prompt = half.prompt.float()
    switcher = ls.TicketSwitcher(half, deltas, dtype="cast")
    for name in ("dense", "first", "prompt"):
        switcher.switch(name)
        found = everything(half)
        switcher.switch(None)
        deltas[name].apply(half, dtype="cast")
        assert same(found, everything(half))
        deltas[name].revert(half)


def test_one_launch_for_all_tensors(model, monkeypatch):
    switcher = ls.TicketSwitcher(model, deltas_of(model))
    launches, scatter = [], entries.masked_scatter_
    monkeypatch.setattr(entries, "masked_scatter_", lambda *args: (launches.append(args), scatter(*args)))
    switcher.switch("first")
    switcher.switch("same entries")
    assert [len(tensors) for tensors, *_ in launches] == [len(switcher._versions["first"].sets)] * 2
    launches.clear()
    switcher.switch("dense")
    into, over = launches
    assert into[0][0].dim() == 1 and len(over[0]) == len(switcher._base), "the values in one buffer, then the weights"


@pytest.mark.parametrize("at", range(1, 4))
@pytest.mark.parametrize("new", ["dense", None])
def test_an_interrupted_switch_leaves_the_active_delta(model, new, at, monkeypatch):
    switcher = ls.TicketSwitcher(model, deltas_of(model))
    switcher.switch("prompt")
    before, calls, scatter, copy_ = everything(model), [], entries.masked_scatter_, torch.Tensor.copy_

    def counted(run):
        def run_counted(*args, **options):
            calls.append(run)
            if len(calls) == at:
                raise KeyboardInterrupt
            return run(*args, **options)

        return run_counted

    with monkeypatch.context() as patch:
        patch.setattr(entries, "masked_scatter_", counted(scatter))
        patch.setattr(torch.Tensor, "copy_", counted(copy_))
        if new is None and at == 3:
            switcher.switch(new)  # two writes in all
            return
        with pytest.raises(KeyboardInterrupt):
            switcher.switch(new)
    assert switcher.active == "prompt" and same(everything(model), before)
    switcher.switch(new)
    assert switcher.active == new


def test_what_does_not_fit_is_refused_before_anything_changes(model):
    deltas = deltas_of(model)
    base = everything(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.embedding.weight[-1, -1] += 1
    with pytest.raises(ValueError, match="'first' does not fit the model.*is not the tensor this delta was made from"):
        ls.TicketSwitcher(other, deltas)
    with pytest.raises(ValueError, match="pairs must be at least 1"):
        ls.TicketSwitcher(model, deltas, pairs=0)
    switcher = ls.TicketSwitcher(model, deltas)
    with pytest.raises(ValueError, match="no delta 'frist'; closest: 'first'"):
        switcher.switch("frist")
    deltas["few"].apply(model)
    for refused in (lambda: switcher.switch("first"), lambda: ls.TicketSwitcher(model, deltas)):
        with pytest.raises(ValueError, match="is applied to the model; revert it"):
            refused()
    deltas["few"].revert(model)
    assert same(everything(model), base)
    model.embedding.weight = torch.nn.Parameter(model.embedding.weight.detach().clone())
    with pytest.raises(ValueError, match="was replaced or moved since the switcher was made"):
        switcher.switch("first")


def test_the_base_is_hashed_once(model, monkeypatch):
    from ltp_sparse.deltas import delta, switcher

    hashed, fingerprint = [], switcher.fingerprint

    def counted(tensors, like=None):
        hashed.extend(tensors)
        return fingerprint(tensors, like)

    deltas = deltas_of(model)
    monkeypatch.setattr(switcher, "fingerprint", counted)
    monkeypatch.setattr(delta, "whole_fingerprint", counted)
    ls.TicketSwitcher(model, deltas).switch("first")
    assert sorted(hashed) == sorted(set(hashed)) and hashed
