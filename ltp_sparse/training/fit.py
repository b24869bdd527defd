"""One training phase on `transformers.Trainer`: from a setup and a ticket to the delta of the best evaluation."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F
from transformers import EvalPrediction, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from ltp_sparse.deltas.delta import SparseDelta
from ltp_sparse.methods.base import Settings, Setup
from ltp_sparse.optim.snapshot import Snapshot
from ltp_sparse.prompting.inputs import IGNORED_LABEL
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.training.bars import show_progress
from ltp_sparse.training.evaluation import METRICS
from ltp_sparse.training.run_folder import begin, locked
from ltp_sparse.training.trainer import KeepBest, SparseTrainer, training_arguments


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a run computes, as opposed to what it trains.

    Attributes:
        seed: seed of initial values, the order of examples, dropout, and random choices of the method.
        metric: the score on dev that decides which evaluation is kept: "accuracy", "macro_f1", or "loss".
        output_dir: folder for the best delta so far (`best.safetensors`) and checkpoints; None: nothing is written.
            Files of an earlier run are removed unless this run resumes.
        save_every: epochs between checkpoints, of which the latest is kept; None: no checkpoints.
        resume: continue from the latest checkpoint in `output_dir`, if there is one. The result has the bits of an
            uninterrupted run. The settings must be those in `settings.json`.
        micro_batch_size: examples per forward pass and device, to save memory. Updates are those of the whole batch.
            With several processes (torchrun), an incomplete last batch is filled up with the first examples.
        bf16: compute in bfloat16 under autocast; weights stay float32.
        states: "float32" or "8bit" moments, see `MaskedAdamW`.
        gradients: "packed" keeps only the ticket's entries of every gradient, "dense" keeps all.
        keep_last: also keep the weights of the last update.
        progress: show a progress bar.
        check_frozen: hash the frozen entries before and after, and raise RuntimeError if a bit has changed.
        arguments: further `transformers.TrainingArguments`, e.g. {"report_to": "tensorboard"}.
        callbacks: further callbacks of the Trainer.
    """

    seed: int = 1
    metric: str = "accuracy"
    output_dir: str | os.PathLike[str] | None = None
    save_every: int | None = None
    resume: bool = False
    micro_batch_size: int | None = None
    bf16: bool = False
    states: str = "float32"
    gradients: str = "packed"
    keep_last: bool = False
    progress: bool = True
    check_frozen: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Sequence[TrainerCallback] = ()

    def __post_init__(self) -> None:
        if self.metric not in (*METRICS, "loss"):
            raise ValueError(f"train_method: metric must be one of {', '.join(METRICS)}, loss, got {self.metric!r}")
        if self.output_dir is None and (self.save_every or self.resume):
            raise ValueError(
                "train_method: save_every and resume need an output_dir to write to and read from, got None"
            )
        if self.save_every is not None and self.save_every < 1:
            raise ValueError(f"train_method: save_every must be at least 1 epoch or None, got {self.save_every}")


@dataclass(frozen=True)
class Fit:
    """The result of a phase. The model has its initial bits again.

    Attributes:
        delta: ticket entries and dense parameters at the best evaluation.
        scores: the metric at every evaluation.
        best_epoch: epoch of the best evaluation (of the first one, if several are equal), counted from 1, with a
            fraction within an epoch.
        seconds: wall-clock time since the last resume, with evaluations on dev.
        optimizer_bytes: bytes of moments and index.
        digests: name -> digest of the model's parameters; empty if `check_frozen` is off.
        last: the delta at the last update, if it is kept.
    """

    delta: SparseDelta
    scores: tuple[float, ...]
    best_epoch: float
    seconds: float
    optimizer_bytes: int
    digests: Mapping[str, str]
    last: SparseDelta | None = None


def fit(
    setup: Setup, settings: Settings, ticket: Ticket, train: Sequence[Any], dev: Sequence[Any], options: Options
) -> Fit:
    """Trains the ticket's entries and `setup.dense`, and keeps the weights of the best evaluation on `dev`.

    If several evaluations are equally good, the first one counts.

    Args:
        setup: the model and its parameters that train in full.
        settings: the settings of the phase.
        ticket: the entries to train.
        train: encoded training examples.
        dev: encoded dev examples.
        options: the options of the run.

    Raises:
        ValueError: the ticket has other initial weights, or the settings do not fit those of a run to resume.
        RuntimeError: a frozen entry has changed.
    """
    model, dense = setup.model, setup.dense_parameters()
    base = Snapshot(model, ticket, dense, frozen=options.check_frozen, what="train_method")
    if moved := base.selected_elsewhere:
        raise ValueError(
            f"train_method: the ticket was selected on other initial weights than these: {moved[0]!r} differs "
            f"({len(moved)} tensors in all); load the initial weights again, or revert the deltas applied to them"
        )
    with locked(options.output_dir) as folder:
        keep_best = KeepBest(options.metric, on_disk=options.output_dir is not None, last=options.keep_last)
        trainer = SparseTrainer(
            model,
            _arguments(settings, folder, options),
            base.ticket,
            dense=dense,
            base=base,
            keep_best=keep_best,
            l2=settings.l2,
            optimizer_options={"states": options.states, "gradients": options.gradients},
            train_dataset=train,
            eval_dataset=dev,
            data_collator=setup.collate,
            compute_metrics=_metrics,
            compute_loss_func=setup.loss or class_loss,
            callbacks=[*([_SaveEvery(options.save_every)] if options.save_every else []), *options.callbacks],
        )
        show_progress(trainer, options.progress)
        facts = _facts(settings, train, dev, options)
        checkpoint = begin(folder, facts, what="train_method", resume=options.resume)
        start = time.perf_counter()
        with ExitStack() as cleanup:  # also after an interrupt
            cleanup.callback(base.put_back)
            cleanup.callback(trainer.release_model)
            trainer.train(resume_from_checkpoint=checkpoint)
        seconds = time.perf_counter() - start
        digests = base.check_frozen() if options.check_frozen else {}
        delta = keep_best.delta()
    name = f"eval_{options.metric}"
    scores = tuple(log[name] for log in trainer.state.log_history if name in log)
    optimizer: Any = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return Fit(
        delta, scores, round(delta.metadata["epoch"], 3), seconds, optimizer.state_bytes(), digests, keep_best.last
    )


def class_loss(outputs: Mapping[str, Tensor], labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over the classes.

    Args:
        outputs: "logits" [B, C].
        labels: int64 [B], class indices or `IGNORED_LABEL`.
        num_items_in_batch: labelled examples in the whole batch, if `outputs` is a part of it.
    """
    if num_items_in_batch is None:
        return F.cross_entropy(outputs["logits"], labels, ignore_index=IGNORED_LABEL)
    total = F.cross_entropy(outputs["logits"], labels, ignore_index=IGNORED_LABEL, reduction="sum")
    return total / num_items_in_batch


def _metrics(prediction: EvalPrediction) -> dict[str, float]:
    logits = prediction.predictions  # a tuple if the model has several outputs; the logits come first
    predicted = np.asarray(logits[0] if isinstance(logits, tuple) else logits).argmax(-1)
    return {name: metric(predicted, np.asarray(prediction.label_ids)) for name, metric in METRICS.items()}


def _facts(settings: Settings, train: Sequence[Any], dev: Sequence[Any], options: Options) -> dict[str, Any]:
    """The facts that must be equal in an interrupted run and its continuation for the result to have the same bits."""
    facts = {key: value for key, value in asdict(settings).items() if key != "seeds"}
    facts |= {key: getattr(options, key) for key in ("seed", "metric", "micro_batch_size", "bf16", "states")}
    return facts | {"train examples": len(train), "dev examples": len(dev)}


class _SaveEvery(TrainerCallback):
    """Reduces the Trainer's checkpoints, one per epoch, to every `epochs`-th one."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if round(state.epoch or 0) % self.epochs:
            control.should_save = False


def _arguments(settings: Settings, folder: str, options: Options) -> TrainingArguments:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    micro = min(options.micro_batch_size or settings.batch_size // processes, settings.batch_size)
    if micro < 1 or settings.batch_size % (micro * processes):
        raise ValueError(
            f"train_method: the batch of {settings.batch_size} examples must be a multiple of micro_batch_size x "
            f"processes, got {options.micro_batch_size} x {processes}"
        )
    by_steps = settings.eval_steps > 0
    values: dict[str, Any] = {
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": settings.warmup,
        "max_steps": settings.max_steps or -1,
        "eval_strategy": "steps" if by_steps else "epoch",
        "eval_steps": settings.eval_steps or None,
        "logging_strategy": "steps" if by_steps else "epoch",
        "logging_steps": settings.eval_steps or 500,
        "save_strategy": "epoch" if options.save_every else "no",
        "save_total_limit": 1,
        "seed": options.seed,
        "bf16": options.bf16,
        "label_names": ["labels"],
        **options.arguments,
    }
    accumulation = settings.batch_size // (micro * processes)
    return training_arguments(settings, folder, micro, accumulation, options.progress, **values)
