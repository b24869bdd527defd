"""Trains any method of `ltp_sparse.methods` on labelled examples, and loads the results."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ltp_sparse.deltas.delta import SparseDelta, applied_deltas
from ltp_sparse.methods import METHODS
from ltp_sparse.methods.base import Collate, Context, Encode, Method, Settings, Setup
from ltp_sparse.models.backbone import longest_input
from ltp_sparse.prompting import CLASSES, Verbalizer, kind_of
from ltp_sparse.tasks.own import warn_of_gaps
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.training.fit import Fit, Options, fit

logger = logging.getLogger(__name__)

_trained: weakref.WeakKeyDictionary[nn.Module, SparseDelta] = weakref.WeakKeyDictionary()
"""Language model -> the delta of its latest run."""


@dataclass(frozen=True)
class Trained:
    """The result of a run.

    Attributes:
        setup: the model with the best weights, and its encoding of examples.
        delta: ticket entries and dense parameters at the best evaluation on dev, applied to `model`.
        baked: the same delta for inference, with a prompt in place of its encoder. `load_trained` takes either.
        dev_scores: the score of every evaluation, 0 to 1 (losses if the metric is "loss").
        best_epoch: the best epoch (the first one, if several are equal), counted from 1.
        seconds: wall-clock time of training in all phases.
        optimizer_bytes: bytes of the optimizer's moments and index in the last phase.
        last: the delta at the last update, if it is kept (`Options.keep_last`).
    """

    setup: Setup
    delta: SparseDelta
    baked: SparseDelta
    dev_scores: tuple[float, ...]
    best_epoch: float
    seconds: float
    optimizer_bytes: int
    last: SparseDelta | None = None

    @property
    def model(self) -> nn.Module:
        """The model with the best weights, in evaluation mode."""
        return self.setup.model

    @property
    def encode(self) -> Encode:
        """Turns examples of the task into inputs of the model."""
        return self.setup.encode

    @property
    def collate(self) -> Collate:
        """Turns inputs into one batch."""
        return self.setup.collate

    def release(self) -> None:
        """Restores the initial bits of the language model and detaches the method's modules. Idempotent."""
        _release(self.setup, self.delta)


def train_method(
    method: Method,
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Any],
    dev: Sequence[Any],
    *,
    ticket: Ticket | None = None,
    labels: tuple[str, ...] = CLASSES,
    language: str = "en",
    verbalizer: Verbalizer | None = None,
    **options: Any,
) -> Trained:
    """Trains a method on labelled examples.

    Args:
        method: the method and its settings.
        language_model: a model at its initial weights, with or without language deltas applied. It is trained in place
            and ends with the best weights.
        tokenizer: its tokenizer.
        train: labelled examples of a task.
        dev: labelled examples whose score decides which weights are kept; of equal scores, the first.
        ticket: the ticket of stage 1 for methods that need one, selected from the same initial weights.
        labels: classes of the task, in the order of the logits.
        language: language of the training examples, for the words of a pattern.
        verbalizer: words of the classes, for methods that score words; None: the English words of inference.
        options: fields of `Options`: seed, output_dir, save_every, resume, bf16, states, ...

    Returns:
        The result, with the trained model.

    Raises:
        ValueError: examples have no label, the ticket is missing or does not fit, or settings do not fit the model.
    """
    run = Options(**options)
    run = replace(run, metric=method.picks or run.metric)
    _check(method, language_model, train, dev)
    warn_of_gaps(train, labels, "training examples")
    warn_of_gaps(dev, labels, "dev examples")
    method.prepare(language_model)
    active = method.ticket(language_model, ticket, seed=run.seed)
    if ticket is not None:  # a ticket drawn to match it has the same base
        digests = {name: digest for name, digest in ticket.fingerprint.items() if name in active.sets}
        active = Ticket(active.sets, active.shapes, active.metadata, {**digests, **active.fingerprint})
    context = Context(tokenizer=tokenizer, labels=labels, language=language, verbalizer=verbalizer, seed=run.seed)
    setup, delta = method.build(language_model, context), None
    try:
        encoded = setup.encode(train), setup.encode(dev)
        phases: list[Fit] = []

        def tune(setup: Setup, ticket: Ticket, settings: Settings | None = None) -> SparseDelta:
            folder = None if run.output_dir is None else Path(run.output_dir) / f"phase-{len(phases) + 1}"
            options = replace(run, output_dir=folder)
            phases.append(fit(setup, settings or method.settings, ticket, *encoded, options))
            return phases[-1].delta

        setup, active = method.choose(setup, active, tune)
        last = fit(setup, method.settings, active, *encoded, run)
        delta, *rest = _finished(method, setup, last, run, labels=labels, language=language)
        delta.apply(setup.model, digests=last.digests)
        setup.model.eval()
        dense = delta.dense if setup.bake is None else setup.bake()
        result = Trained(
            setup=setup,
            delta=delta,
            baked=SparseDelta(delta.ticket, delta.values, delta.originals, dense, {**delta.metadata, "baked": True}),
            dev_scores=last.scores,
            best_epoch=last.best_epoch,
            seconds=sum(phase.seconds for phase in (*phases, last)),
            optimizer_bytes=last.optimizer_bytes,
            last=rest[0] if rest else None,
        )
        _trained[language_model] = delta
        return result
    except BaseException:
        _release(setup, delta)
        raise


def _finished(
    method: Method, setup: Setup, last: Fit, run: Options, *, labels: tuple[str, ...], language: str
) -> tuple[SparseDelta, ...]:
    """The best delta of a run, and the last one if it is kept, with their metadata, after `method.finish`."""
    metadata = {
        **method.describe(),
        **setup.facts,
        "seed": run.seed,
        "labels": list(labels),
        "language": language,
        "metric": run.metric,
    }
    best = {"epoch": last.best_epoch, "dev_score": last.delta.metadata["value"]}
    logger.info("%s: epoch %g is kept, dev %s %.4f", method.name, last.best_epoch, run.metric, best["dev_score"])
    kept = [(last.delta, best)]
    if last.last is not None:
        kept.append((last.last, {"epoch": round(last.last.metadata["epoch"], 3), "dev_score": last.scores[-1]}))
    return method.finish(
        setup, *(SparseDelta(d.ticket, d.values, d.originals, d.dense, {**metadata, **facts}) for d, facts in kept)
    )


def _release(setup: Setup, delta: SparseDelta | None) -> None:
    if delta is not None and _is_applied(delta, setup.model):
        delta.revert(setup.model)
    setup.undo()


def _is_applied(delta: SparseDelta, model: nn.Module) -> bool:
    return any(entry.delta is delta for entry in applied_deltas(model))


def load_trained(language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, delta: SparseDelta) -> Setup:
    """Builds the trained model from a saved result of `train_method`, and its encoding of examples.

    Args:
        language_model: a model at the initial weights of that run, with the same language deltas applied. The delta is
            applied to it; `delta.revert(setup.model)` undoes that.
        tokenizer: its tokenizer.
        delta: `delta` or `baked` of the result.

    Raises:
        ValueError: `train_method` did not make the delta, or it does not fit the model.
    """
    facts = delta.metadata
    if missing := [key for key in ("method", "settings", "options", "labels") if key not in facts]:
        raise ValueError(
            f"load_trained: expected a delta of train_method, but this one has no {missing[0]!r}: {delta!r}"
        )
    words = facts.get("verbalizer")
    context = Context(
        tokenizer=tokenizer,
        labels=tuple(facts["labels"]),
        language=facts["language"],
        verbalizer=None if words is None else Verbalizer(tuple(tuple(tokens) for tokens in words)),
        seed=facts["seed"],
    )
    method = METHODS[facts["method"]].from_description(facts)
    setup = method.build(language_model, context, baked=facts.get("baked", False))
    try:
        delta.apply(setup.model)
    except BaseException:
        setup.undo()
        raise
    setup.model.eval()
    return setup


def _check(method: Method, language_model: PreTrainedModel, train: Sequence[Any], dev: Sequence[Any]) -> None:
    for what, examples in (("train", train), ("dev", dev)):
        if not examples or any(example.label is None for example in examples):
            raise ValueError(f"train_method: expected labelled examples in {what}, got none or some without a label")
    kind = kind_of(train[0])
    if kind not in method.inputs:
        raise ValueError(
            f"train_method: {method.name} reads examples of the kind {' or '.join(method.inputs)}, got {kind}; "
            "choose a method or a task that fits"
        )
    earlier = _trained.get(language_model)
    if earlier is not None and _is_applied(earlier, language_model):
        raise ValueError(
            "train_method: expected a language model at its initial weights, but this one still has the result of an "
            "earlier run; call result.release(), or load it again"
        )
    if method.backbone == "masked" and method.settings.max_length > (longest := longest_input(language_model.config)):
        raise ValueError(
            f"train_method: max_length must be at most {longest}, the positions of the model, got "
            f"{method.settings.max_length}"
        )
