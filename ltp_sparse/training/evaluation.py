"""Predictions, scores per language, and the result row of a run."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ltp_sparse.methods.base import Collate, Setup
from ltp_sparse.prompting.inputs import IGNORED_LABEL
from ltp_sparse.tasks.own import warn_of_gaps
from ltp_sparse.training.autocast import autocast

if TYPE_CHECKING:
    from ltp_sparse.training.method import Trained


def accuracy(predicted: Any, labels: Any) -> float:
    """Share of equal entries of two integer arrays [N]."""
    return float((predicted == labels).mean())


def macro_f1(predicted: Any, labels: Any) -> float:
    """Unweighted mean of the F1 scores of all classes in either integer array [N]."""
    scores = []
    for label in np.union1d(predicted, labels):
        hits = int(((predicted == label) & (labels == label)).sum())
        scores.append(2 * hits / int((predicted == label).sum() + (labels == label).sum()))
    return float(np.mean(scores))


METRICS: dict[str, Callable[[Any, Any], float]] = {"accuracy": accuracy, "macro_f1": macro_f1}
"""Name -> score of predictions, 0 to 1."""


@torch.no_grad()
def class_logits(
    model: nn.Module,
    examples: Sequence[Any],
    collate: Collate,
    *,
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Tensor:
    """Logits of the classes of every example, float32 [N, C] on the CPU, in the given order; [0, 0] without examples.

    The model is in evaluation mode during the call. Batches have examples of similar length, so that there is little
    padding.

    Args:
        model: a model that returns "logits".
        examples: encoded examples.
        collate: turns encoded examples into a batch.
        batch_size: examples per forward pass.
        dtype: compute under autocast in this dtype (torch.bfloat16); None: in the dtype of the weights.
        progress: called after each batch with its number of examples.
    """
    if batch_size < 1:
        raise ValueError(f"predict: batch_size must be at least 1, got {batch_size}")
    device = next(model.parameters()).device
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]), reverse=True)
    was_training = model.training
    model.eval()
    found = []
    try:
        with autocast(device, dtype):
            for start in range(0, len(order), batch_size):
                batch = collate([examples[i] for i in order[start : start + batch_size]])
                batch.pop("labels", None)
                inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
                logits = model(**inputs)["logits"]
                found.append(logits.float())
                if progress is not None:
                    progress(len(logits))
    finally:
        model.train(was_training)
    if not found:
        return torch.empty(0, 0, dtype=torch.float32, device="cpu")
    by_length = torch.cat(found).cpu()
    result = torch.empty_like(by_length)
    result[order] = by_length
    return result


def predict(model: nn.Module, examples: Sequence[Any], collate: Collate, **options: Any) -> Tensor:
    """Predicted class of every example, int64 [N] on the CPU, in the given order; options as for `class_logits`."""
    logits = class_logits(model, examples, collate, **options)
    return logits.argmax(-1) if len(logits) else torch.empty(0, dtype=torch.long, device="cpu")


def largest_class(examples: Mapping[str, Sequence[Any]], metric: str = "accuracy") -> dict[str, float]:
    """Language -> the score of always predicting the most frequent class of its examples."""
    found = {}
    for language, of_language in examples.items():
        labels = np.asarray([example.label for example in of_language])
        found[language] = METRICS[metric](np.full_like(labels, statistics.mode(labels.tolist())), labels)
    return found


def evaluate(
    trained: Setup | Trained,
    examples: Mapping[str, Sequence[Any]],
    *,
    metric: str = "accuracy",
    labels: Sequence[str] | None = None,
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    notes: list[str] | None = None,
) -> dict[str, float]:
    """Language -> score, 0 to 1.

    Args:
        trained: the model to evaluate, with its encoding of examples: the result of `train_method` or `load_trained`.
        examples: language -> labelled examples.
        metric: one of `METRICS`.
        labels: classes of the task. Classes without examples cause a warning.
        batch_size: examples per forward pass.
        dtype: see `class_logits`.
        progress: show a progress bar.
        notes: a list to which notes for the result row are appended.

    Warns:
        UserWarning: a class has no examples, a text is blank, or all predictions are one class (also a note).

    Raises:
        ValueError: an unknown metric, an example without a label, or a language without examples.
    """
    from tqdm.auto import tqdm

    if metric not in METRICS:
        raise ValueError(f"evaluate: metric must be one of {', '.join(METRICS)}, got {metric!r}")
    scores = {}
    one_class: dict[str, list[str]] = {}
    with tqdm(total=sum(map(len, examples.values())), unit="example", disable=not progress) as bar:
        for language, of_language in examples.items():
            bar.set_description(f"evaluate {language}")
            warn_of_gaps(of_language, labels, f"evaluate {language}")
            encoded = trained.encode(of_language)
            expected = np.asarray([example["labels"] for example in encoded])
            if not encoded or bool((expected == IGNORED_LABEL).any()):
                raise ValueError(
                    f"evaluate: expected labelled examples in {language!r}, got none or some without a label"
                )
            predicted = predict(
                trained.model, encoded, trained.collate, batch_size=batch_size, dtype=dtype, progress=bar.update
            )
            scores[language] = METRICS[metric](predicted.numpy(), expected)
            if bool((predicted == predicted[0]).all()) and bool((expected != expected[0]).any()):
                name = str(int(predicted[0]) if labels is None else labels[int(predicted[0])])
                one_class.setdefault(name, []).append(language)
    for name, languages in one_class.items():
        note = f"all predictions for {', '.join(languages)} are {name!r}"
        if notes is not None:
            notes.append(note)
        warnings.warn(
            f"{note}: the model does not separate the classes; try more epochs, another learning rate or more examples",
            stacklevel=2,
        )
    return scores


def result_row(scores: Mapping[str, float], **facts: Any) -> dict[str, Any]:
    """One run as a plain dict: the facts (method, shots, seed, ...), "scores" by language, and their "mean"."""
    return {**facts, "scores": dict(scores), "mean": statistics.fmean(scores.values())}
