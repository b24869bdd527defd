"""The ticket's entries under any optimizer of torch: as dense training under a mask, the rest bitwise as before."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.gradients import has_dense_gradient
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
    assert not any(has_dense_gradient(p) for n, p in model.named_parameters() if n in ticket.active_names)
    sizes = {n: p.numel() for n, p in packed.named_parameters()}
    assert sizes == {n: ticket.sets[n].k for n in ticket.active_names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loaded", ["before", "after"])
def test_state_dicts_resume_to_the_same_bits(ticket, loaded, dtype):
    """Weights can be loaded before the parameters are packed, or after. In bfloat16 the masters are copied back."""
    initial, steps = Net().to(dtype), batches(8)

    def run(model, steps, saved=None):
        if loaded == "before" and saved is not None:
            model.load_state_dict(saved[0])
        packed = ls.PackedParameters(model, ticket)
        opt = packed.attach(torch.optim.Adam(packed.parameters(), lr=0.01))
        if saved is not None:
            opt.load_state_dict(saved[1])
            with torch.no_grad():
                for name, values in packed.named_parameters():
                    values.copy_(saved[2][name])
            model.load_state_dict(saved[0])
        for ids, labels in steps:
            F.cross_entropy(model(ids).float(), labels).backward()
            opt.step()
            opt.zero_grad()
        packed.remove()
        return copy.deepcopy((model.state_dict(), opt.state_dict(), dict(packed.named_parameters())))

    whole = run(copy.deepcopy(initial), steps)[0]
    resumed = run(Net().to(dtype), steps[4:], run(copy.deepcopy(initial), steps[:4]))[0]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_weights_that_are_loaded_later_are_taken_over(model, ticket):
    packed = ls.PackedParameters(model, ticket)
    opt = packed.attach(torch.optim.SGD(packed.parameters(), lr=0.1))
    other = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.load_state_dict(other)
    opt.step()  # without gradients
    assert all(torch.equal(other[name], tensor) for name, tensor in model.state_dict().items())


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
    model.body.weight.data = torch.full_like(model.body.weight.data, 0.25)
    opt.step()
    assert (dict(packed.named_parameters())["body.weight"] == 0.25).all() and (model.body.weight == 0.25).all()


def test_remove_makes_gradients_dense_again(model, ticket):
    packed = ls.PackedParameters(model, ticket)
    assert model.embed.sparse
    packed.remove()
    ((ids, labels),) = batches(1)
    F.cross_entropy(model(ids), labels).backward()
    assert model.body.weight.grad.shape == model.body.weight.shape and not model.embed.sparse
    assert all(p.grad is None for p in packed.parameters())


def test_steps_do_not_reach_the_model_after_remove(model, ticket):
    packed = ls.PackedParameters(model, ticket)
    opt = packed.attach(torch.optim.SGD(packed.parameters(), lr=0.1))
    packed.remove()
    before = copy.deepcopy(model.state_dict())
    for p in packed.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    model(batches(1)[0][0])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not model._forward_pre_hooks


def test_dense_parameters_come_last(model, ticket):
    for dense in (model.head, model.head.parameters(), [{"params": model.head.parameters()}]):
        packed = ls.PackedParameters(model, ticket, dense=dense)
        own = [p for _, p in packed.named_parameters()]
        every = list(packed.parameters())
        assert len(own) == 3 and all(a is b for a, b in zip(every, [*own, *model.head.parameters()], strict=True))
        packed.remove()
    packed = ls.PackedParameters(model, ticket, dense=model.head)
    opt = packed.attach(torch.optim.SGD(packed.parameters(), lr=0.1))
    before, ((ids, labels),) = copy.deepcopy(model.state_dict()), batches(1)
    F.cross_entropy(model(ids), labels).backward()
    opt.step()
    for name, tensor in model.state_dict().items():
        moved = tensor != before[name]
        assert moved.any()
        if name in ticket.sets:
            assert not moved[~ticket.mask(name)].any()
    packed.remove()
    with pytest.raises(ValueError, match=r"'body.bias' is both in the ticket and in dense"):
        ls.PackedParameters(model, ticket, dense=model.body)


class Composed(nn.Module):
    """The same network as a function of one small vector per tensor: the active entries, as `base` has the others."""

    def __init__(self, base, ticket):
        super().__init__()
        self.base, self.masks = base, {name: ticket.mask(name) for name in ticket.active_names}
        values = [dict(base.named_parameters())[name].detach()[mask] for name, mask in self.masks.items()]
        self.values = nn.ParameterList(values)

    def forward(self, ids):
        weights = {name: p.detach() for name, p in self.base.named_parameters()}
        for (name, mask), values in zip(self.masks.items(), self.values, strict=True):
            weights[name] = weights[name].masked_scatter(mask, values)
        return torch.func.functional_call(self.base, weights, (ids,))


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_a_closure_is_evaluated_at_the_values_of_the_moment(model, ticket, search):
    """LBFGS changes the values and asks for the loss again, several times in a step."""
    small = Composed(copy.deepcopy(model), ticket)
    packed = ls.PackedParameters(model, ticket)
    params = {"lr": 0.5, "max_iter": 6, "line_search_fn": search}
    ours = packed.attach(torch.optim.LBFGS(packed.parameters(), **params))
    theirs = torch.optim.LBFGS(small.values.parameters(), **params)
    losses = []
    for opt, network in ((ours, model), (theirs, small)):
        for ids, labels in batches(3):

            def closure(opt=opt, network=network, ids=ids, labels=labels):
                opt.zero_grad()
                loss = F.cross_entropy(network(ids), labels)
                loss.backward()
                losses.append(loss.item())
                return loss

            opt.step(closure)
    ours_seen, theirs_seen = losses[: len(losses) // 2], losses[len(losses) // 2 :]
    assert len(losses) > 2 * 3 * 3 and len(set(ours_seen)) > 6
    assert ours_seen == pytest.approx(theirs_seen, rel=1e-4)
    for values, name in zip(small.values, ticket.active_names, strict=True):
        weight = dict(model.named_parameters())[name]
        torch.testing.assert_close(weight[ticket.mask(name)], values, atol=1e-4, rtol=1e-3)


def test_values_changed_between_steps_reach_the_next_forward(model, ticket):
    """As the `eval()` of a schedule-free optimizer changes them."""
    packed = ls.PackedParameters(model, ticket)
    ids, _ = batches(1)[0]
    wanted = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in wanted.named_parameters():
            if name in ticket.sets:
                p[ticket.mask(name)] *= 2
        for p in packed.parameters():
            p.mul_(2)
    with torch.no_grad():
        assert torch.equal(model(ids), wanted(ids))
    model.body.weight.data.zero_()  # the hook writes what has changed, not at every forward
    with torch.no_grad():
        model(ids)
    assert not model.body.weight.any()


def test_a_copy_of_the_model_keeps_its_own_values(model, ticket):
    packed = ls.PackedParameters(model, ticket)
    twin = copy.deepcopy(model)
    before = copy.deepcopy(twin.state_dict())
    with torch.no_grad():
        for p in packed.parameters():
            p.add_(1)
        twin(batches(1)[0][0])
        assert all(torch.equal(before[name], tensor) for name, tensor in twin.state_dict().items())
        model(batches(1)[0][0])
    assert not torch.equal(before["body.weight"], model.body.weight)
    assert all(torch.equal(before[name], tensor) for name, tensor in twin.state_dict().items())
    with torch.no_grad():  # nor does the copy write into the model
        saved = copy.deepcopy(model.state_dict())
        twin.body.weight.zero_()
        twin(batches(1)[0][0])
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


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
    with pytest.raises(TypeError, match="PackedParameters hooks into its model and optimizer and cannot be copied"):
        copy.deepcopy((model, packed))
    k = sum(s.k for s in ticket.sets.values())
    assert repr(packed) == f"PackedParameters({k:,} entries of 3 parameters)"
