"""The ticket's entries under any optimizer of torch: as dense training under a mask, the rest bitwise as before."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ltp_sparse as ls


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 40)
        self.body = nn.Linear(40, 70)
        self.head = nn.Linear(70, 3)

    def forward(self, ids):
        return self.head(torch.tanh(self.body(self.embed(ids).mean(1))))


def batches(steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randint(50, (6, 5), generator=generator), torch.randint(3, (6,), generator=generator))
        for _ in range(steps)
    ]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def ticket(model):
    return ls.Ticket.random(model, density=0.3, seed=1, pool=["embed", "body"])


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("micro", [1, 2])
def test_equals_dense_training_under_a_mask(model, ticket, name, micro):
    """Micro-batches accumulate; dense parameters train beside the packed ones in the same optimizer."""
    peer = copy.deepcopy(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    packed = ls.PackedParameters(model, ticket)
    opt = packed.attach(OPTIMIZERS[name]([*packed.parameters(), *model.head.parameters()]))
    theirs = OPTIMIZERS[name](peer.parameters())
    masks = {n: ticket.mask(n) if n in ticket.sets else torch.tensor(n.startswith("head")) for n in before}
    for number, (ids, labels) in enumerate(batches(6)):
        F.cross_entropy(model(ids), labels).backward()
        F.cross_entropy(peer(ids), labels).backward()
        if (number + 1) % micro:
            continue
        for n, p in peer.named_parameters():
            p.grad.mul_(masks[n])
        norms = [
            nn.utils.clip_grad_norm_(params, 0.5)
            for params in ([*packed.parameters(), *model.head.parameters()], list(peer.parameters()))
        ]
        torch.testing.assert_close(*norms)
        opt.step()
        theirs.step()
        opt.zero_grad()
        theirs.zero_grad()
        with torch.no_grad():  # the decay of the dense peer moves every entry
            for n, p in peer.named_parameters():
                p.copy_(torch.where(masks[n], p, before[n]))
    for (n, ours), other in zip(model.named_parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(ours, other, atol=2e-6, rtol=1e-5, msg=n)
        if n in ticket.sets:
            assert torch.equal(ours[~ticket.mask(n)], before[n][~ticket.mask(n)]), n
    assert all(p.grad is None for n, p in model.named_parameters() if n in ticket.active_names)
    sizes = {n: p.numel() for n, p in packed.named_parameters()}
    assert sizes == {n: ticket.sets[n].k for n in ticket.active_names}


def test_state_dicts_resume_to_the_same_bits(model, ticket):
    def run(model, steps, saved=None):
        packed = ls.PackedParameters(model, ticket)
        opt = packed.attach(torch.optim.Adam(packed.parameters(), lr=0.01))
        if saved is not None:
            opt.load_state_dict(saved)
        for ids, labels in steps:
            F.cross_entropy(model(ids), labels).backward()
            opt.step()
            opt.zero_grad()
        packed.remove()
        return opt.state_dict()

    whole, steps = copy.deepcopy(model), batches(8)
    run(whole, steps)
    run(model, steps[4:], copy.deepcopy(run(model, steps[:4])))
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(p, q)


def test_grad_scaler_skips_a_step_with_inf(model, ticket):
    packed = ls.PackedParameters(model, ticket)
    opt = packed.attach(torch.optim.SGD(packed.parameters(), lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = copy.deepcopy(model.state_dict())
    for poison in (float("inf"), 1.0):
        ((ids, labels),) = batches(1)
        scaler.scale(F.cross_entropy(model(ids), labels) * poison).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        moved = any(not torch.equal(before[n], t) for n, t in model.state_dict().items())
        assert moved == (poison == 1.0)
    assert scaler.get_scale() == 2.0


def test_bfloat16_weights_hold_the_rounding_of_float32_masters(model, ticket):
    model.to(torch.bfloat16)
    packed = ls.PackedParameters(model, ticket)
    opt = packed.attach(torch.optim.SGD(packed.parameters(), lr=1e-4))
    for ids, labels in batches(20):
        F.cross_entropy(model(ids).float(), labels).backward()
        opt.step()
        opt.zero_grad()
    for name, values in packed.named_parameters():
        weight = ls.canonical_parameters(model)[name].detach()
        assert torch.equal(weight[ticket.mask(name)], values.detach().to(torch.bfloat16))
    model.body.weight.data.fill_(0.5)
    packed.gather_()
    assert (dict(packed.named_parameters())["body.weight"] == 0.5).all()


def test_remove_makes_gradients_dense_again(model, ticket):
    packed = ls.PackedParameters(model, ticket)
    assert model.embed.sparse
    packed.remove()
    ((ids, labels),) = batches(1)
    F.cross_entropy(model(ids), labels).backward()
    assert model.body.weight.grad.shape == model.body.weight.shape and not model.embed.sparse
    assert all(p.grad is None for p in packed.parameters())


def test_mistakes(model, ticket):
    with pytest.raises(ValueError, match="PackedParameters: no name of the ticket is in the model"):
        ls.PackedParameters(nn.Linear(3, 3), ticket)
    with pytest.raises(ValueError, match="expected a ticket with active entries"):
        ls.PackedParameters(model, ls.Ticket({}, {}))
    other = Net()
    other.body = nn.Linear(40, 71)
    with pytest.raises(ValueError, match=r"'body.bias' has shape \[71\] in the model and \[70\] in the ticket"):
        ls.PackedParameters(other, ticket)
    packed = ls.PackedParameters(model, ticket)
    with pytest.raises(ValueError, match="this optimizer has none of the packed parameters"):
        packed.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    k = sum(s.k for s in ticket.sets.values())
    assert repr(packed) == f"PackedParameters({k:,} entries of 3 parameters)"
