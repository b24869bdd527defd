"""Data: labelled pairs and texts of the tasks, and plain text."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltp_sparse.tasks import americasnli as _americasnli
from ltp_sparse.tasks import generated as _generated
from ltp_sparse.tasks import multinli as _multinli
from ltp_sparse.tasks import nusax as _nusax
from ltp_sparse.tasks import sib200 as _sib200
from ltp_sparse.tasks import smsa as _smsa
from ltp_sparse.tasks import xnli as _xnli
from ltp_sparse.tasks.pairs import CLASSES, LABELS, Pair, read_pairs
from ltp_sparse.tasks.text import read_hub_text, read_text
from ltp_sparse.tasks.texts import Text, few_shot

__all__ = [
    "LABELS",
    "TASKS",
    "Pair",
    "Task",
    "Text",
    "languages",
    "load_pairs",
    "read_hub_text",
    "read_pairs",
    "read_text",
    "task",
    "tested",
]


@dataclass(frozen=True)
class Task:
    """A data set of labelled pairs or texts.

    Attributes:
        name: by which recipes and the command line know it
        languages: what it has, or, of SIB-200's 205, those that are tested when none are named
        read: (split, language, shots, data folder or None, seed) -> examples
        labels: classes, in the order of the logits
        metric: "accuracy" or "macro_f1"
        kind: "pair" or "text"
    """

    name: str
    languages: tuple[str, ...]
    read: Callable[[str, str, int | None, Path | None, int], Sequence[Any]]
    labels: tuple[str, ...] = CLASSES
    metric: str = "accuracy"
    kind: str = "pair"

    def load(
        self,
        split: str,
        language: str,
        *,
        shots: int | None = None,
        data: str | os.PathLike[str] | None = None,
        seed: int = 0,
    ) -> Sequence[Any]:
        """Labelled examples: `Pair` or `Text`.

        Args:
            split: "train", "dev" or "test", of which a task may lack some.
            language: one of `languages`.
            shots: examples per class of "train", and some of "dev": a task's fixed samples of pairs, or a draw of texts
                (`texts.few_shot`); None: all.
            data: folder of the original files, or one that holds it under the data set's name; None: the Hub by name.
            seed: of few-shot draws, where a task has no fixed samples.

        Raises:
            ValueError, FileNotFoundError: unknown names, missing files, or a bad row (file, row and column are named).
        """
        if language not in self.languages and self.name != "sib200":
            raise ValueError(f"{self.name}: language must be one of {', '.join(self.languages)}, got {language!r}")
        examples = self.read(split, language, shots, None if data is None else Path(data), seed)
        if self.kind != "text" or shots is None or split == "test":
            return examples
        try:
            return few_shot(examples, split, self.labels, shots, seed)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None


_TASKS = (
    Task("xnli", _xnli.LANGUAGES, lambda split, lang, shots, data, seed: _xnli.xnli(split, lang, shots, data)),
    Task(
        "xnli-fewshot", _xnli.LANGUAGES, lambda split, lang, shots, data, seed: _xnli.few_shot(split, lang, shots, data)
    ),
    Task(
        "americasnli",
        _americasnli.LANGUAGES,
        lambda split, lang, shots, data, seed: _americasnli.americasnli(split, lang, shots, data),
    ),
    Task(
        "americasnli-first",
        _americasnli.LANGUAGES,
        lambda split, lang, shots, data, seed: _americasnli.americasnli(split, lang, shots, data, revised=False),
    ),
    Task("multinli", ("en",), lambda split, lang, shots, data, seed: _multinli.multinli(split, data)),
    Task(
        "mnli-9k",
        _multinli.SUBSET_LANGUAGES,
        lambda split, lang, shots, data, seed: _multinli.multinli_subset(split, lang, data),
    ),
    Task(
        "smsa",
        ("id",),
        lambda split, lang, shots, data, seed: _smsa.smsa(split, data),
        _smsa.LABELS,
        "macro_f1",
        "text",
    ),
    Task(
        "smsa-full",
        ("id",),
        lambda split, lang, shots, data, seed: _smsa.smsa(split, data, trimmed=False),
        _smsa.LABELS,
        "macro_f1",
        "text",
    ),
    Task(
        "nusax",
        tuple(_nusax.FOLDERS),
        lambda split, lang, shots, data, seed: _nusax.nusax(split, lang, data),
        _smsa.LABELS,
        "macro_f1",
        "text",
    ),
    Task(
        "generated",
        _generated.LANGUAGES,
        lambda split, lang, shots, data, seed: _generated.generated(split, lang, shots, seed),
    ),
    Task(
        "sib200",
        _sib200.XNLI_LANGUAGES,
        lambda split, lang, shots, data, seed: _sib200.sib200(split, lang, data),
        _sib200.LABELS,
        "accuracy",
        "text",
    ),
)

TASKS: dict[str, Task] = {task.name: task for task in _TASKS}


def task(name: str) -> Task:
    """A task by name; a ValueError lists the known ones."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; expected one of {', '.join(TASKS)}")
    return TASKS[name]


def languages(name: str) -> tuple[str, ...]:
    """The languages of a task."""
    return task(name).languages


def tested(name: str, asked: str | Sequence[str] | None, train_language: str) -> tuple[str, ...]:
    """The languages that a recipe asks for: a list, the name of one of SIB-200's, "same" for that of training, or None
    for those of the task.

    Raises:
        ValueError: an unknown name.
    """
    if asked is None:
        return task(name).languages
    if asked == "same":
        return (train_language,)
    if not isinstance(asked, str):
        return tuple(asked)
    if name != "sib200" or asked not in _sib200.LISTS:
        raise ValueError(
            f"{name}: languages must be a list, same or, of sib200, {', '.join(_sib200.LISTS)}: got {asked!r}"
        )
    return _sib200.LISTS[asked]


def load_pairs(
    name: str,
    split: str,
    language: str,
    *,
    shots: int | None = None,
    data: str | os.PathLike[str] | None = None,
) -> list[Any]:
    """`task(name).load(...)`, for tasks whose samples are fixed."""
    return list(task(name).load(split, language, shots=shots, data=data))
