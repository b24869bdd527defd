"""MaskedAdamW inside a plain loop, accelerate, the Hugging Face Trainer and 2-rank DDP (contract 11).

Everywhere the same is asked: only active and dense entries move, as torch.optim.AdamW would move them; the norm that
clipping saw is that of their gradients; a step with an infinite gradient is skipped as a whole.
"""

import pytest
import torch
from helpers.bits import assert_same, weights
from helpers.framework_runs import (
    BAD_STEP,
    BATCH,
    DECAY,
    LIMIT,
    LR,
    STEPS,
    assert_only_trained_entries_moved,
    batches,
    build_net,
    collate,
    examples,
    make_optimizer,
    plain_run,
    poison,
    ticket_of,
    trained_mask,
    training_arguments,
)
from helpers.ranks import free_port, leave_group, start, tell
from torch import nn

from ltp_sparse import SparseDelta, canonical_parameters


class Oracle:
    """torch.optim.AdamW over the gathered entries, in float64, clipped by hand."""

    def __init__(self, model, ticket):
        self.masks = {n: trained_mask(n, p, ticket) for n, p in canonical_parameters(model).items()}
        self.masks = {name: mask for name, mask in self.masks.items() if mask.any()}
        values = weights(model)
        self.entries = {n: nn.Parameter(values[n][m].double()) for n, m in self.masks.items()}
        self.optimizer = torch.optim.AdamW(self.entries.values(), lr=LR, weight_decay=DECAY)
        self.norms = []

    def step(self, model):
        gradients = {name: p.grad for name, p in canonical_parameters(model).items()}
        for name, entries in self.entries.items():
            entries.grad = gradients[name][self.masks[name]].double()
        self.norms.append(nn.utils.clip_grad_norm_(self.entries.values(), LIMIT).item())
        self.optimizer.step()

    def check(self, model):
        for name, parameter in canonical_parameters(model).items():
            if name in self.entries:
                expected = self.entries[name].detach()
                error = (parameter.detach()[self.masks[name]].double() - expected).abs()
                assert (error <= 4e-6 * expected.abs().clamp(min=STEPS * LR)).all(), name


# --- plain torch -----------------------------------------------------------------------------------------------------


def test_plain_loop_matches_torch_on_the_trained_entries():
    model = build_net()
    ticket, before = ticket_of(model), weights(model)
    optimizer, oracle = make_optimizer(model), Oracle(model, ticket)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
    reference = torch.optim.lr_scheduler.LambdaLR(oracle.optimizer, lambda step: 1 - step / 10)
    norms = []
    for batch in batches():
        model(**batch)["loss"].backward()
        oracle.step(model)
        optimizer.step()
        norms.append(optimizer.grad_norm.item())
        scheduler.step()
        reference.step()
        optimizer.zero_grad()
    oracle.check(model)
    assert norms == pytest.approx(oracle.norms, rel=1e-6) and min(norms) > LIMIT / 4 and max(norms) > LIMIT
    assert_only_trained_entries_moved(before, weights(model), ticket)


def test_closure():
    model, batch = build_net(), batches()[0]
    optimizer = make_optimizer(model)

    def closure():
        optimizer.zero_grad()
        loss = model(**batch)["loss"]
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("active", [True, False], ids=["active", "inactive"])
def test_grad_scaler_skips_the_step_as_a_whole(active):
    """GradScaler looks at whole gradients, so an inactive entry skips the step, too."""
    model, calls, norms = build_net(), [], []
    poison(model, calls, active)
    optimizer = make_optimizer(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number, batch in enumerate(batches()):
        before, state = weights(model), [s["exp_avg"].clone() for s in optimizer.state.values()]
        steps = [int(s["step"]) for s in optimizer.state.values()]
        scaler.scale(model(**batch)["loss"]).backward()
        scaler.step(optimizer)
        scaler.update()
        if number == BAD_STEP:
            assert_same(weights(model), before)
            assert steps == [int(s["step"]) for s in optimizer.state.values()] == [BAD_STEP] * len(steps)
            assert all(torch.equal(a, s["exp_avg"]) for a, s in zip(state, optimizer.state.values(), strict=True))
            assert scaler.get_scale() == 512.0
        else:
            norms.append(optimizer.grad_norm.item())
        optimizer.zero_grad()
    reference, expected = plain_run(skip=BAD_STEP)
    # the scales are powers of two, so scaling changes no bits
    assert_same(weights(model), weights(reference))
    assert norms == expected


# --- accelerate ------------------------------------------------------------------------------------------------------


def accelerated_run(accelerator, *, active=None):
    model, calls = build_net(), []
    ticket, before = ticket_of(model), weights(model)
    if active is not None:
        poison(model, calls, active)
    loader = torch.utils.data.DataLoader(examples(), batch_size=BATCH // 2, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, make_optimizer(model), loader)
    norms, skipped = [], []
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
            if accelerator.sync_gradients:
                norms.append(optimizer.optimizer.grad_norm.item())
                skipped.append(int(next(iter(optimizer.state.values()))["step"]))
            optimizer.zero_grad()
    assert_only_trained_entries_moved(before, weights(model), ticket)
    return model, norms, skipped


def test_accelerate_accumulates_and_steps(accelerator):
    model, norms, _ = accelerated_run(accelerator)
    reference, expected = plain_run(size=BATCH // 2, accumulation=2)
    assert_same(weights(model), weights(reference))
    assert norms == expected and len(norms) == STEPS and max(norms) > LIMIT


def test_accelerate_skips(accelerator):
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)  # accelerate makes one for fp16 on a GPU only
    model, norms, steps = accelerated_run(accelerator, active=True)
    bad = BAD_STEP // 2  # two micro-batches a step
    assert steps == [number + 1 - (number >= bad) for number in range(STEPS)]
    reference, expected = plain_run(size=BATCH // 2, accumulation=2, skip=bad)
    assert_same(weights(model), weights(reference))
    assert norms[:bad] + norms[bad + 1 :] == expected and not torch.tensor(norms[bad]).isfinite()


# --- the Hugging Face Trainer ----------------------------------------------------------------------------------------


def sparse_trainer(folder, model=None, trainer_class=None, **options):
    from ltp_sparse.training.trainer import SparseTrainer

    model = model or build_net()
    trainer_class = trainer_class or SparseTrainer
    return trainer_class(
        model, training_arguments(folder, **options), ticket_of(model), dense=model.head,
        train_dataset=examples(), data_collator=collate,
    )  # fmt: skip


def test_optimizer_in_an_ordinary_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = build_net()
    before, optimizer = weights(model), make_optimizer(model)
    trainer = transformers.Trainer(
        model, training_arguments(tmp_path, max_grad_norm=0.0), train_dataset=examples(), data_collator=collate,
        optimizers=(optimizer, None),
    )  # fmt: skip
    trainer.train()
    reference, expected = plain_run()
    assert_same(weights(model), weights(reference))
    assert optimizer.grad_norm.item() == expected[-1]
    assert_only_trained_entries_moved(before, weights(model), ticket_of(model))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_sparse_trainer(accumulation, tmp_path):
    pytest.importorskip("transformers")
    options = {"per_device_train_batch_size": BATCH // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = sparse_trainer(tmp_path, **options)
    trainer.train()
    reference, expected = plain_run(size=BATCH // accumulation, accumulation=accumulation)
    assert_same(weights(trainer.model), weights(reference))
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == expected and max(logged) > LIMIT


@pytest.mark.parametrize("active", [True, False], ids=["active", "inactive"])
def test_sparse_trainer_skips(active, tmp_path):
    pytest.importorskip("transformers")
    from ltp_sparse.training.trainer import SparseTrainer

    class Scaled(SparseTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)

    model, calls = build_net(), []
    poison(model, calls, active)
    trainer = sparse_trainer(tmp_path, model, Scaled)
    trainer.train()
    reference, expected = plain_run(skip=BAD_STEP)
    assert_same(weights(model), weights(reference))
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {STEPS - 1}
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[:BAD_STEP] + logged[BAD_STEP + 1 :] == expected
    assert trainer.accelerator.scaler.get_scale() == 128.0


# --- DDP -------------------------------------------------------------------------------------------------------------


def _ddp_loop(rank, folder):
    """Each rank sees one half of every batch; in the second run rank 1 meets infinite gradients in step BAD_STEP."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    def train(run):
        model, norms = build_net(), []
        optimizer = make_optimizer(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=run == "skip")
        for number, batch in enumerate(batches()):
            half = {key: value[rank * BATCH // 2 : (rank + 1) * BATCH // 2] for key, value in batch.items()}
            loss = scaler.scale(wrapped(**half)["loss"])
            if run == "skip" and number == BAD_STEP and rank == 1:
                loss = loss * torch.inf
            loss.backward()
            scaler.step(optimizer)
            scaler.update()
            norms.append(optimizer.grad_norm.item())
            optimizer.zero_grad()
        steps = [int(state["step"]) for state in optimizer.state.values()]
        torch.save({"weights": weights(wrapped), "norms": norms, "steps": steps}, f"{folder}/{run}-{rank}.pt")

    train("clean")
    train("skip")
    leave_group()


@pytest.mark.slow
def test_ddp(tmp_path):
    start(_ddp_loop, (str(tmp_path),), 2)
    before, ticket = weights(build_net()), ticket_of(build_net())
    for run, skip in (("clean", None), ("skip", BAD_STEP)):
        first, second = (torch.load(tmp_path / f"{run}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert_same(first["weights"], second["weights"])
        reference, expected = plain_run(skip=skip)
        finite = [norm for number, norm in enumerate(first["norms"]) if number != skip]
        assert finite == pytest.approx(expected, rel=1e-5)  # the mean of two halves is rounded otherwise
        assert repr(first["norms"]) == repr(second["norms"])
        assert set(first["steps"] + second["steps"]) == {STEPS - (skip is not None)}
        for name, expected_weight in weights(reference).items():
            torch.testing.assert_close(first["weights"][name], expected_weight, rtol=1e-4, atol=1e-4)
        assert_only_trained_entries_moved(before, first["weights"], ticket)


def _ddp_trainer(rank, folder, port):
    """A run of two epochs, and the same run stopped after one epoch and resumed, on two ranks."""
    torch.set_num_threads(1)
    tell(rank, 2, port)
    from transformers import TrainerCallback

    from ltp_sparse.training.trainer import KeepBest, SparseTrainer

    class Stop(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    def run(name, resume=False, *callbacks):
        model = build_net()
        options = {
            "per_device_train_batch_size": BATCH // 2, "ddp_backend": "gloo", "num_train_epochs": 2,
            "train_sampling_strategy": "random", "save_strategy": "steps", "save_steps": STEPS - 1,
            "eval_strategy": "steps", "eval_steps": 2,
        }  # fmt: skip
        trainer = SparseTrainer(
            model, training_arguments(f"{folder}/{name}", **options), ticket_of(model), dense=model.head,
            train_dataset=examples(), eval_dataset=examples(12), data_collator=collate, keep_best=KeepBest(),
            callbacks=list(callbacks),
        )  # fmt: skip
        try:
            trainer.train(resume_from_checkpoint=resume)
        except KeyboardInterrupt:
            return None
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry]
        return {"weights": weights(model), "norms": norms, "best": trainer.keep_best.best}

    whole = run("whole")
    run("stopped", False, Stop())
    torch.save({"whole": whole, "resumed": run("stopped", True)}, f"{folder}/result-{rank}.pt")
    leave_group()


@pytest.mark.slow
def test_sparse_trainer_on_two_ranks(tmp_path):
    pytest.importorskip("transformers")
    start(_ddp_trainer, (str(tmp_path), free_port()), 2)
    results = [torch.load(tmp_path / f"result-{rank}.pt", weights_only=True) for rank in (0, 1)]
    whole = results[0]["whole"]
    assert len(whole["norms"]) == 2 * STEPS
    for other in (results[1]["whole"], results[0]["resumed"], results[1]["resumed"]):
        assert_same(whole["weights"], other["weights"])
        assert (whole["norms"], whole["best"]) == (other["norms"], other["best"])
    model = build_net()
    before = weights(model)
    assert_only_trained_entries_moved(before, whole["weights"], ticket_of(model))
    best = SparseDelta.load(tmp_path / "whole" / "best.safetensors")
    best.apply(model)
    assert_same(weights(model), whole["weights"])
