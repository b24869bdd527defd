"""`MaskedAdamW`: torch.optim.AdamW on the active entries, in torch's protocol (contracts 3 to 7)."""

import copy
import io
import math
import pickle

import numpy
import pytest
import torch
from helpers.backends import ALL_BACKENDS, BACKENDS, using
from helpers.bits import same_bits, weights
from helpers.tied_model import DENSE, EMBEDDING, TiedModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ltp_sparse as ls
from ltp_sparse import MaskedAdamW, Ticket
from ltp_sparse.optim import NoGradients, freeze
from ltp_sparse.selection import pools
from ltp_sparse.testing import random_weights, xlmr_shapes
from ltp_sparse.tickets.bits import TILE
from ltp_sparse.tickets.index_set import Encoding

TOLERANCE = {"rtol": 2e-6, "atol": 2e-7}  # contract 4 allows 4e-6 of steps x lr, here 8e-7


@pytest.fixture
def model():
    return TiedModel()


@pytest.fixture
def ticket(model):
    """All encodings in one ticket, one parameter without active entries, and LayerNorms and head outside."""
    random = Ticket.random(model, density=0.3, seed=1, pool=pools.maskable)
    full = Ticket.full(model, ["layer.1.dense.bias"])
    few = Ticket.from_indices({EMBEDDING: torch.tensor([3, 77, 600])}, {EMBEDDING: [40, 16]})
    ticket = (
        random.restrict(["layer.0.dense.weight"]) | full | few | (Ticket.full(model, ["layer.0.dense.bias"]) - full)
    )
    ticket = ticket - Ticket.full(model, ["layer.0.dense.bias"])
    assert {ticket.sets[name].compact().encoding for name in ticket.active_names} == set(Encoding)
    return ticket


def backward(model, seed, *, skip=(), poison=None) -> None:
    """Fresh gradients of a random batch; None for `skip`; NaN or infinite where `poison` (a ticket) is not active."""
    model.zero_grad(set_to_none=True)
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(40, (4, 6), generator=g)
    nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    for name, param in ls.canonical_parameters(model).items():
        if name in skip:
            param.grad = None
        elif poison is not None and name in poison.names:
            param.grad[~poison.mask(name)] = float("nan") if seed % 2 else float("inf")


class Gathered:
    """torch.optim.AdamW on the active entries and the dense parameters, gathered from the same start."""

    def __init__(self, model, ticket, dense=(), **hyper):
        self.named, self.ticket = ls.canonical_parameters(model), ticket
        self.params = {name: nn.Parameter(self.active(name, self.named[name])) for name in ticket.active_names}
        self.dense = {name: nn.Parameter(self.named[name].detach().clone()) for name in dense}
        self.optimizer = torch.optim.AdamW([*self.params.values(), *self.dense.values()], **hyper)

    def active(self, name, tensor):
        return tensor.detach()[self.ticket.mask(name)].clone()

    def take_gradients(self):
        for name, param in self.params.items():
            grad = self.named[name].grad
            param.grad = None if grad is None else self.active(name, grad)
        for name, param in self.dense.items():
            param.grad = None if self.named[name].grad is None else self.named[name].grad.clone()

    def step(self):
        self.take_gradients()
        self.optimizer.step()

    def assert_same(self, **tolerance):
        for name, param in self.params.items():
            torch.testing.assert_close(self.active(name, self.named[name]), param.detach(), **(tolerance or TOLERANCE))
        for name, param in self.dense.items():
            torch.testing.assert_close(self.named[name].detach(), param.detach(), **(tolerance or TOLERANCE))


def assert_frozen(model, ticket, before, dense=()):
    """Contract 3: what is not active has its bits."""
    for name, param in ls.canonical_parameters(model).items():
        if name not in dense:
            inactive = ~ticket.mask(name) if name in ticket.names else torch.ones(param.shape, dtype=torch.bool)
            assert same_bits(param.detach()[inactive], before[name][inactive]), name


def same_state(model, other) -> bool:
    return all(same_bits(a, b) for a, b in zip(weights(model).values(), weights(other).values(), strict=True))


def saved(optimizer) -> dict:
    """The state after a trip through a file, loaded without unpickling."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# --- contract 4: beside torch.optim.AdamW ---

HYPER = {
    "defaults": {},
    "decay": {"lr": 1e-2, "weight_decay": 0.1},
    "no-decay": {"lr": 1e-2, "weight_decay": 0.0},
    "betas": {"lr": 1e-2, "betas": (0.0, 0.5), "eps": 1e-3},
    "maximize": {"lr": 1e-3, "maximize": True},
    "tensor-lr": {"lr": torch.tensor(1e-2)},
}


@pytest.mark.parametrize("hyper", HYPER.values(), ids=HYPER)
@pytest.mark.parametrize("backend", BACKENDS)
def test_follows_adamw_with_save_and_load_in_the_middle(backend, hyper, model, ticket):
    """24 steps; gradients of inactive entries are NaN or infinite, some parameters have none in some steps."""
    names = [EMBEDDING, DENSE]
    before = weights(model)
    with using(backend):
        peer = Gathered(model, ticket, **hyper)
        optimizer = MaskedAdamW(model, ticket, **hyper)
        for step in range(24):
            if step == 11:
                state = saved(optimizer)
                optimizer = MaskedAdamW(model, ticket, lr=0.5)
                optimizer.load_state_dict(state)
            backward(model, step, skip=[names[step % 2]] if step in (0, 3, 4, 12, 17) else [], poison=ticket)
            peer.step()
            optimizer.step()
    peer.assert_same()
    assert_frozen(model, ticket, before)
    named = ls.canonical_parameters(model)
    counts = {name: int(optimizer.state[named[name]]["step"]) for name in ticket.active_names}
    assert counts == {EMBEDDING: 21, DENSE: 22, "roberta.encoder.layer.1.dense.bias": 24}
    assert counts == {name: int(peer.optimizer.state[p]["step"]) for name, p in peer.params.items()}


def schedulers(optimizer):
    return {
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
        "warmup": lambda: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 5)),
        "one-cycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=30),
    }


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float-lr", "tensor-lr"])
@pytest.mark.parametrize("name", ["cosine", "warmup", "one-cycle"])
def test_learning_rate_schedulers(name, tensor_lr, model, ticket):
    """One-cycle also moves beta1; tensor learning rates are written in place."""

    def lr():
        return torch.tensor(1e-2) if tensor_lr else 1e-2

    peer = Gathered(model, ticket, lr=lr())
    optimizer = MaskedAdamW(model, ticket, lr=lr())
    both = [schedulers(o)[name]() for o in (peer.optimizer, optimizer)]
    for step in range(25):
        backward(model, step)
        peer.step()
        optimizer.step()
        for scheduler in both:
            scheduler.step()
    peer.assert_same()


def test_tensor_learning_rate_changed_in_place(model, ticket):
    lr = torch.tensor(0.0)
    optimizer = MaskedAdamW(model, ticket, lr=lr)
    before = weights(model)
    for step, value in enumerate((0.0, 1e-2)):
        lr.fill_(value)
        backward(model, step)
        optimizer.step()
        named = ls.canonical_parameters(model)
        assert torch.equal(named[DENSE], before[DENSE]) == (value == 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inactive_entries_are_frozen_over_100_steps(backend, model, ticket):
    """Contract 3: decay, clipping, accumulation, maximize, NaN and infinite gradients."""
    before = weights(model)
    with using(backend):
        optimizer = MaskedAdamW(model, ticket, lr=0.1, weight_decay=0.5, max_grad_norm=0.5, maximize=True)
        for step in range(100):
            backward(model, step, poison=ticket)
            optimizer.step()
    assert_frozen(model, ticket, before)
    for name in ticket.active_names:
        assert bool((weights(model)[name][ticket.mask(name)] != before[name][ticket.mask(name)]).all())


def test_parameters_outside_ticket_and_dense_are_left_out(model, ticket):
    named = ls.canonical_parameters(model)
    flags = {name: param.requires_grad for name, param in named.items()}
    optimizer = MaskedAdamW(model, ticket, dense=model.lm_head["decoder"].bias)
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    wanted = [named[name] for name in [*ticket.active_names, "lm_head.decoder.bias"]]
    assert "roberta.encoder.layer.0.dense.bias" in ticket.names and ids == [id(p) for p in wanted]
    assert {name: param.requires_grad for name, param in named.items()} == flags
    assert "lm_head" not in "".join(ticket.names)


# --- dense parameters, groups, clipping, pull, freeze ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_dense_parameters_are_updated_in_full(backend, model, ticket):
    dense = ["lm_head.decoder.bias", "roberta.encoder.layer.0.LayerNorm.weight"]
    named = ls.canonical_parameters(model)
    before = weights(model)
    with using(backend):
        peer = Gathered(model, ticket, dense, lr=1e-2)
        optimizer = MaskedAdamW(model, ticket, lr=1e-2, dense=(named[name] for name in dense))
        for step in range(20):
            backward(model, step)
            peer.step()
            optimizer.step()
    peer.assert_same()
    assert_frozen(model, ticket, before, dense)
    assert optimizer.active_entries == ticket.k + 40 + 16


def test_dense_groups_have_their_own_options(model, ticket):
    bias, norm = model.lm_head["decoder"].bias, model.roberta["encoder"]["layer"][0]["LayerNorm"]
    groups = [{"params": [bias], "lr": 0.1, "weight_decay": 0.0}, {"params": norm.parameters(), "betas": (0.5, 0.9)}]
    peers = copy.deepcopy([bias, *norm.parameters()])
    reference = torch.optim.AdamW(
        [{"params": peers[:1], "lr": 0.1, "weight_decay": 0.0}, {"params": peers[1:], "betas": (0.5, 0.9)}], lr=1e-2
    )
    optimizer = MaskedAdamW(model, ticket, lr=1e-2, dense=groups)
    for step in range(10):
        backward(model, step)
        for peer, param in zip(peers, [bias, *norm.parameters()], strict=True):
            peer.grad = param.grad.clone()
        reference.step()
        optimizer.step()
    for peer, param in zip(peers, [bias, *norm.parameters()], strict=True):
        torch.testing.assert_close(param, peer, **TOLERANCE)


def test_only_dense_parameters(model):
    optimizer = MaskedAdamW(model, Ticket({}, {}), dense=model.lm_head)
    backward(model, 0)
    optimizer.step()
    with pytest.raises(ValueError, match="nothing to train"):
        MaskedAdamW(model, Ticket({}, {}))


def test_a_parameter_in_ticket_and_dense_is_an_error(model, ticket):
    with pytest.raises(
        ValueError, match="embeddings.weight' is both in the ticket and in dense, in more than one parameter group"
    ):
        MaskedAdamW(model, ticket, dense=[model.embedding.weight])


def test_add_param_group_keeps_the_state_of_the_others(model, ticket):
    twin = copy.deepcopy(model)
    optimizers = [
        MaskedAdamW(model, ticket, lr=1e-2, pull=0.01),
        MaskedAdamW(twin, ticket, lr=1e-2, pull=0.01, dense=[{"params": twin.lm_head["decoder"].bias, "lr": 0.1}]),
    ]
    for step in range(8):
        if step == 4:
            optimizers[0].add_param_group({"params": model.lm_head["decoder"].bias, "lr": 0.1})
        for side, optimizer in zip((model, twin), optimizers, strict=True):
            backward(side, step, skip=["lm_head.decoder.bias"] if step < 4 else [])
            optimizer.step()
    assert same_state(model, twin)


@pytest.mark.parametrize("group", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": -1.0}, {"pull": -1.0}], ids=str)
def test_a_refused_group_leaves_the_optimizer_as_it_was(group, model, ticket):
    optimizer = MaskedAdamW(model, ticket)
    with pytest.raises(ValueError, match=f"MaskedAdamW: {next(iter(group))} must be"):
        optimizer.add_param_group({"params": [model.lm_head["decoder"].bias], **group})
    with pytest.raises(TypeError, match="must be float32, bfloat16, float16, got torch.float64"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2).double())]})
    backward(model, 0)
    optimizer.step()
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=f"MaskedAdamW: {next(iter(group))} must be"):
        MaskedAdamW(model, ticket, **group)


@pytest.mark.parametrize("max_norm", [0.05, 100.0], ids=["clipped", "not-clipped"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_clipping_is_over_active_and_dense_entries(backend, max_norm, model, ticket):
    """As clip_grad_norm_ on what trains; frozen entries do not count, NaN in them included."""
    dense = ["lm_head.decoder.bias"]
    with using(backend):
        peer = Gathered(model, ticket, dense, lr=1e-2)
        optimizer = MaskedAdamW(model, ticket, lr=1e-2, dense=[model.lm_head["decoder"].bias], max_grad_norm=max_norm)
        assert optimizer.grad_norm is None
        for step in range(20):
            backward(model, step, poison=ticket)
            peer.take_gradients()
            norm = nn.utils.clip_grad_norm_([*peer.params.values(), *peer.dense.values()], max_norm)
            peer.optimizer.step()
            optimizer.step()
            assert optimizer.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
    peer.assert_same(rtol=1e-5, atol=1e-7)


def test_pull_is_the_l1_term_towards_the_initial_values(model, ticket):
    """Added before norm, clip and moments; the initial values are those at construction."""
    pull, max_norm = 0.02, 0.3
    peer = Gathered(model, ticket, lr=1e-2)
    start = {name: param.detach().clone() for name, param in peer.params.items()}
    optimizer = MaskedAdamW(model, ticket, lr=1e-2, pull=pull, max_grad_norm=max_norm)
    for step in range(20):
        backward(model, step)
        peer.take_gradients()
        for name, param in peer.params.items():
            param.grad += pull * torch.sign(param.detach() - start[name])
        nn.utils.clip_grad_norm_(peer.params.values(), max_norm)
        peer.optimizer.step()
        optimizer.step()
    peer.assert_same(rtol=1e-5, atol=1e-7)


def test_pull_cannot_be_turned_on_later(model, ticket):
    """There are no initial values then; silence would train without the term."""
    optimizer = MaskedAdamW(model, ticket)
    optimizer.param_groups[0]["pull"] = 0.1
    backward(model, 0)
    with pytest.raises(ValueError, match="pull must be set at construction"):
        optimizer.step()


def test_freeze_turns_requires_grad_off_where_nothing_trains(model, ticket):
    named = ls.canonical_parameters(model)
    MaskedAdamW(model, ticket, dense=[named["lm_head.decoder.bias"]], freeze=True)
    trained = {name for name, param in named.items() if param.requires_grad}
    assert trained == {*ticket.active_names, "lm_head.decoder.bias"}
    other = TiedModel()
    freeze(other, ticket, dense=[{"params": other.lm_head["decoder"].bias}])
    assert {name for name, p in ls.canonical_parameters(other).items() if p.requires_grad} == trained


def test_misfits_are_clear_errors(model, ticket):
    with pytest.raises(
        ValueError, match=rf"'{EMBEDDING}' has shape \[41, 16\] in the model and \[40, 16\] in the ticket"
    ):
        MaskedAdamW(TiedModel(vocabulary=41), ticket)
    with pytest.raises(TypeError, match="must be float32, bfloat16, float16, got torch.float64"):
        MaskedAdamW(TiedModel().double(), ticket)
    with pytest.raises(ValueError, match="max_grad_norm must be above 0 or None, got 0"):
        MaskedAdamW(model, ticket, max_grad_norm=0)
    for wrong in ("1", numpy.float32(0), math.nan):
        with pytest.raises(ValueError, match="max_grad_norm must be above 0 or None"):
            MaskedAdamW(model, ticket, max_grad_norm=wrong)
    assert MaskedAdamW(model, ticket, max_grad_norm=numpy.float32(0.5)).max_grad_norm == 0.5
    for rate in (numpy.float32(0.5), torch.tensor(0.5), torch.tensor([0.5])):  # all of which torch takes
        optimizer, same = (MaskedAdamW(one, ticket, lr=lr) for one, lr in ((model, rate), (copy.deepcopy(model), 0.5)))
        optimizer.load_state_dict(optimizer.state_dict())
        for each in (optimizer, same):
            for param in each.named_members().values():
                param.grad = torch.ones_like(param)
            each.step()
        assert all(map(same_bits, optimizer.named_members().values(), same.named_members().values()))
    with pytest.raises(ValueError, match="freeze=True needs the module"):
        MaskedAdamW(ls.canonical_parameters(model), ticket, freeze=True)
    with pytest.raises(TypeError, match="not a mixture"):
        MaskedAdamW(model, ticket, dense=[model.lm_head["decoder"].bias, {"params": []}])


# --- torch's protocol: closures, hooks, zero_grad, scaler ---


def test_closure_hooks_and_zero_grad(model, ticket):
    optimizer = MaskedAdamW(model, ticket)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure():
        assert torch.is_grad_enabled()
        backward(model, 0)
        calls.append("closure")
        return 3.0

    before = weights(model)
    assert optimizer.step(closure) == 3.0 and calls == ["pre", "closure", "post"]
    assert not torch.equal(before[DENSE], ls.canonical_parameters(model)[DENSE])
    optimizer.zero_grad()
    assert model.embedding.weight.grad is None
    assert "3 parameters" in repr(optimizer) and f"{ticket.k:,} of" in repr(optimizer)


def test_a_step_without_any_gradient_changes_nothing(model, ticket):
    optimizer = MaskedAdamW(model, ticket, max_grad_norm=1.0)
    before = weights(model)
    with pytest.warns(NoGradients, match="no entry of the ticket has a gradient") as caught:
        optimizer.step()
        optimizer.step()
    assert len(caught) == 1 and caught[0].filename == __file__
    assert all(same_bits(p, before[name]) for name, p in weights(model).items())
    assert optimizer.grad_norm.item() == 0


@pytest.mark.parametrize("max_norm", [None, 0.1], ids=["plain", "clipped"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_scaler_scales_and_skips_on_the_device(backend, max_norm, model, ticket):
    """Contract 7: found_inf and scale are device scalars; a skipped step changes no value, moment or count."""
    twin = copy.deepcopy(model)
    with using(backend):
        scaled, plain = (MaskedAdamW(m, ticket, lr=1e-2, max_grad_norm=max_norm) for m in (model, twin))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10**6)
        for step in range(6):
            scaler.scale(torch.tensor(1.0))
            scale, overflow = scaler.get_scale(), step in (0, 3)
            backward(twin, step)
            for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
                ours.grad = theirs.grad * scale
            if overflow:
                ls.canonical_parameters(model)[DENSE].grad[0, 0] = float("inf")
            before = copy.deepcopy([weights(model), scaled.state_dict()["state"]])
            scaler.step(scaled)
            scaler.update()
            if overflow:
                assert scaler.get_scale() == scale / 2
                after = [weights(model), scaled.state_dict()["state"]]
                torch.testing.assert_close(after, before, rtol=0, atol=0)
            else:
                plain.step()
                if max_norm is not None:
                    assert scaled.grad_norm.item() == pytest.approx(plain.grad_norm.item(), rel=1e-6)
            assert not hasattr(scaled, "found_inf")
    assert same_state(model, twin), "powers of two scale exactly"


def test_unscaled_gradients_of_a_scaler_are_not_divided_again(model, ticket):
    twin = copy.deepcopy(model)
    scaled, plain = MaskedAdamW(model, ticket, lr=1e-2), MaskedAdamW(twin, ticket, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.tensor(1.0))
    for side in (model, twin):
        backward(side, 0)
    for param in model.parameters():
        param.grad.mul_(8)
    scaler.unscale_(scaled)
    scaler.step(scaled)
    plain.step()
    assert same_state(model, twin)


# --- contract 7: live tensors ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_swapped_data_and_new_gradients_are_followed(backend, model, ticket):
    """Nothing launches with an address of an earlier step."""
    twin = copy.deepcopy(model)
    with using(backend):
        first, second = MaskedAdamW(model, ticket, lr=1e-2), MaskedAdamW(twin, ticket, lr=1e-2)
        kept = []
        for step in range(6):
            for param in model.parameters():
                kept.append(param.data)
                copied = param.data.t().clone(memory_format=torch.contiguous_format).t()  # strided where it has rows
                param.data = copied if step % 2 else copied.contiguous()
            backward(model, step)
            backward(twin, step)
            frozen = [old.clone() for old in kept]
            first.step()
            second.step()
            assert all(same_bits(old, copied) for old, copied in zip(kept, frozen, strict=True))
    assert same_state(model, twin)


def test_changed_shape_dtype_or_layout_raises(model, ticket):
    optimizer = MaskedAdamW(model, ticket)
    param = ls.canonical_parameters(model)[DENSE]
    for data, grad, error in (
        (torch.zeros(4, 4), torch.zeros(4, 4), ValueError),
        (torch.zeros(16, 16).double(), torch.zeros(16, 16).double(), TypeError),
        (torch.zeros(16, 16), torch.zeros(16, 16).to_sparse(), TypeError),
    ):
        param.grad, param.data = None, data
        param.grad = grad
        with pytest.raises(error, match="masked_adamw_: (parameter|gradient)|has become torch.float64"):
            optimizer.step()


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_refused_step_has_changed_nothing(max_norm, model, ticket):
    """Neither a count nor a launch before the one that is refused: parameters of another dtype come second."""
    head = nn.Linear(3, 3).bfloat16()
    optimizer = MaskedAdamW(model, ticket, lr=1e-2, dense=head, max_grad_norm=max_norm)
    trained = [*ls.canonical_parameters(model).values(), *head.parameters()]

    def everything():
        return copy.deepcopy([[p.detach() for p in trained], optimizer.state_dict()["state"]])

    def gradients():
        backward(model, 0)
        head.weight.grad, head.bias.grad = torch.ones_like(head.weight), torch.ones_like(head.bias)

    gradients()
    optimizer.step()
    before = everything()
    gradients()
    head.weight.grad = head.weight.grad.to_sparse()
    with pytest.raises(TypeError, match="must be a dense"):
        optimizer.step()
    head.weight.grad = head.weight.grad.to_dense()
    optimizer.max_grad_norm = 0
    with pytest.raises(ValueError, match="max_grad_norm must be above 0"):
        optimizer.step()
    torch.testing.assert_close(everything(), before, rtol=0, atol=0)
    optimizer.max_grad_norm = max_norm
    optimizer.step()
    assert {int(entry["step"]) for entry in optimizer.state_dict()["state"].values()} == {2}


class Recorder(TorchDispatchMode):
    """The operators of a step, but for those inside our own."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen = [*getattr(self, "seen", []), str(function)]
        return function(*args, **(kwargs or {}))


def test_step_reads_nothing_back_to_the_host(model, ticket):
    """Contract 7: after the first step no value leaves the device, so that a step can be captured."""
    optimizer = MaskedAdamW(model, ticket, lr=torch.tensor(1e-3), max_grad_norm=1.0, pull=0.1)
    optimizer.found_inf, optimizer.grad_scale = torch.zeros(1), torch.ones(1)
    backward(model, 0)
    optimizer.step()
    with Recorder() as recorder:
        optimizer.step()
    assert "ltp_sparse.masked_adamw_.default" in recorder.seen
    assert not {op for op in recorder.seen if "local_scalar" in op or "nonzero" in op or "is_nonzero" in op}


# --- contract 5: bytes ---


def held(value, found=None, seen=None) -> dict[int, int]:
    """Address -> bytes of every storage reachable from a Python object."""
    found, seen = {} if found is None else found, set() if seen is None else seen
    if id(value) in seen:
        return found
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    elif isinstance(value, dict):
        for item in [*value.keys(), *value.values()]:
            held(item, found, seen)
    elif isinstance(value, list | tuple | set):
        for item in value:
            held(item, found, seen)
    elif type(value).__module__.startswith("ltp_sparse"):
        held(vars(value), found, seen)
    return found


def packed_bytes(sizes: dict[str, tuple[int, int]]) -> int:
    """Contract 5, parameter by parameter: 8 d, the index of the encoding, and a row of 64 bytes per tile."""
    total = 0
    for k, n in sizes.values():
        index = 0 if k == n else 2 * k if k <= n / 16 else 8 * -(-n // 64)
        total += 8 * k + index + 64 * -(-n // TILE) if k else 0
    return total


@pytest.mark.parametrize("pull", [0.0, 0.1], ids=["plain", "pull"])
@pytest.mark.parametrize("density", [0.01, 0.2, 0.75, 1.0], ids="d{}".format)
def test_state_bytes_are_those_of_the_formula(density, pull):
    """Contract 5: counted over every tensor the optimizer reaches; at uniform 20 % at most 1.76 bytes per parameter."""
    shapes = xlmr_shapes(layers=1, hidden=384, intermediate=1536, vocabulary=3000, positions=20)
    params = {name: nn.Parameter(t) for name, t in random_weights(shapes).items()}
    ticket = Ticket.full(shapes) if density == 1 else Ticket.random(shapes, density=density)
    optimizer = MaskedAdamW(params, ticket, pull=pull)
    formula = packed_bytes(ticket.counts("parameter")) + (4 * ticket.k if pull else 0)
    assert optimizer.state_bytes() == formula
    storages = held({**vars(optimizer)})
    for storage in held([list(params.values()), ticket]):  # these are the caller's
        storages.pop(storage, None)
    per_parameter = 8 * (4 + 11)  # steps, has_grad, group, number; coefficients
    scalars = per_parameter * len(ticket.active_names) + 8 * (7 + 1)  # hyperparameters, clip
    assert sum(storages.values()) == formula + scalars
    if density == 0.2 and not pull:
        assert sum(storages.values()) / ticket.n <= 1.76


# --- state_dict ---


OPTIONS = {
    "plain": {},
    "clip": {"max_grad_norm": 0.3},
    "pull": {"pull": 0.02},
    "everything": {"pull": 0.02, "max_grad_norm": 0.3, "weight_decay": 0.1, "maximize": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("backend", "other"), [("reference", "compiled"), ("compiled", "reference"), (None, None)])
def test_resumed_run_has_the_bits_of_the_uninterrupted_one(backend, other, options, model, ticket):
    """Also from one backend to another. The resumed run starts from the saved weights."""
    if "compiled" in (backend, other) and ls.available_backends()["compiled"] != "ok":
        pytest.skip(ls.available_backends()["compiled"])
    twin = copy.deepcopy(model)
    runs = {}
    for side, second in ((model, backend), (twin, other)):
        dense = [{"params": side.lm_head["decoder"].bias, "lr": 0.1}]
        with using(backend):
            optimizer = MaskedAdamW(side, ticket, lr=1e-2, dense=dense, **options)
            for step in range(7):
                backward(side, step, skip=[DENSE] if step % 3 == 0 else [])
                optimizer.step()
        if side is twin:
            state = saved(optimizer)
            side = copy.deepcopy(twin)
            dense = [{"params": side.lm_head["decoder"].bias, "lr": 0.1}]
            optimizer = MaskedAdamW(side, ticket, lr=1e-2, dense=dense, **options)
            optimizer.load_state_dict(state)
        with using(second):
            for step in range(7, 12):
                backward(side, step)
                optimizer.step()
        runs[second, side is model] = side, optimizer
    (a, first), (b, second) = runs.values()
    if backend == other or "max_grad_norm" not in options:  # the sum of a norm has its own order on each backend
        assert same_state(a, b)
    for p, q in zip(ls.canonical_parameters(a).values(), ls.canonical_parameters(b).values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
    assert int(first.state[ls.canonical_parameters(a)[DENSE]]["step"]) == 12 - 3


def test_state_holds_no_index_that_loading_could_cast(model, ticket):
    """Torch casts every tensor of a state to the dtype of its parameter."""
    optimizer = MaskedAdamW(model, ticket)
    table = optimizer._launches[0].table
    before = [t.clone() for t in (table.tiles, table.words, table.positions)]
    state = saved(optimizer)
    for entry in state["state"].values():
        assert {key: (value.dtype, value.numel()) for key, value in entry.items()}.keys() == {
            "step",
            "exp_avg",
            "exp_avg_sq",
        }
        assert entry["exp_avg"].dtype == entry["exp_avg_sq"].dtype == torch.float32
        assert entry["step"].dtype == torch.float64, "a float32 count would stop at 2^24"
    state["state"][0]["step"].fill_(2.0**24 + 1)
    optimizer.load_state_dict(state)
    backward(model, 0)
    optimizer.step()
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["step"].item() == 2**24 + 2
    table = optimizer._launches[0].table
    for old, new in zip(before, (table.tiles, table.words, table.positions), strict=True):
        assert old.dtype == new.dtype and torch.equal(old, new)


def test_state_is_packed_and_loading_does_not_share_memory(model, ticket):
    optimizer = MaskedAdamW(model, ticket)
    backward(model, 0)
    optimizer.step()
    state = optimizer.state_dict()
    sizes = [entry["exp_avg"].numel() for entry in state["state"].values()]
    assert sizes == [ticket.sets[name].k for name in ticket.active_names]
    other = MaskedAdamW(TiedModel(), ticket)
    other.load_state_dict(state)
    moments = state["state"][0]["exp_avg"].clone()
    backward(model, 1)
    optimizer.step()
    assert torch.equal(other.state_dict()["state"][0]["exp_avg"], moments)
    assert not torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], moments)


REFUSED = {
    "another-ticket": (lambda s: s["ltp_sparse"]["index_sets"].reverse(), "saved for another ticket"),
    "foreign": (
        lambda s: (s.pop("ltp_sparse"), [group.pop("index_sets") for group in s["param_groups"]]),
        "not saved by MaskedAdamW",
    ),
    "newer": (lambda s: s["ltp_sparse"].update(version=2), "version 2, this one reads version 1; update"),
    "moment-shape": (lambda s: s["state"][1].update(exp_avg=torch.zeros(3)), r"'exp_avg' of shape \[3\] does not fit"),
    "unknown-state": (lambda s: s["state"][1].update(momentum=torch.zeros(3)), "'momentum' is unknown"),
    "rate": (lambda s: s["param_groups"][0].update(lr=torch.tensor(float("nan"))), "lr must be at least 0, got nan"),
    "no-anchor-here": (lambda s: s["state"][0].update(anchor=s["state"][0]["exp_avg"]), "'anchor' belongs to a pull"),
    "groups": (lambda s: s["param_groups"].append(s["param_groups"][0]), "parameter groups"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_states_that_do_not_fit_are_refused_and_change_nothing(change, message, model, ticket):
    optimizer = MaskedAdamW(model, ticket, lr=1e-2)
    backward(model, 0)
    optimizer.step()
    state, before = saved(optimizer), copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry["exp_avg"].fill_(7)
    state["param_groups"][0]["lr"] = 5.0
    change(state)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)


def test_another_ticket_is_refused(model, ticket):
    state = MaskedAdamW(model, ticket).state_dict()
    moved = Ticket.from_indices({EMBEDDING: torch.tensor([3, 77, 601])}, {EMBEDDING: [40, 16]})
    other = (ticket - Ticket.full(model, [EMBEDDING])) | moved
    assert other.counts("parameter") == ticket.counts("parameter")
    with pytest.raises(ValueError, match="saved for another ticket"):
        MaskedAdamW(model, other).load_state_dict(state)


def test_a_state_of_parameters_in_another_order_is_refused(model, ticket):
    """Sets of all entries have one digest for all parameters of a size."""
    twins = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    orders = [twins[0].weight, twins[1].weight], [twins[1].weight, twins[0].weight]
    ticket = Ticket.full(twins, ["bias"])
    first, second = (
        MaskedAdamW(twins, ticket, dense=[{"params": [param]} for param in order], lr=1e-2) for order in orders
    )
    with pytest.raises(ValueError, match="'1.weight' in the place of '0.weight'.*in the order of that run"):
        first.load_state_dict(second.state_dict())
    older = second.state_dict()
    del older["ltp_sparse"]["names"]
    first.load_state_dict(older)
    renamed = MaskedAdamW({"a": twins[0].weight, "b": twins[1].weight}, Ticket.full({"a": twins[0].weight}))
    renamed.load_state_dict(MaskedAdamW(twins, Ticket.full(twins, ["0.weight"])).state_dict())


def test_old_states_without_newer_options_load(model, ticket):
    """Options that an old state lacks get their defaults."""
    optimizer = MaskedAdamW(model, ticket, lr=1e-2)
    state = saved(optimizer)
    for group in state["param_groups"]:
        del group["pull"], group["maximize"]
    optimizer.load_state_dict(state)
    backward(model, 0)
    optimizer.step()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_copies_of_model_and_optimizer_go_on_alone(copied, model, ticket):
    optimizer = MaskedAdamW(model, ticket, lr=1e-2, pull=0.01, max_grad_norm=1.0)
    for step in range(3):
        backward(model, step)
        optimizer.step()
    before = weights(model)
    twin, other = copied((model, optimizer))
    for step in range(3, 6):
        backward(twin, step)
        other.step()
    assert all(same_bits(p, before[name]) for name, p in weights(model).items())
    for step in range(3, 6):
        backward(model, step)
        optimizer.step()
    assert same_state(model, twin)
    torch.testing.assert_close(other.state_dict()["state"], optimizer.state_dict()["state"], rtol=0, atol=0)


@pytest.mark.parametrize("gradients", ["dense", "packed"])
@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_a_backward_that_needs_the_old_weights_is_refused(backend, gradients):
    """As after a step of torch's optimizers. A parameter without a gradient has not changed."""
    one, other = nn.Linear(3, 3), nn.Linear(3, 3)
    model = nn.Sequential(one, nn.Tanh(), other)
    with using(backend):
        optimizer = MaskedAdamW(model, Ticket.full(model), gradients=gradients)
        before = [param._version for param in model.parameters()]
        inner, outer = one(torch.ones(1, 3)).sum(), model(torch.ones(1, 3)).sum()
        inner.backward(retain_graph=True)
        optimizer.step()
        assert [now - old > 0 for now, old in zip((p._version for p in model.parameters()), before, strict=True)] == (
            [True, True, False, False]
        )
        outer.backward()  # of `one` it needs no weights, and `other` has not changed
        optimizer.step()
        later = model(torch.ones(1, 3)).sum()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            later.backward()
