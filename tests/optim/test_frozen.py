"""Proof of freeze: every changed bit of an inactive entry is seen, active and dense ones may move."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ltp_sparse as ls


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"embed": nn.Embedding(3000, 50), "body": nn.Linear(300, 70), "head": nn.Linear(4, 3)})


@pytest.fixture(params=[0.003, 0.3])
def ticket(model, request):
    return ls.Ticket.random(model, density=request.param, seed=1, pool=["embed", "body.weight"])


def test_active_entries_may_move(model, ticket):
    before = ls.frozen_digests(model, ticket, model["head"].parameters())
    assert set(before) == {"embed.weight", "body.weight", "body.bias"}
    with torch.no_grad():
        for name in ticket.active_names:
            parameter = ls.canonical_parameters(model)[name]
            parameter[ticket.mask(name)] += 1
            parameter[ticket.mask(name)] = float("nan")
        model["head"].weight.add_(1)
    ls.verify_frozen(before, model, ticket, model["head"].parameters())


@pytest.mark.parametrize("name", ["embed.weight", "body.weight", "body.bias"])
def test_one_bit_of_an_inactive_entry_is_seen(model, ticket, name):
    before = ls.frozen_digests(model, ticket)
    parameter = ls.canonical_parameters(model)[name]
    inactive = ~ticket.mask(name) if name in ticket.sets else torch.ones(parameter.shape, dtype=torch.bool)
    for place in (inactive.nonzero()[0], inactive.nonzero()[-1]):
        original = parameter[tuple(place)].item()
        with torch.no_grad():
            parameter.view(torch.int32)[tuple(place)] ^= 1
        with pytest.raises(RuntimeError, match=rf"entries of '{name}' that must not train have changed \(1 "):
            ls.verify_frozen(before, model, ticket)
        with torch.no_grad():
            parameter[tuple(place)] = original
        ls.verify_frozen(before, model, ticket)


def test_an_active_zero_is_no_inactive_entry(model):
    """A value that becomes the fill value stays invisible only where the ticket is."""
    ticket = ls.Ticket.from_indices({"body.bias": torch.tensor([3])}, {"body.bias": [70]})
    before = ls.frozen_digests(model, ticket)
    with torch.no_grad():
        model["body"].bias[3] = 0
    ls.verify_frozen(before, model, ticket)
    with torch.no_grad():
        model["body"].bias[4] = 0
    with pytest.raises(RuntimeError, match="'body.bias'"):
        ls.verify_frozen(before, model, ticket)


def test_full_parameters_and_other_models(model):
    ticket = ls.Ticket.full(model, pool=["head"])
    before = ls.frozen_digests(model, ticket)
    assert not any(name.startswith("head") for name in before)
    del model["body"]
    with pytest.raises(ValueError, match="'body.bias' was added or removed"):
        ls.verify_frozen(before, model, ticket)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_strides(dtype):
    model = nn.Linear(90, 80).to(dtype)
    model.weight = nn.Parameter(model.weight.detach().t().contiguous().t())
    ticket = ls.Ticket.random(model, density=0.5, seed=0, pool=["weight"])
    before = ls.frozen_digests(model, ticket)
    with torch.no_grad():
        model.weight[ticket.mask("weight")] = 0
    ls.verify_frozen(before, model, ticket)
    with torch.no_grad():
        model.weight[~ticket.mask("weight")] *= 2
    with pytest.raises(RuntimeError):
        ls.verify_frozen(before, model, ticket)


def test_dense_is_given_as_to_the_optimizer(model, ticket):
    forms = (model["head"], list(model["head"].parameters()), [{"params": model["head"].parameters(), "lr": 1.0}])
    for dense in forms:
        assert set(ls.frozen_digests(model, ticket, dense)) == {"embed.weight", "body.weight", "body.bias"}
    before = ls.frozen_digests(model, ticket, model["head"])
    with torch.no_grad():
        model["head"].bias.add_(1)
    ls.verify_frozen(before, model, ticket, [{"params": model["head"].parameters()}])
    with pytest.raises(
        ValueError, match="'head.bias' was added or removed \\(2 in all\\); pass the same model, ticket and dense"
    ):
        ls.verify_frozen(before, model, ticket)


def test_a_ticket_of_another_model_is_refused(model, ticket):
    other = nn.ModuleDict({"embed": nn.Embedding(3000, 51), "body": nn.Linear(300, 70)})
    with pytest.raises(ValueError, match=r"frozen_digests: 'embed.weight' has shape \[3000, 51\] in the model"):
        ls.frozen_digests(other, ticket)
    with pytest.raises(ValueError, match="frozen_digests: no name of the ticket is in the model"):
        ls.verify_frozen({}, nn.Linear(3, 3), ticket)
