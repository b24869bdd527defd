"""Scores per language, their mean and spread over seeds, and tables of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ltp_sparse.methods.base import Collate, Encode
from ltp_sparse.prompting.templates import IGNORED_LABEL


def accuracy(predicted: Any, labels: Any) -> float:
    """Share of equal entries of two integer arrays [N]."""
    return float((predicted == labels).mean())


def macro_f1(predicted: Any, labels: Any) -> float:
    """Unweighted mean of the F1 of every class that occurs in either integer array [N]."""
    scores = []
    for label in np.union1d(predicted, labels):
        hits = int(((predicted == label) & (labels == label)).sum())
        scores.append(2 * hits / int((predicted == label).sum() + (labels == label).sum()))
    return float(np.mean(scores))


METRICS: dict[str, Callable[[Any, Any], float]] = {"accuracy": accuracy, "macro_f1": macro_f1}
"""Scores of predictions, 0 to 1."""

AVERAGE = "AVG"
_GROUP = ("method", "shots")


@torch.no_grad()
def predict(
    model: nn.Module,
    examples: Sequence[Any],
    collate: Collate,
    *,
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Tensor:
    """Predicted class of every example, int64 [N] on the CPU, in the order given.

    dtype:    compute under autocast in this type (torch.bfloat16); None computes in the type of the weights.
    progress: called with the number of examples done after each batch.
    The model is put into evaluation mode for the call. Batches hold examples of similar length, so little is padding.
    """
    if batch_size < 1:
        raise ValueError(f"predict: batch_size must be at least 1, got {batch_size}")
    device = next(model.parameters()).device
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]), reverse=True)
    was_training = model.training
    model.eval()
    predicted = []
    try:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            for start in range(0, len(order), batch_size):
                batch = collate([examples[i] for i in order[start : start + batch_size]])
                batch.pop("labels", None)
                logits = model(**{name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()})[
                    "logits"
                ]
                predicted.append(logits.argmax(-1))
                if progress is not None:
                    progress(len(logits))
    finally:
        model.train(was_training)
    result = torch.empty(len(examples), dtype=torch.long)
    if predicted:
        result[order] = torch.cat(predicted).cpu()
    return result


class Ready(Protocol):
    """What can be evaluated: a result of `train_method`, or of `load_trained`."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def encode(self) -> Encode: ...
    @property
    def collate(self) -> Collate: ...


def evaluate(
    trained: Ready,
    examples: Mapping[str, Sequence[Any]],
    *,
    metric: str = "accuracy",
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Score (0 to 1) per language over labelled examples, language -> examples.

    metric: one of `METRICS`
    Raises ValueError for an unknown metric, an example without a label and a language without examples.
    """
    from tqdm.auto import tqdm

    if metric not in METRICS:
        raise ValueError(f"evaluate: metric must be one of {', '.join(METRICS)}, got {metric!r}")
    scores = {}
    with tqdm(total=sum(map(len, examples.values())), unit="example", disable=not progress) as bar:
        for language, of_language in examples.items():
            bar.set_description(f"evaluate {language}")
            encoded = trained.encode(of_language)
            labels = np.asarray([example["labels"] for example in encoded])
            if not encoded or bool((labels == IGNORED_LABEL).any()):
                raise ValueError(
                    f"evaluate: expected labelled examples in {language!r}, got none or some without a label"
                )
            predicted = predict(
                trained.model, encoded, trained.collate, batch_size=batch_size, dtype=dtype, progress=bar.update
            )
            scores[language] = METRICS[metric](predicted.numpy(), labels)
    return scores


def result_row(scores: Mapping[str, float], **facts: Any) -> dict[str, Any]:
    """One run as a plain dict: the facts (method, shots, seed, ...), "scores" by language, and their "mean"."""
    return {**facts, "scores": dict(scores), "mean": statistics.fmean(scores.values())}


def summarize(rows: Iterable[Mapping[str, Any]], by: Sequence[str] = _GROUP) -> list[dict[str, Any]]:
    """Rows that differ in nothing of `by` (so, in their seed) become one, in order of appearance.

    It has the facts of `by`, "runs", and in "scores", per language and for "AVG" (the mean over languages), the pair
    (mean, standard deviation) over runs; the deviation is that of a sample, NaN for a single run.
    Raises ValueError when the runs of a group were evaluated on different languages.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(fact) for fact in by), []).append(row)
    summaries = []
    for facts, members in groups.items():
        languages = list(members[0]["scores"])
        if any(set(member["scores"]) != set(languages) for member in members):
            raise ValueError(f"summarize: the runs of {dict(zip(by, facts, strict=True))} have different languages")
        values = {language: [member["scores"][language] for member in members] for language in languages}
        values[AVERAGE] = [statistics.fmean(member["scores"].values()) for member in members]
        summaries.append(
            {
                **dict(zip(by, facts, strict=True)),
                "runs": len(members),
                "scores": {
                    name: (statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else float("nan"))
                    for name, v in values.items()
                },
            }
        )
    return summaries


def markdown_table(
    summaries: Sequence[Mapping[str, Any]],
    *,
    by: Sequence[str] = _GROUP,
    reference: Mapping[tuple[Any, ...], Mapping[str, float]] | None = None,
) -> str:
    """A Markdown table of summaries: one column per language, then their mean with its deviation; in percent.

    reference: facts of `by` -> column -> percent as printed in a paper; such a row comes below its own.
    """
    languages = sorted({name for summary in summaries for name in summary["scores"]} - {AVERAGE})
    columns = [*languages, AVERAGE]
    lines = [[*by, "runs", *columns], ["---"] * len(by) + ["---:"] * (1 + len(columns))]
    for summary in summaries:
        facts = tuple(summary[fact] for fact in by)
        cells = [_percent(*summary["scores"][name]) if name in summary["scores"] else "" for name in columns]
        lines.append([*map(str, facts), str(summary["runs"]), *cells])
        if reference and facts in reference:
            printed = reference[facts]
            cells = [f"{printed[name]:.2f}" if name in printed else "" for name in columns]
            lines.append([f"{facts[0]} (paper)", *map(str, facts[1:]), "", *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _percent(mean: float, deviation: float) -> str:
    return f"{100 * mean:.2f}" if deviation != deviation else f"{100 * mean:.2f} ± {100 * deviation:.2f}"
