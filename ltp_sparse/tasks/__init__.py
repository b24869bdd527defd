"""Data: labelled sentence pairs of the tasks, and plain text."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ltp_sparse.tasks import americasnli as _americasnli
from ltp_sparse.tasks import xnli as _xnli
from ltp_sparse.tasks.pairs import LABELS, Pair, read_pairs
from ltp_sparse.tasks.text import read_hub_text, read_text

__all__ = ["LABELS", "TASKS", "Pair", "Task", "languages", "load_pairs", "read_hub_text", "read_pairs", "read_text"]


@dataclass(frozen=True)
class Task:
    """A data set of labelled pairs: its languages, and a reader of (split, language, shots, data folder)."""

    languages: tuple[str, ...]
    read: Callable[[str, str, int | None, Path | None], list[Pair]]


TASKS: dict[str, Task] = {
    "xnli": Task(_xnli.LANGUAGES, _xnli.xnli),
    "xnli-fewshot": Task(_xnli.LANGUAGES, _xnli.few_shot),
    "americasnli": Task(_americasnli.LANGUAGES, _americasnli.americasnli),
}


def _task(name: str) -> Task:
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; expected one of {', '.join(TASKS)}")
    return TASKS[name]


def languages(task: str) -> tuple[str, ...]:
    """The languages of a task."""
    return _task(task).languages


def load_pairs(
    task: str,
    split: str,
    language: str,
    *,
    shots: int | None = None,
    data: str | os.PathLike[str] | None = None,
) -> list[Pair]:
    """Labelled pairs of a task.

    Args:
        task: "xnli" (dev, test), "xnli-fewshot" (train, dev; needs shots), "americasnli" (dev, test; with shots also
            train).
        split: "train", "dev" or "test".
        language: one of `languages(task)`.
        shots: pairs per class.
        data: folder of the original files, or one that holds it under the data set's name; None: the Hub by name.

    Raises:
        ValueError, FileNotFoundError: unknown names, missing files, or a bad row (file, row and column are named).
    """
    if language not in languages(task):
        raise ValueError(f"{task}: language must be one of {', '.join(languages(task))}, got {language!r}")
    return _task(task).read(split, language, shots, None if data is None else Path(data))
