"""Packed gradients inside accelerate, the Hugging Face Trainer and 2-rank DDP (contract 11): the bits of dense ones.

The plain run with dense gradients of `test_frameworks.py` is what all are compared with.
"""

import copy
import gc

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
    plain_run,
    poison,
    ticket_of,
    training_arguments,
)
from helpers.gradients import has_dense_gradient
from helpers.ranks import leave_group, start
from torch import nn

from ltp_sparse import MaskedAdamW, Ticket, canonical_parameters


def packed_optimizer(model):
    return MaskedAdamW(
        model, ticket_of(model), lr=LR, weight_decay=DECAY, dense=model.head, max_grad_norm=LIMIT, freeze=True,
        gradients="packed",
    )  # fmt: skip


def assert_no_dense_gradients(model):
    inner = getattr(model, "module", model)
    assert not any(has_dense_gradient(p) for name, p in inner.named_parameters() if not name.startswith("head"))


# --- accelerate ---


def accelerated_run(accelerator, active=None):
    model, calls = build_net(), []
    if active is not None:
        poison(model, calls, active)
    loader = torch.utils.data.DataLoader(examples(), batch_size=BATCH // 2, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, packed_optimizer(model), loader)
    norms = []
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"])
            assert_no_dense_gradients(model)
            optimizer.step()
            if accelerator.sync_gradients:
                norms.append(optimizer.optimizer.grad_norm.item())
            optimizer.zero_grad()
    return model, norms


def test_accelerate_accumulates_and_steps(accelerator):
    model, norms = accelerated_run(accelerator)
    reference, expected = plain_run(size=BATCH // 2, accumulation=2)
    assert_same(weights(model), weights(reference))
    assert norms == pytest.approx(expected, rel=1e-7) and len(norms) == STEPS and max(norms) > LIMIT


@pytest.mark.parametrize("active", [True, False], ids=["active", "inactive"])
def test_accelerate_skips_for_active_entries_only(accelerator, active):
    """An infinity in an inactive entry is dropped with the rest of the dense gradient: nothing is to be skipped."""
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    model, norms = accelerated_run(accelerator, active)
    bad = BAD_STEP // 2
    reference, expected = plain_run(size=BATCH // 2, accumulation=2, skip=bad if active else None)
    assert_same(weights(model), weights(reference))
    assert (norms[:bad] + norms[bad + 1 :] if active else norms) == pytest.approx(expected, rel=1e-7)
    assert accelerator.scaler.get_scale() == (128.0 if active else 256.0)


# --- the Hugging Face Trainer ---


def test_in_an_ordinary_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = build_net()
    before, optimizer = weights(model), packed_optimizer(model)
    trainer = transformers.Trainer(
        model, training_arguments(tmp_path, max_grad_norm=0.0), train_dataset=examples(), data_collator=collate,
        optimizers=(optimizer, None),
    )  # fmt: skip
    trainer.train()
    reference, expected = plain_run()
    assert_same(weights(model), weights(reference))
    assert optimizer.grad_norm.item() == pytest.approx(expected[-1], rel=1e-7)
    assert_only_trained_entries_moved(before, weights(model), ticket_of(model))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_sparse_trainer(accumulation, tmp_path):
    pytest.importorskip("transformers")
    from ltp_sparse.training.trainer import SparseTrainer

    options = {"per_device_train_batch_size": BATCH // accumulation, "gradient_accumulation_steps": accumulation}
    model = build_net()
    trainer = SparseTrainer(
        model, training_arguments(tmp_path, **options), ticket_of(model), dense=model.head,
        optimizer_options={"gradients": "packed"}, train_dataset=examples(), data_collator=collate,
    )  # fmt: skip
    trainer.train()
    reference, expected = plain_run(size=BATCH // accumulation, accumulation=accumulation)
    assert_same(weights(trainer.model), weights(reference))
    assert [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry] == pytest.approx(
        expected, rel=1e-7
    )


# --- DDP ---


def _ddp_loop(rank, folder):
    """Each rank sees one half of every batch, cut in two micro-batches; rank 1 meets infinite gradients once."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    def train(run):
        model, norms, averages = build_net(), [], []
        optimizer = packed_optimizer(model)
        packed = next(launch.packed for launch in optimizer._launches if launch.packed is not None)
        packed.average = lambda group=None: (averages.append(1), type(packed).average(packed, group))
        wrapped = nn.parallel.DistributedDataParallel(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=run == "skip")
        for number, batch in enumerate(batches()):
            size = BATCH // 4
            parts = [slice((2 * rank + part) * size, (2 * rank + part + 1) * size) for part in (0, 1)]
            for part in parts:
                micro = {key: value[part] for key, value in batch.items()}
                wrapped.require_backward_grad_sync = run == "sync-twice" or part is parts[-1]  # as in no_sync()
                loss = scaler.scale(wrapped(**micro)["loss"]) / 2
                if run == "skip" and number == BAD_STEP and rank == 1:
                    loss = loss * torch.inf
                loss.backward()
                assert_no_dense_gradients(wrapped)
            scaler.step(optimizer)
            scaler.update()
            norms.append(optimizer.grad_norm.item())
            model.head.zero_grad()
        steps = [int(state["step"]) for state in optimizer.state.values()]
        found = {"weights": weights(wrapped), "norms": norms, "steps": steps, "scale": scaler.get_scale()}
        found["averages"] = len(averages)
        torch.save(found, f"{folder}/{run}-{rank}.pt")

    for run in ("clean", "sync-twice", "skip"):
        train(run)

    late = build_net()
    wrapped = nn.parallel.DistributedDataParallel(late)
    optimizer = packed_optimizer_unfrozen(late)
    with pytest.raises(ValueError, match="before the model is wrapped"):
        wrapped(**batches()[0])
    del late, wrapped, optimizer

    packed = build_net()
    optimizer = packed_optimizer_unfrozen(packed)
    twin = nn.parallel.DistributedDataParallel(copy.deepcopy(packed))
    with pytest.raises(ValueError, match="a copy of one with packed gradients"):
        twin(**batches()[0])
    again = copy.deepcopy(packed)
    other = packed_optimizer(again)  # with gradients that are packed, too, it is as any model
    nn.parallel.DistributedDataParallel(again)(**batches()[0])["loss"].backward()
    assert_no_dense_gradients(again)
    del packed, twin, again, optimizer, other

    alone = build_net()
    optimizer = MaskedAdamW(alone, ticket_of(alone), gradients="packed", freeze=True)
    alone(**{key: value[rank::2] for key, value in batches()[0].items()})["loss"].backward()
    own = [p.grad.clone() for p in optimizer.param_groups[0]["params"]]
    optimizer.average_gradients()
    average = [p.grad.clone() for p in optimizer.param_groups[0]["params"]]
    optimizer.step()
    name = ticket_of(alone).active_names[0]
    if rank == 0:  # on the other rank its slots still hold what the step before has left
        canonical_parameters(alone)[name].sum().backward()
    optimizer.average_gradients()
    later = [p.grad for p in optimizer.param_groups[0]["params"]]
    torch.save({"own": own, "average": average, "later": later}, f"{folder}/alone-{rank}.pt")

    alone = build_net()
    optimizer = MaskedAdamW(alone, Ticket.random(alone, density=0.1, seed=rank), gradients="packed", freeze=True)
    alone(**batches()[0])["loss"].backward()
    with pytest.raises(ValueError, match="the same ticket on all ranks"):
        optimizer.average_gradients()
    del alone, optimizer
    gc.collect()
    leave_group()


def packed_optimizer_unfrozen(model):
    return MaskedAdamW(model, ticket_of(model), dense=model.head, gradients="packed")


@pytest.mark.slow
def test_ddp(tmp_path):
    start(_ddp_loop, (str(tmp_path),), 2)
    before, ticket = weights(build_net()), ticket_of(build_net())
    for run, skip in (("clean", None), ("sync-twice", None), ("skip", BAD_STEP)):
        first, second = (torch.load(tmp_path / f"{run}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert_same(first["weights"], second["weights"])
        reference, expected = plain_run(skip=skip)
        finite = [norm for number, norm in enumerate(first["norms"]) if number != skip]
        assert finite == pytest.approx(expected, rel=1e-5)  # the mean of four parts is rounded otherwise
        assert repr(first["norms"]) == repr(second["norms"])
        assert set(first["steps"] + second["steps"]) == {STEPS - (skip is not None)}
        assert first["averages"] == second["averages"] == STEPS * (2 if run == "sync-twice" else 1)  # no_sync is heeded
        assert first["scale"] == second["scale"] == (128.0 if skip is not None else 1.0)
        for name, wanted in weights(reference).items():
            torch.testing.assert_close(first["weights"][name], wanted, rtol=1e-4, atol=1e-4)
        assert_only_trained_entries_moved(before, first["weights"], ticket)
    alone = [torch.load(tmp_path / f"alone-{rank}.pt", weights_only=True) for rank in (0, 1)]
    for a, b, mean, other in zip(*(side[key] for key in ("own", "average") for side in alone), strict=True):
        assert torch.equal(mean, other)
        torch.testing.assert_close(mean, (a + b) / 2)
    for side in alone:
        half, *none = side["later"]
        assert half.any() and (half[half != 0] == 0.5).all() and none and all(grad is None for grad in none)
