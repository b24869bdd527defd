"""What frameworks see and change when they reach the gradients of the model: clipping, norms, checks for NaN."""

import copy
import io
import warnings

import pytest
import torch
from helpers.gradients import has_dense_gradient
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm

import ltp_sparse as ls
from ltp_sparse import MaskedAdamW, Ticket
from ltp_sparse.optim import NoGradients
from ltp_sparse.optim.gradient_view import GradientView

LIMIT = 0.05


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 8)
        self.mix = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        return self.head(self.scale * torch.tanh(self.mix(self.embedding(ids))).mean(1))


def build(dtype=torch.float32):
    torch.manual_seed(3)
    return Net().to(dtype)


def ticket_of(model):
    return Ticket.random(model, density=0.3, seed=1).restrict(["embedding", "mix", "scale"]) | Ticket.full(
        model
    ).restrict(["scale"])


def loss_of(model, step, scale=30.0):
    g = torch.Generator().manual_seed(step)
    ids, labels = torch.randint(40, (6, 5), generator=g), torch.randint(3, (6,), generator=g)
    return scale * nn.functional.cross_entropy(model(ids).float(), labels)


class Packed:
    """A model that trains with packed gradients, its optimizer, and its twin with dense ones under a mask."""

    def __init__(self, kind, dtype=torch.float32):
        self.model = build(dtype)
        self.twin = copy.deepcopy(self.model)
        ticket = ticket_of(self.model)
        self.masks = {name: ticket.mask(name) for name in ticket.names}
        if kind == "optimizer":
            options = {"lr": 1e-2, "weight_decay": 0, "gradients": "packed"}
            self.optimizer = MaskedAdamW(self.model, ticket, dense=self.model.head, **options)
        else:
            packed = ls.PackedParameters(self.model, ticket, dense=self.model.head)
            self.optimizer = packed.attach(torch.optim.AdamW(packed.parameters(), lr=1e-2, weight_decay=0))

    def backward(self, step):
        loss_of(self.model, step).backward()
        loss_of(self.twin, step).backward()
        for name, p in self.twin.named_parameters():
            if name in self.masks:
                p.grad.mul_(self.masks[name])

    def assert_same_gradients(self, **tolerance):
        for (name, p), q in zip(self.model.named_parameters(), self.twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad.clone().dense() if hasattr(p.grad, "dense") else p.grad, q.grad,
                                       msg=name, **tolerance)  # fmt: skip


KINDS = ["optimizer", "parameters"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_parameter_is_its_packed_one(kind):
    run = Packed(kind)
    for step in range(3):
        run.backward(step)
        run.backward(step + 10)  # a further micro-batch
        assert isinstance(run.model.mix.weight.grad, GradientView)
        assert not has_dense_gradient(run.model.mix.weight) and not has_dense_gradient(run.model.embedding.weight)
        run.assert_same_gradients(rtol=1e-5, atol=1e-6)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.model.zero_grad()
        run.twin.load_state_dict(run.model.state_dict())
        run.twin.zero_grad()
    assert all(not torch.equal(p, q) for p, q in zip(run.model.parameters(), build().parameters(), strict=True))


READS = {
    "norm": lambda g: g.norm(),
    "norm-data": lambda g: g.data.norm(2),
    "norm-inf": lambda g: torch.linalg.vector_norm(g, float("inf")),
    "norm-1": lambda g: torch.linalg.vector_norm(g, 1),
    "norm-rows": lambda g: g.norm(dim=-1),
    "sum-of-squares": lambda g: g.detach().pow(2).sum(),
    "max": lambda g: g.abs().max(),
    "min": lambda g: g.min(),
    "mean": lambda g: g.mean(),
    "std": lambda g: g.std(),
    "any-nan": lambda g: torch.isnan(g).any(),
    "all-finite": lambda g: torch.isfinite(g).all(),
    "all-zero": lambda g: (g == 0).all(),
    "share-of-zeros": lambda g: (g == 0).float().mean(),
    "flat": lambda g: g.view(-1).norm(),
    "reshape": lambda g: g.reshape(-1),
    "stack": lambda g: torch.stack([g.double(), g.double()]).sum(),
    "float": lambda g: g.float().square().sum(),
    "numpy": lambda g: torch.from_numpy(g.cpu().float().numpy().copy()),
    "list": lambda g: torch.tensor(g.tolist()),
    "clone": lambda g: g.clone(),
    "copy": lambda g: copy.deepcopy(g),
    "arithmetic": lambda g: 2 * g + 1 - g,
    "sum-of-shifted": lambda g: (g + 1).sum(),
    "matmul": lambda g: g.reshape(1, -1) @ g.reshape(-1, 1),
    "histogram": lambda g: torch.histc(g.float(), 7, -1.0, 1.0),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_reading_gives_what_the_dense_gradient_gives(read):
    run = Packed("optimizer")
    run.backward(0)
    for (name, p), q in zip(run.model.named_parameters(), run.twin.parameters(), strict=True):
        if read is READS["norm-rows"] and not q.dim() or (read is READS["std"] and q.numel() == 1):
            continue
        found, wanted = read(p.grad), read(q.grad)
        found = found.dense() if hasattr(found, "dense") else found
        assert found.shape == wanted.shape and found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, msg=name)


WRITES = {
    "mul": lambda g: g.mul_(0.5),
    "operator": lambda g: g.__imul__(0.25),
    "div": lambda g: g.div_(3.0),
    "clamp": lambda g: g.clamp_(-0.01, 0.01),
    "zero": lambda g: g.zero_(),
    "sign": lambda g: g.sign_(),
    "nan_to_num": lambda g: torch.nan_to_num_(g),
    "through-a-view": lambda g: g.view(-1).mul_(0.5),
    "through-data": lambda g: g.data.mul_(0.5),
    "noise": lambda g: g.add_(torch.full_like(g.clone().dense() if hasattr(g, "dense") else g, 0.125)),
    "copy": lambda g: g.copy_(torch.full(g.shape, 0.5)),
    "addcmul": lambda g: g.addcmul_(torch.ones(g.shape), torch.full(g.shape, 0.5)),
    "masked": lambda g: g.masked_fill_(torch.ones(g.shape, dtype=torch.bool), 0.75),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writing_reaches_what_the_step_uses(write, kind):
    run = Packed(kind)
    run.backward(0)
    with torch.no_grad():
        for model in (run.model, run.twin):
            for p in model.parameters():
                write(p.grad)
        for name, p in run.twin.named_parameters():
            if name in run.masks:
                p.grad.mul_(run.masks[name])
    run.assert_same_gradients(rtol=1e-5, atol=1e-6)


REPLACES = {
    "product": lambda p: setattr(p, "grad", p.grad * 0.5),
    "dense": lambda p: setattr(p, "grad", torch.full_like(p, 0.5)),
    "detached": lambda p: setattr(p, "grad", p.grad.detach()),
    "none": lambda p: setattr(p, "grad", None),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("replace", REPLACES.values(), ids=REPLACES)
@pytest.mark.filterwarnings("ignore::ltp_sparse.optim.NoGradients")
def test_what_is_put_in_its_place_counts(replace, kind):
    """SGD on the twin shows what the step has used."""
    run = Packed(kind)
    run.backward(0)
    before = [p.detach().clone() for p in run.model.parameters()]
    for model in (run.model, run.twin):
        for p in model.parameters():
            replace(p)
    run.optimizer.step()
    for (name, p), q, old in zip(run.model.named_parameters(), run.twin.parameters(), before, strict=True):
        mask = run.masks.get(name, torch.ones_like(p, dtype=torch.bool))
        expected = torch.zeros_like(mask) if q.grad is None else mask & (q.grad != 0)
        assert torch.equal(p != old, expected), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_somebody_holds_keeps_its_values(kind):
    """As loops over several losses do: the first gradient is kept, and put back after the second."""
    run = Packed(kind)
    run.backward(0)
    held = [p.grad for p in run.model.parameters()]
    aliases = [p.grad.detach() for p in run.model.parameters()]
    first = [
        torch.clone(p.grad.dense() if isinstance(p.grad, GradientView) else p.grad) for p in run.model.parameters()
    ]
    run.model.zero_grad()
    run.twin.zero_grad()
    run.backward(1)
    run.assert_same_gradients(rtol=1e-6, atol=1e-7)
    for grad, alias, before in zip(held, aliases, first, strict=True):
        assert torch.equal(grad, before) and torch.equal(alias, before)
    for p, grad in zip(run.model.parameters(), held, strict=True):
        p.grad = grad
    old = [p.detach().clone() for p in run.model.parameters()]
    run.optimizer.step()
    for p, before, grad in zip(run.model.parameters(), old, first, strict=True):
        moved = (p.detach() - before) * grad
        assert bool((moved <= 0).all()) and bool((moved < 0).any())  # against the first gradient, not the second


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_set_as_data_are_used(kind):
    run = Packed(kind)
    run.backward(0)
    grads = [p.grad for p in run.model.parameters()]
    torch.nn.utils.vector_to_parameters(torch.zeros(sum(g.numel() for g in grads)), grads)
    old = [p.detach().clone() for p in run.model.parameters()]
    run.optimizer.step()
    assert all(torch.equal(p, before) for p, before in zip(run.model.parameters(), old, strict=True))


def test_a_model_that_clears_its_gradients_drops_them():
    """As a loop that meets a NaN does: `model.zero_grad(); continue`."""
    run = Packed("optimizer")
    (loss_of(run.model, 0) * float("nan")).backward()
    assert any(torch.isnan(p.grad).any() for p in run.model.parameters())
    run.model.zero_grad()
    run.backward(1)
    run.assert_same_gradients(rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_clipping_the_model_by_norm_and_value(kind, foreach):
    run = Packed(kind)
    run.backward(0)
    wanted, found = (clip_grad_norm_(m.parameters(), LIMIT, foreach=foreach) for m in (run.twin, run.model))
    assert wanted > 10 * LIMIT
    torch.testing.assert_close(found, wanted)
    run.assert_same_gradients()
    assert get_total_norm([p.grad for p in run.model.parameters()]).item() == pytest.approx(LIMIT, rel=1e-3)
    for model in (run.twin, run.model):
        clip_grad_value_(model.parameters(), 1e-3, foreach=foreach)
    run.assert_same_gradients()


def test_the_norm_of_bfloat16_gradients_is_that_of_the_float32_ones():
    run = Packed("optimizer", torch.bfloat16)
    run.backward(0)
    packed = torch.cat(
        [run.optimizer._launches[0].packed.buffer, *(p.grad.flatten() for p in run.model.head.parameters())]
    )
    assert clip_grad_norm_(run.model.parameters(), 1e9).item() == pytest.approx(packed.norm().item(), rel=1e-2)


@pytest.mark.parametrize("gradients", ["dense", "packed"])
@pytest.mark.parametrize("pull", [0.0, 1e-2])
def test_the_optimizers_own_clipping_is_that_of_max_grad_norm(gradients, pull):
    made = []
    for limit in (LIMIT, None):
        model = build()
        options = {"lr": 1e-2, "pull": pull, "max_grad_norm": limit, "dense": model.head, "gradients": gradients}
        made.append((model, MaskedAdamW(model, ticket_of(model), **options)))
    (inside, first), (outside, second) = made
    for step in range(4):
        for model, optimizer in made:
            loss_of(model, step).backward()
            if optimizer is second:
                norm = second.clip_grad_norm_(LIMIT)
                assert norm > LIMIT
                assert second.clip_grad_norm_(float("inf")).item() == pytest.approx(LIMIT, rel=1e-3)
            optimizer.step()
            optimizer.zero_grad()
        assert norm.item() == pytest.approx(first.grad_norm.item(), rel=1e-6)
    for p, q in zip(inside.parameters(), outside.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="max_norm must be above 0"):
        second.clip_grad_norm_(0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_stays_to_be_read_until_the_next_pass(kind):
    run = Packed(kind)
    run.backward(0)
    norm = run.model.mix.weight.grad.norm()
    run.optimizer.step()
    assert torch.equal(run.model.mix.weight.grad.norm(), norm)  # a logger after the step
    run.optimizer.zero_grad()
    run.model.embedding.weight.sum().backward()
    run.model(torch.zeros(1, 1, dtype=torch.long))
    assert run.model.mix.weight.grad is None and run.model.embedding.weight.grad.norm() > 0


def test_what_would_not_reach_the_gradient_is_refused():
    run = Packed("optimizer")
    run.backward(0)
    grad = run.model.mix.weight.grad
    for read in (lambda: grad[0], lambda: grad.t(), lambda: grad.split(2)):
        with pytest.raises(RuntimeError, match=r"would not change the packed gradient.*p.grad.clone\(\)"):
            read()
    assert torch.equal(grad.dense()[0], run.twin.mix.weight.grad[0])


def test_models_with_gradients_can_be_copied_and_saved():
    run = Packed("optimizer")
    run.backward(0)
    twin = copy.deepcopy(run.model)
    assert all(p.grad is None for p in twin.parameters()) and not isinstance(run.model.mix.weight.grad, torch.nn.Module)
    file = io.BytesIO()
    torch.save((run.model, [p.grad for p in run.model.parameters()]), file)
    file.seek(0)
    model, grads = torch.load(file, weights_only=False)
    for p, q, grad in zip(run.twin.parameters(), model.parameters(), grads, strict=True):
        assert torch.equal(p, q) and torch.equal(p.grad, grad) and type(grad) is torch.Tensor
    assert "GradientView(" in repr(run.model.mix.weight.grad)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_compile_anew_between_micro_batches(backend):
    run = Packed("optimizer")
    compiled = torch.compile(run.model, backend=backend)
    for size in (2, 3, 5):
        ids = torch.arange(size * 4).view(size, 4)
        compiled(ids).sum().backward()
        run.twin(ids).sum().backward()
    for name, p in run.twin.named_parameters():
        if name in run.masks:
            p.grad.mul_(run.masks[name])
    run.assert_same_gradients(rtol=1e-5, atol=1e-6)


def test_gradients_of_gradients_are_packed_too():
    """`create_graph=True` adds out of place: the sum replaces what there was."""
    run = Packed("optimizer")
    for model in (run.model, run.twin):
        for step in (0, 1):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loss_of(model, step).backward(create_graph=True)
    for name, p in run.twin.named_parameters():
        p.grad = p.grad.detach() * run.masks.get(name, 1)
    for p in run.model.head.parameters():
        p.grad = p.grad.detach()
    run.assert_same_gradients(rtol=1e-5, atol=1e-6)


# --- frameworks ---


@pytest.mark.parametrize("gradients", ["dense", "packed", "parameters"])
def test_the_plain_trainer_logs_the_norm_and_clips(gradients, tmp_path):
    transformers = pytest.importorskip("transformers")

    class Loss(Net):
        def forward(self, ids, labels=None):
            logits = super().forward(ids)
            return {"loss": 1e4 * nn.functional.cross_entropy(logits, labels), "logits": logits}

    torch.manual_seed(0)
    model = Loss()
    ticket = Ticket.full(model).restrict(["mix"])
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("mix"))
    if gradients == "parameters":
        packed = ls.PackedParameters(model, ticket)
        optimizer = packed.attach(torch.optim.AdamW(packed.parameters(), lr=1e-3))
    else:
        optimizer = MaskedAdamW(model, ticket, lr=1e-3, gradients=gradients)
    data = [{"ids": torch.arange(i, i + 4), "labels": i % 3} for i in range(8)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, logging_steps=1, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(norms) == 3 and min(norms) > 10
    moments = torch.cat([state["exp_avg"].flatten() for state in optimizer.state.values()])
    assert 0 < moments.norm() <= 1 - 0.9**3 + 1e-3  # of gradients of norm 1, whatever their directions


@pytest.mark.parametrize("kind", ["dense", "packed", "parameters"])
@pytest.mark.parametrize("overflow", [True, False])
def test_accelerate_knows_of_a_skipped_step(kind, overflow):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = build()
    if kind == "parameters":
        packed = ls.PackedParameters(model, ticket_of(model))
        optimizer = packed.attach(torch.optim.AdamW(packed.parameters(), lr=0.1))
    else:
        optimizer = MaskedAdamW(model, ticket_of(model), lr=0.1, gradients=kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    wrapped = accelerate.optimizer.AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    schedule = accelerate.scheduler.AcceleratedScheduler(schedule, wrapped, split_batches=True)
    before = model.mix.weight.detach().clone()
    for step in (0, 1):
        factor = float("inf") if overflow and step == 0 else 1.0
        scaler.scale(factor * loss_of(model, step)).backward()
        wrapped.step()
        schedule.step()
        skipped = overflow and step == 0
        assert wrapped.step_was_skipped == skipped
        assert torch.equal(before, model.mix.weight) == skipped
        wrapped.zero_grad()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 if overflow else 0.025)
    del accelerator


def test_the_optimizer_class_in_the_plain_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = build()
    arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    ticket = ticket_of(model)
    with_model = {"model": model, "ticket": ticket, "lr": 3e-4, "gradients": "packed"}
    trainer = transformers.Trainer(model, arguments, optimizer_cls_and_kwargs=(MaskedAdamW, with_model))
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, MaskedAdamW) and optimizer.param_groups[0]["lr"] == 3e-4
    assert optimizer.active_entries == sum(s.k for s in ticket.sets.values())
    trainer = transformers.Trainer(model, arguments, optimizer_cls_and_kwargs=(MaskedAdamW, {"ticket": ticket}))
    with pytest.raises(TypeError, match=r'got parameter groups without names.*"model": model'):
        trainer.create_optimizer()


# --- steps that would train nothing ---


def test_parameters_that_were_replaced_are_refused():
    for gradients in ("dense", "packed"):
        model = build()
        optimizer = MaskedAdamW(model, ticket_of(model), gradients=gradients)
        weight = model.mix.weight
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        loss_of(model, 0).backward()
        with pytest.raises(ValueError, match="the parameter '.*' of a .* has been replaced.*assign=True"):
            optimizer.step()
        del weight
    model = build()
    packed = ls.PackedParameters(model, ticket_of(model))
    optimizer = packed.attach(torch.optim.SGD(packed.parameters(), lr=0.1))
    model.mix.weight = nn.Parameter(model.mix.weight.detach().clone())
    with pytest.raises(ValueError, match="PackedParameters: the parameter 'weight' of a Linear has been replaced"):
        optimizer.step()


def test_parameters_that_only_moved_go_on_training():
    model = build()
    optimizer = MaskedAdamW(model, ticket_of(model), dense=model.head)
    model.head = None  # a part that was taken away
    inner = nn.Sequential(model)
    before = model.mix.weight.detach().clone()
    (inner[0].mix.weight * torch.ones(8)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.mix.weight)


def test_groups_that_others_replaced_are_refused():
    model = build()
    optimizer = MaskedAdamW(model, ticket_of(model))
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(3))]
    with pytest.raises(ValueError, match="param_groups are not those of construction"):
        optimizer.step()


@pytest.mark.parametrize("gradients", ["dense", "packed"])
def test_a_step_without_gradients_warns_once(gradients):
    model = build()
    optimizer = MaskedAdamW(model, ticket_of(model), gradients=gradients, dense=model.head)
    loss_of(copy.deepcopy(model), 0).backward()  # the model of another optimizer
    model.head.weight.grad = torch.ones_like(model.head.weight)
    with pytest.warns(NoGradients, match="no entry of the ticket has a gradient.*make the optimizer for that"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
