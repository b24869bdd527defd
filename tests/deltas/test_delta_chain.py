"""Chains of deltas, w0 -> w1 -> w2, on one model: the bits of each, one entry in the stack, and the way back."""

import copy

import pytest
import torch
from helpers.bits import assert_same, weights
from torch import nn

import ltp_sparse as ls
from ltp_sparse.deltas.delta import applied_deltas


@pytest.fixture
def chain():
    """Four models, each trained from the one before on another ticket, and the deltas between them."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 5)).bfloat16()]
    tickets = [
        ls.Ticket.random(models[0], density=0.3, seed=seed, pool=pool) for seed, pool in enumerate(["0", None, "1"])
    ]
    for ticket in tickets:
        model = copy.deepcopy(models[-1])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in ticket.sets:
                    parameter += torch.randn_like(parameter) * ticket.mask(name)
        models.append(model)
    pairs = zip(models, models[1:], tickets, strict=False)
    return models, [ls.SparseDelta.between(before, after, ticket) for before, after, ticket in pairs]


def test_a_chain_gives_every_model_and_goes_back_in_one_step(chain, tmp_path):
    models, deltas = chain
    model = copy.deepcopy(models[0])
    deltas[0].apply(model)
    for delta, after in zip(deltas[1:], models[2:], strict=True):
        latest = delta.advance(model)
        assert_same(weights(model), weights(after))
        assert [entry.delta for entry in applied_deltas(model)] == [latest]
    latest.save(tmp_path / "all")
    latest.revert(model)
    assert_same(weights(model), weights(models[0]))
    ls.SparseDelta.load(tmp_path / "all").apply(model)
    assert_same(weights(model), weights(models[3]))


def test_deltas_of_a_model_with_deltas_follow_too(chain):
    models, deltas = chain
    model = copy.deepcopy(models[0])
    deltas[0].apply(model)
    second = ls.SparseDelta.between(model, models[2], deltas[1].ticket.restrict(None))  # the base below is w0
    second.advance(model)
    assert_same(weights(model), weights(models[2]))


def test_a_long_chain_does_not_grow(chain):
    models, deltas = chain
    model = copy.deepcopy(models[0])
    deltas[0].apply(model)
    size = set()
    for step in range(6):
        before, after = copy.deepcopy(model), copy.deepcopy(model)
        with torch.no_grad():
            after[0].weight += step * torch.randn_like(after[0].weight) * deltas[0].ticket.mask("0.weight")
        latest = ls.SparseDelta.between(before, after, deltas[0].ticket).advance(model)
        size.add((latest.nbytes, len(str(latest.ticket.metadata)), len(applied_deltas(model))))
    assert len(size) == 1


def test_what_does_not_follow_is_refused_and_changes_nothing(chain, monkeypatch):
    models, (first, second, third) = chain
    model = copy.deepcopy(models[0])
    with pytest.raises(ValueError, match="no delta is applied"):
        second.advance(model)
    first.apply(model)
    for wrong, match in (
        (third, "chain in their order|is missing"),
        (first, "is missing, or they belong to different runs"),
    ):
        with pytest.raises(ValueError, match=match):
            wrong.advance(model)
    bare = ls.SparseDelta(second.ticket, second.values)
    with pytest.raises(ValueError, match="has no originals"):
        bare.advance(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[1].weight[0, 0] += 1  # outside the first delta, inside a tensor of the second
    applied_deltas(other).extend(applied_deltas(model)[:1])
    with pytest.raises(ValueError, match="'1.weight' is not the tensor"):
        second.advance(other)

    interrupt_advance(first, second, model, monkeypatch)
    assert_same(weights(model), weights(models[1]))
    assert [entry.delta for entry in applied_deltas(model)] == [first]
    second.advance(model)
    assert_same(weights(model), weights(models[2]))


def test_whole_tensors_that_were_left_out_stay_out(chain, monkeypatch):
    models, (first, second, _) = chain
    first.dense = {"head.weight": torch.ones(3)}  # of another model
    model = copy.deepcopy(models[0])
    first.apply(model, dense=False)

    interrupt_advance(first, second, model, monkeypatch)
    assert [entry.delta for entry in applied_deltas(model)] == [first]
    latest = second.advance(model)
    assert_same(weights(model), weights(models[2]))
    assert not latest.dense
    latest.revert(model)
    assert_same(weights(model), weights(models[0]))


def test_deltas_of_two_dtypes_do_not_follow(chain):
    models, (first, _, _) = chain
    base = copy.deepcopy(models[0]).float()
    ticket = ls.Ticket.random(base, density=0.3, seed=8)
    later = ls.SparseDelta.between(base, {n: p + 1 for n, p in base.named_parameters()}, ticket)
    with pytest.raises(ValueError, match=r"'0.bias' in torch.bfloat16 and torch.float32"):
        first.followed_by(later)


def test_a_chain_goes_on_above_another_delta(chain):
    models, deltas = chain
    model = copy.deepcopy(models[0])
    ticket = ls.Ticket.random(model, density=0.2, seed=9, pool="1")  # where the first of the chain has no entries
    lower = ls.SparseDelta.between(model, {n: p + 1 for n, p in model.named_parameters()}, ticket)
    lower.apply(model)
    below = weights(model)
    deltas[0].apply(model)
    wanted, later = copy.deepcopy(model), ls.Ticket.random(model, density=0.3, seed=8, pool="1")
    with torch.no_grad():
        wanted[1].weight += later.mask("1.weight")
    latest = ls.SparseDelta.between(copy.deepcopy(model), wanted, later).advance(model)
    assert_same(weights(model), weights(wanted))
    latest.revert(model)
    assert_same(weights(model), below)
    lower.revert(model)
    assert_same(weights(model), weights(models[0]))


def interrupt_advance(first, second, model, monkeypatch):
    """Stops `second.advance` when it applies another delta than the first."""
    apply = ls.SparseDelta.apply

    def interrupted(self, model, **options):
        if self is not first:
            raise KeyboardInterrupt
        apply(self, model, **options)

    monkeypatch.setattr(ls.SparseDelta, "apply", interrupted)
    with pytest.raises(KeyboardInterrupt):
        second.advance(model)
    monkeypatch.undo()
