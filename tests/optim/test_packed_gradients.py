"""Packed gradients: of a dense gradient only the active entries are kept, and nothing else changes."""

import copy
import io

import pytest
import torch
from helpers.backends import ALL_BACKENDS, BACKENDS, using
from helpers.bits import DTYPES, same_bits
from helpers.gradients import has_dense_gradient
from helpers.tied_model import TiedModel
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import ltp_sparse as ls
from ltp_sparse import MaskedAdamW, Ticket
from ltp_sparse.ops import masked_pack_
from ltp_sparse.testing import update_problem


class Untied(nn.Module):
    """An embedding that only looks up, layers, and a head outside the ticket."""

    def __init__(self, vocabulary=300, hidden=20, reentrant=False):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(2))
        self.unused = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, 5)
        self.reentrant = reentrant

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        for layer in self.layers:
            if self.reentrant:
                hidden = checkpoint(lambda h, layer=layer: torch.tanh(layer(h)), hidden, use_reentrant=True)
            else:
                hidden = torch.tanh(layer(hidden))
        if self.reentrant:  # the first layer once more: its gradient comes in two parts
            hidden = checkpoint(lambda h: torch.tanh(self.layers[0](h)), hidden, use_reentrant=True)
        return self.head(hidden.mean(1))


def batch(step, vocabulary=300):
    g = torch.Generator().manual_seed(step)
    return torch.randint(vocabulary, (6, 7), generator=g), torch.randint(5, (6,), generator=g)


def backward(model, step, scale=1.0):
    tokens, labels = batch(step)
    (scale * nn.functional.cross_entropy(model(tokens), labels)).backward()


def pair(density=0.3, *, reentrant=False, **options):
    """The same model, ticket and optimizer with dense and with packed gradients."""
    torch.manual_seed(0)
    dense = Untied(reentrant=reentrant)
    packed = copy.deepcopy(dense)
    names = ["embedding", "layers", "unused"]
    ticket = Ticket.random(dense, density=density, seed=1).restrict(names)
    made = []
    for model, gradients in ((dense, "dense"), (packed, "packed")):
        optimizer = MaskedAdamW(model, ticket, lr=1e-2, dense=model.head, gradients=gradients, **options)
        made.append((model, optimizer))
    return made


def assert_same_model(a, b):
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert same_bits(x, y), name


# --- the operation ---


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packing_copies_or_adds_the_active_entries(backend, dtype):
    shapes = {"a": (300, 250), "b": (63,), "c": (4097,), "d": (5,)}
    for density in (0.01, 0.3, 0.95, 1.0):
        problem = update_problem(shapes, density=density, dtype=dtype)
        out = torch.full((problem.table.k,), 7.0)
        grads = [None if i == 1 else grad for i, grad in enumerate(problem.grads)]
        active = [
            grad[problem.ticket.mask(name)] for name, grad in zip(problem.ticket.names, problem.grads, strict=True)
        ]
        for name, grad in zip(problem.ticket.names, problem.grads, strict=True):
            grad[~problem.ticket.mask(name)] = float("nan")
        with using(backend):
            masked_pack_(grads, out, problem.table)
            for i, (slots, values) in enumerate(zip(problem.slots(), active, strict=True)):
                assert same_bits(out[slots], torch.full_like(out[slots], 7.0) if i == 1 else values.float())
            before = out.clone()
            masked_pack_(grads, out, problem.table, accumulate=True)
        for i, (slots, values) in enumerate(zip(problem.slots(), active, strict=True)):
            assert same_bits(out[slots], before[slots] if i == 1 else before[slots] + values.float())


@pytest.mark.parametrize("mode", [{}, {"states": "8bit"}, {"master": True}, {"stochastic": True}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_update_is_that_of_dense_gradients(backend, mode):
    dtype = torch.bfloat16 if mode and "states" not in mode else torch.float32
    shapes = {"a": (300, 250), "b": (63,), "c": (4097,), "d": (5,), "e": (70_000,)}
    for density in (0.03, 0.3, 1.0):
        dense, packed = (update_problem(shapes, density=density, dtype=dtype, **mode) for _ in range(2))
        flat = torch.empty(packed.table.k)
        with using(backend):
            masked_pack_(packed.grads, flat, packed.table)
            packed.grads = flat
            for problem in (dense, packed):
                problem.step()
            arguments = dense.table, dense.coefficients
            sums = [
                ls.ops.masked_sum_squares(problem.params, problem.grads, *arguments, master=problem.master)
                for problem in (dense, packed)
            ]
        assert all(map(torch.equal, dense.tensors(), packed.tensors()))
        assert same_bits(*sums)


def test_bad_arguments():
    problem = update_problem({"a": (30, 9)}, density=0.5)
    with pytest.raises(ValueError, match="out must be torch.float32"):
        masked_pack_(problem.grads, torch.zeros(3), problem.table)
    with pytest.raises(ValueError, match=r"gradient 0 has 5 entries, its index set covers 270"):
        masked_pack_([torch.zeros(5)], torch.zeros(problem.table.k), problem.table)
    with pytest.raises(TypeError, match="gradient 0 must be a dense float32"):
        masked_pack_([problem.grads[0].double()], torch.zeros(problem.table.k), problem.table)
    with pytest.raises(ValueError, match=r"masked_pack_: out must be .* with strides \[2\]"):
        masked_pack_(problem.grads, torch.zeros(2 * problem.table.k)[::2], problem.table)
    two = update_problem({"a": (30, 9), "b": (4,)}, density=0.5)
    with pytest.raises(ValueError, match="masked_pack_: expected 2 gradients, those of the table, got 1"):
        masked_pack_(two.grads[:1], torch.zeros(two.table.k), two.table)
    with pytest.raises(TypeError, match="masked_pack_: expected gradients of one dtype, got bfloat16, float32"):
        masked_pack_([two.grads[0], two.grads[1].bfloat16()], torch.zeros(two.table.k), two.table)
    with pytest.raises(ValueError, match="packed gradients must be torch.float32"):
        ls.masked_adamw_(problem.params, torch.zeros(3), *problem.args()[2:])
    with pytest.raises(ValueError, match='gradients must be "dense" or "packed"'):
        MaskedAdamW(Untied(), Ticket.random(Untied(), density=0.5), gradients="sparse")


# --- the optimizer ---

OPTIONS = {"plain": {}, "clip": {"max_grad_norm": 0.05}, "8bit": {"states": "8bit"}, "pull": {"pull": 0.01}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_training_has_the_bits_of_dense_gradients(backend, options):
    """A row of an embedding whose token occurs several times is summed in the same order."""
    (dense, first), (packed, second) = pair(**options)
    with using(backend):
        for step in range(6):
            for model, optimizer in ((dense, first), (packed, second)):
                optimizer.zero_grad()
                backward(model, step)
                optimizer.step()
            if "max_grad_norm" in options:
                assert first.grad_norm.item() == pytest.approx(second.grad_norm.item(), rel=1e-12)
    assert_same_model(dense, packed)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_every_backend_packs(backend):
    with using(backend):
        made = pair(density=0.5)
        for model, optimizer in made:
            backward(model, 0)
            optimizer.step()
    assert_same_model(made[0][0], made[1][0])


@pytest.mark.parametrize("zero_grad", [True, False])
def test_micro_batches_accumulate_until_a_step_consumes_them(zero_grad):
    (dense, first), (packed, second) = pair()
    for step in range(4):
        first.zero_grad()
        if zero_grad:
            second.zero_grad()
        packed.head.zero_grad()
        for model in (dense, packed):
            for part in range(3):
                backward(model, 3 * step + part, scale=1 / 3)
        assert not any(has_dense_gradient(p) for name, p in packed.named_parameters() if not name.startswith("head"))
        first.step()
        second.step()
    for (name, x), y in zip(dense.named_parameters(), packed.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, msg=name)  # float32 sums in another order


def test_gradients_are_freed_as_backward_makes_them():
    """No parameter shows a dense one, and none of the embedding's size is made at all."""
    _, (packed, optimizer) = pair()
    alive, seen = [], []
    for name, param in packed.named_parameters():
        if not name.startswith("head"):

            def look(param, name=name):
                others = (p for n, p in packed.named_parameters() if not n.startswith("head"))
                alive.append(sum(map(has_dense_gradient, others)))

            param.register_post_accumulate_grad_hook(look)  # runs after ours
    packed.embedding.weight.register_hook(lambda grad: seen.append((grad.is_sparse, grad._nnz())))
    backward(packed, 0)
    assert alive and set(alive) == {0}
    assert seen == [(True, 6 * 7)]
    held = [p for group in optimizer.param_groups[:1] for p in group["params"]]
    assert [p.grad is not None for p in held].count(False) == 2, "the unused layer's weight and bias have none"
    assert all(p.grad.dtype == p.dtype and p.grad.shape == p.shape for p in held if p.grad is not None)


def test_dense_gradients_that_wait_are_bounded():
    """Small ones wait for each other, up to 256 KiB; none does after backward, nor of what a larger tensor holds."""
    model = nn.ParameterList(nn.Parameter(torch.ones(64, 64)) for _ in range(60))  # 16 KiB each
    optimizer = MaskedAdamW(model, Ticket.random(model, density=0.3), gradients="packed")
    alive, most = [], 0

    def look(param):
        nonlocal most
        most = max(most, sum(reference() is not None for reference in alive))

    for param in model:
        param.register_hook(lambda grad: alive.append(StorageWeakReference(grad)))
        param.register_post_accumulate_grad_hook(look)
    for _ in range(2):
        sum((p * p).sum() for p in model).backward()
    assert 8 <= most <= 17
    assert not any(reference() for reference in alive)
    optimizer.step()


class StorageWeakReference:
    """Of the memory of a gradient, which several tensor objects may share."""

    def __init__(self, tensor):
        self.reference = StorageWeakRef(tensor.untyped_storage())

    def __call__(self):
        return None if self.reference.expired() else self


@pytest.mark.parametrize("cleared", [False, True])
def test_a_backward_that_fails_loses_and_leaves_nothing(cleared):
    """What it has made is seen like any gradient; after zero_grad, only what the next backward makes."""
    (dense, first), (packed, second) = pair()
    for model, optimizer in ((dense, first), (packed, second)):

        def fail(grad):
            raise RuntimeError("out of memory")

        handle = model.layers[0].weight.register_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            backward(model, 0)
        handle.remove()
        if cleared:
            optimizer.zero_grad()
            model.layers[1].requires_grad_(False)
            backward(model, 1)
            model.layers[1].requires_grad_(True)
            assert model.layers[1].weight.grad is None
        optimizer.step()
    assert_same_model(dense, packed)


def test_gradients_are_read_inside_backward_and_added_with_retain_graph():
    (dense, first), (packed, second) = pair()
    seen = {}
    for model in (dense, packed):
        for name, param in model.named_parameters():
            param.register_post_accumulate_grad_hook(
                lambda p, name=name, model=model: seen.setdefault((model is packed, name), []).append(p.grad.sum())
            )
        tokens, labels = batch(0)
        loss = nn.functional.cross_entropy(model(tokens), labels)
        loss.backward(retain_graph=True)
        loss.backward()
    masks = Ticket.random(dense, density=0.3, seed=1)
    assert {name for is_packed, name in seen if is_packed} == {name for is_packed, name in seen if not is_packed}
    for name, _ in packed.named_parameters():
        if (True, name) in seen and not name.startswith("head"):
            once, twice = seen[True, name]
            torch.testing.assert_close(twice, 2 * once, rtol=1e-5, atol=1e-7)
            wanted = (dense.get_parameter(name).grad.to_dense() * masks.mask(name)).sum()
            torch.testing.assert_close(twice, wanted, rtol=1e-4, atol=1e-6)
    first.step()
    second.step()
    assert_same_model(dense, packed)


def test_a_gradient_that_autograd_shares_is_not_kept():
    """A further gradient goes to the parameter and to a function that writes into what it gets."""

    class Overwrites(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad.mul_(0)

    model = nn.ParameterList(nn.Parameter(torch.ones(6, 5)) for _ in range(2))
    optimizer = MaskedAdamW(model, Ticket.full(model), gradients="packed")
    x = torch.ones(6, 5, requires_grad=True)
    for _ in range(2):
        ((Overwrites.apply(x) + model[0]) * torch.arange(30.0).view(6, 5) + model[1]).sum().backward()
    assert torch.equal(model[0].grad.dense(), 2 * torch.arange(30.0).view(6, 5))
    optimizer.step()


def test_tied_embedding_is_counted_once():
    torch.manual_seed(0)
    dense = TiedModel()
    packed = copy.deepcopy(dense)
    ticket = Ticket.random(dense, density=0.4, seed=1)
    for model, gradients in ((dense, "dense"), (packed, "packed")):
        optimizer = MaskedAdamW(model, ticket, lr=1e-2, gradients=gradients, max_grad_norm=0.1)
        for step in range(4):
            tokens = torch.randint(40, (4, 6), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
            optimizer.step()
    for x, y in zip(dense.parameters(), packed.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_reentrant_checkpointing_fires_hooks_twice():
    (dense, first), (packed, second) = pair(reentrant=True)
    for step in range(3):
        for model, optimizer in ((dense, first), (packed, second)):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
    for (name, x), y in zip(dense.named_parameters(), packed.named_parameters(), strict=True):
        torch.testing.assert_close(x, y[1] if isinstance(y, tuple) else y, rtol=1e-5, atol=1e-6, msg=str(name))


def test_a_skipped_step_consumes_the_gradients():
    """A GradScaler that meets an infinity; the buffers after it, and the steps that follow."""
    (dense, first), (packed, second) = pair(max_grad_norm=0.1)
    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0) for _ in range(2)]
    for step in range(5):
        for model, optimizer, scaler in ((dense, first, scalers[0]), (packed, second, scalers[1])):
            optimizer.zero_grad()
            tokens, labels = batch(step)
            loss = scaler.scale(nn.functional.cross_entropy(model(tokens), labels))
            if step == 2:
                loss = loss * float("inf")
            loss.backward()
            scaler.step(optimizer)
            scaler.update()
        assert not any(second._launches[0].present())
    assert [scaler.get_scale() for scaler in scalers] == [32.0, 32.0]
    assert {int(state["step"]) for state in second.state.values()} == {0, 4}  # 0: the unused layer
    assert_same_model(dense, packed)


def test_the_norm_leaves_out_what_an_earlier_step_left():
    """A part of the model without a gradient: its slots hold the last one, which no longer counts."""
    model = nn.ModuleDict({"a": nn.Linear(6, 5), "b": nn.Linear(6, 5)})
    optimizer = MaskedAdamW(model, Ticket.full(model), max_grad_norm=1.0, gradients="packed")
    x = torch.randn(3, 6)
    (100 * (model["a"](x) + model["b"](x))).sum().backward()
    optimizer.step()
    before = model["a"].weight.detach().clone()
    model["b"](x).sum().backward()
    optimizer.step()
    wanted = (5 * x.sum(0).square().sum() + 5 * 3**2).sqrt()
    assert optimizer.grad_norm.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert torch.equal(model["a"].weight, before)


def test_unscaling_and_schedulers_see_ordinary_gradients():
    (_, _), (packed, optimizer) = pair()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    tokens, labels = batch(0)
    scaler.scale(nn.functional.cross_entropy(packed(tokens), labels)).backward()
    carriers = [p for p in optimizer.param_groups[0]["params"] if p.grad is not None]
    before = [p.grad.clone() for p in carriers]
    scaler.unscale_(optimizer)
    assert all(torch.equal(p.grad, old / 8) for p, old in zip(carriers, before, strict=True))
    norm = torch.nn.utils.clip_grad_norm_(carriers, 1e-3)
    after = torch.nn.utils.get_total_norm([p.grad for p in carriers])
    assert norm > 1e-3 and after.item() == pytest.approx(1e-3, rel=1e-3)
    scaler.step(optimizer)
    scaler.update()
    schedule.step()


def test_states_move_between_gradient_modes():
    (dense, first), (packed, second) = pair()
    for model, optimizer in ((dense, first), (packed, second)):
        backward(model, 0)
        optimizer.step()
    first.load_state_dict(second.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for model, optimizer in ((dense, first), (packed, second)):
        optimizer.zero_grad()
        backward(model, 1)
        optimizer.step()
    assert_same_model(dense, packed)


def test_a_closure_and_evaluation_in_between():
    (dense, first), (packed, second) = pair()

    def closure(model, optimizer):
        def run():
            optimizer.zero_grad()
            backward(model, 0)
            with torch.no_grad():
                model(batch(9)[0])
            return torch.tensor(1.0)

        return run

    for model, optimizer in ((dense, first), (packed, second)):
        optimizer.step(closure(model, optimizer))
    assert_same_model(dense, packed)


def test_remove_undoes_everything():
    torch.manual_seed(0)
    model = Untied()
    optimizer = MaskedAdamW(model, Ticket.random(model, density=0.3), gradients="packed")
    assert model.embedding.sparse
    optimizer.remove()
    with pytest.raises(RuntimeError, match="has taken the hooks"):
        optimizer.step()
    backward(model, 0)
    assert not model.embedding.sparse and model.embedding.weight.grad.layout == torch.strided
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("unused"))
    assert not model._ddp_params_and_buffers_to_ignore and not model._forward_pre_hooks


def test_frozen_parameters_get_no_gradient_and_end_backward():
    """Below the lowest active entry nothing is propagated."""
    torch.manual_seed(0)
    model = Untied()
    ticket = Ticket.random(model, density=0.3, seed=1).restrict(["layers.1"])
    optimizer = MaskedAdamW(model, ticket, gradients="packed", freeze=True)
    reached = []
    model.layers[0].register_full_backward_hook(lambda *_: reached.append(0))
    backward(model, 0)
    optimizer.step()
    assert not reached and not any(map(has_dense_gradient, model.parameters()))
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("layers.1"))


def test_what_cannot_be_is_refused():
    (_, _), (packed, optimizer) = pair()
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(optimizer)
    with pytest.raises(ValueError, match="keeps to the parameters and devices of its construction"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == 2
    ticket = Ticket.random(packed, density=0.3)
    with pytest.raises(ValueError, match="needs the module"):
        MaskedAdamW(dict(packed.named_parameters()), ticket, gradients="packed")


def test_bytes_held_are_those_of_the_active_entries():
    (dense, first), (_, second) = pair()
    n = dense.embedding.weight.numel()
    ticket_k = sum(launch.table.k for launch in second._launches if launch.packed is not None)
    rows = n // 20 * (4 + 8)  # a word of bitmap for 20 columns, and the first slot, of each row of the embedding
    assert second.state_bytes() == first.state_bytes() + rows
    buffers = [launch.packed.buffer for launch in second._launches if launch.packed is not None]
    assert sum(buffer.nbytes for buffer in buffers) == 4 * ticket_k


@pytest.mark.parametrize("gradients", ["dense", "packed"])
def test_resuming_in_the_middle_of_an_accumulation(gradients, tmp_path):
    """Model, optimizer and what two of three micro-batches have given go through a file; the bits go on."""

    def build():
        torch.manual_seed(0)
        model = Untied()
        ticket = Ticket.random(model, density=0.3, seed=1).restrict(["embedding", "layers", "unused"])
        return model, MaskedAdamW(model, ticket, lr=1e-2, dense=model.head, gradients=gradients, max_grad_norm=0.1)

    def train(model, optimizer, micro_batches):
        for number in micro_batches:
            backward(model, number)
            if number % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()

    whole, optimizer = build()
    train(whole, optimizer, range(12))
    first, optimizer = build()
    train(first, optimizer, range(8))
    torch.save((first.state_dict(), optimizer.state_dict(include_gradients=True)), tmp_path / "saved.pt")
    train(first, optimizer, range(8, 9))  # what was saved is a copy
    weights, state = torch.load(tmp_path / "saved.pt")
    second, optimizer = build()
    second.load_state_dict(weights)
    optimizer.load_state_dict(state)
    train(second, optimizer, range(8, 12))
    for (name, p), q in zip(second.named_parameters(), whole.parameters(), strict=True):
        assert same_bits(p, q), name


def test_gradients_of_the_other_kind_are_refused():
    (_, first), (packed, second) = pair()
    backward(packed, 0)
    saved = second.state_dict(include_gradients=True)
    before = first.state_dict()
    with pytest.raises(ValueError, match="the saved gradients were packed and those of this optimizer are dense"):
        first.load_state_dict(saved)
    after = first.state_dict()
    assert str(after["param_groups"]) == str(before["param_groups"])
    first.load_state_dict(second.state_dict())  # without gradients the two kinds are interchangeable


# --- one packer per gradient ---

PACKERS = {
    "optimizer": lambda model, ticket: MaskedAdamW(model, ticket, gradients="packed"),
    "parameters": ls.PackedParameters,
}


@pytest.mark.parametrize("second", PACKERS)
@pytest.mark.parametrize("first", PACKERS)
def test_a_second_packer_of_a_gradient_is_refused_until_the_first_is_removed(first, second):
    model = Untied()
    whole = Ticket.random(model, density=0.3, seed=1)
    earlier = PACKERS[first](model, whole.restrict(["embedding", "layers.0"]))
    hooks = dict(model._forward_pre_hooks)
    with pytest.raises(ValueError, match=r"packs the gradient of 'layers.0.bias'; call its remove\(\) first"):
        PACKERS[second](model, whole.restrict(["layers"]))
    assert model._forward_pre_hooks == hooks
    other = PACKERS[second](model, whole.restrict(["layers.1"]))  # another gradient
    other.remove()
    PACKERS[second](copy.deepcopy(model), whole.restrict(["layers"])).remove()  # a copy has gradients of its own
    earlier.remove()
    later = PACKERS[second](model, whole.restrict(["layers"]))
    backward(model, 0)
    assert not has_dense_gradient(model.layers[0].weight) and has_dense_gradient(model.embedding.weight)
    later.remove()
    assert model.layers[0].weight.grad is None


def test_removing_one_packer_leaves_the_others():
    """Also when it is removed once more, after another has taken its place."""
    model = Untied()
    whole = Ticket.random(model, density=0.3, seed=1)
    first = MaskedAdamW(model, whole.restrict(["embedding"]), gradients="packed")
    second = MaskedAdamW(model, whole.restrict(["layers"]), gradients="packed")
    layers = [name for name, _ in model.named_parameters() if name.startswith("layers")]
    first.remove()
    assert model._ddp_params_and_buffers_to_ignore == layers and not model.embedding.sparse
    third = MaskedAdamW(model, whole.restrict(["embedding"]), gradients="packed")
    first.remove()
    assert model._ddp_params_and_buffers_to_ignore == [*layers, "embedding.weight"] and model.embedding.sparse
    with pytest.raises(ValueError, match="packs the gradient of 'embedding.weight'"):
        ls.PackedParameters(model, whole.restrict(["embedding"]))
    backward(model, 0)
    assert not any(map(has_dense_gradient, (model.embedding.weight, model.layers[0].weight)))
    second.remove()
    third.remove()
    assert not model._ddp_params_and_buffers_to_ignore and not model._forward_pre_hooks


@pytest.mark.parametrize("packer", PACKERS)
def test_a_copy_has_gradients_of_its_own(packer):
    """And none of the buffers; a packer of its own leaves nothing behind."""
    model = Untied()
    ticket = Ticket.random(model, density=0.3, seed=1)
    made = PACKERS[packer](model, ticket)
    twin = copy.deepcopy(model)
    backward(twin, 0)
    assert twin.layers[0].weight.grad is not None and twin.embedding.weight.grad is not None
    assert model.layers[0].weight.grad is None
    members = made.param_groups[0]["params"] if packer == "optimizer" else list(made.parameters())
    assert all(member.grad is None for member in members)
    twin.zero_grad()
    PACKERS[packer](twin, ticket).remove()
    assert not twin._ddp_params_and_buffers_to_ignore and not twin.embedding.sparse and model.embedding.sparse
    backward(twin, 0)
    assert twin.embedding.weight.grad.layout == torch.strided
    made.remove()


def through_a_file(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("copied", [copy.deepcopy, through_a_file], ids=["deepcopy", "file"])
@pytest.mark.parametrize("part", ["model", "part", "embedding"])
def test_a_copy_is_dense_again(part, copied, packer):
    """Other optimizers train it, whole or a part of it: Adam takes no sparse gradients."""
    model = nn.Sequential(nn.Sequential(nn.Embedding(300, 20)), nn.Linear(20, 5)) if part != "embedding" else None
    model = model or nn.Embedding(300, 20)
    made = PACKERS[packer](model, Ticket.random(model, density=0.3, seed=1))
    twin = copied(model[0] if part == "part" else model)
    optimizer = torch.optim.Adam(twin.parameters())
    twin(batch(0)[0]).sum().backward()
    assert all(p.grad.layout == torch.strided for p in twin.parameters())
    optimizer.step()
    own = PACKERS[packer](twin, Ticket.random(twin, density=0.3, seed=2))  # and may be packed itself
    embeddings = [[m for m in of.modules() if isinstance(m, nn.Embedding)][0] for of in (model, twin)]
    twin(batch(0)[0]).sum().backward()
    assert all(embedding.sparse for embedding in embeddings)
    for one in (own, made):
        one.remove()
    assert not any(embedding.sparse for embedding in embeddings)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("packer", PACKERS)
def test_a_parameter_without_gradient_is_refused(packer):
    model = Untied()
    ticket = Ticket.random(model, density=0.3, seed=1)
    model.layers[1].weight.requires_grad_(False)
    with pytest.raises(
        ValueError,
        match=r"'layers.1.weight' of the ticket has requires_grad=False; call its requires_grad_\(\), or restrict",
    ):
        PACKERS[packer](model, ticket)
    assert not model._forward_pre_hooks and not model.embedding.sparse
    PACKERS[packer](model, ticket.restrict(["embedding", "layers.0"])).remove()


@pytest.mark.parametrize("gradients", ["dense", "packed"])
def test_a_parameter_of_ticket_and_dense_is_refused(gradients):
    model = Untied()
    with pytest.raises(ValueError, match="both in the ticket and in dense|more than one parameter group"):
        MaskedAdamW(model, Ticket.random(model, density=0.3), dense=model.head.parameters(), gradients=gradients)
    assert not model._forward_pre_hooks


# --- gradients of embedding rows ---


@pytest.mark.parametrize("own_sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("density", [0.02, 0.5, 1.0])
def test_rows_are_packed_whatever_their_width(columns, density, own_sparse):
    """A row that starts inside a word of the bitmap, tokens that occur many times, an embedding that was sparse before.

    The sums of a row are taken in the order of the batch.
    """
    model = nn.Embedding(700, columns, sparse=own_sparse)  # more rows than are packed at a time, in one batch
    ticket = Ticket.random(model, density=density, seed=1)
    packed = ls.PackedParameters(model, ticket)
    ids = torch.cat([torch.arange(600), torch.randint(700, (900,)), torch.full((50,), 3)])[torch.randperm(1550)]
    weight = torch.randn(len(ids), columns)
    dense = torch.zeros(700, columns)
    for row, value in zip(ids.tolist(), weight, strict=True):
        dense[row] += value
    for times in (1, 2):  # the second micro-batch adds
        (model(ids) * weight).sum().backward()
        (grad,) = (p.grad for p in packed.parameters())
        wanted = dense if times == 1 else _added_in_order(dense, ids, weight)
        assert same_bits(grad, wanted[ticket.mask("weight")])
    packed.remove()
    assert model.sparse == own_sparse


def _added_in_order(total, ids, values):
    total = total.clone()
    for row, value in zip(ids.tolist(), values, strict=True):
        total[row] += value
    return total


def test_a_batch_without_rows():
    """The gradient of nothing but padding tokens holds no row."""
    model = nn.Embedding(50, 20, padding_idx=1)
    packed = ls.PackedParameters(model, Ticket.random(model, density=0.3))
    model(torch.ones(4, 3, dtype=torch.long)).sum().backward()
    assert all(not p.grad.any() for p in packed.parameters())
    model(torch.empty(0, 3, dtype=torch.long)).sum().backward()
    assert all(not p.grad.any() for p in packed.parameters())


class OneOfTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x, second):
        return (self.b if second else self.a)(x)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_a_norm_counts_no_pull_of_parameters_without_a_gradient(backend):
    torch.manual_seed(0)
    base, x = OneOfTwo(), torch.randn(4, 6)
    found = []
    for gradients in ("dense", "packed"):
        model = copy.deepcopy(base)
        with using(backend):
            optimizer = MaskedAdamW(
                model, Ticket.full(model), lr=0.1, pull=0.01, max_grad_norm=0.05, gradients=gradients
            )
            for second in (False, True, True):
                (model(x, second) * 1e-3).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        found.append((optimizer.grad_norm, *model.parameters()))
    assert all(map(same_bits, *found))


@pytest.mark.parametrize("then", ["state", "forward"])
def test_a_view_that_is_put_back_is_a_gradient(then):
    torch.manual_seed(0)
    base, x = nn.Linear(6, 8), torch.randn(4, 6)
    found = []
    for gradients in ("dense", "packed"):
        model = copy.deepcopy(base)
        optimizer = MaskedAdamW(model, Ticket.full(model), lr=0.1, gradients=gradients)
        model(x).square().sum().backward()
        kept = [param.grad for param in model.parameters()]
        if then == "forward":
            optimizer.step()
        model.zero_grad()
        optimizer.state_dict()
        model(x)
        for param, grad in zip(model.parameters(), kept, strict=True):
            param.grad = grad
        optimizer.step()
        found.append(tuple(model.parameters()))
    assert all(map(same_bits, *found))
