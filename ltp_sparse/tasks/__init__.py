"""Data: labelled pairs and texts of the tasks, and plain text."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
        name: its name in recipes and on the command line.
        languages: all of its languages, or for SIB-200 (205 languages) the default ones.
        read: (split, language, data folder or None, shots, seed) -> examples. Some readers ignore shots and seed.
        labels: the classes, in the order of the logits.
        metric: "accuracy" or "macro_f1".
        kind: "pair" or "text".
    """

    name: str
    languages: tuple[str, ...]
    read: Callable[[str, str, Path | None, int | None, int], Sequence[Any]]
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
            split: "train", "dev" or "test". Not every task has all of them.
            language: one of `languages`.
            shots: examples per class of "train", and fewer of "dev". Tasks with pairs have fixed samples; texts are
                drawn (`texts.few_shot`). None: all examples.
            data: folder of the original files, or a folder that holds it under the data set's name; None: the Hub.
            seed: seed of the draw, if the task has no fixed samples.

        Returns:
            The examples.

        Raises:
            ValueError: unknown names, or a bad row (file, row and column are named).
            FileNotFoundError: files are missing.
        """
        if language not in self.languages and self.name != "sib200":
            raise ValueError(f"{self.name}: language must be one of {', '.join(self.languages)}, got {language!r}")
        examples = self.read(split, language, None if data is None else Path(data), shots, seed)
        if self.kind != "text" or shots is None or split == "test":
            return examples
        try:
            return few_shot(examples, split, self.labels, shots, seed)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None


_TASKS = (
    Task("xnli", _xnli.LANGUAGES, _xnli.xnli),
    Task("xnli-fewshot", _xnli.LANGUAGES, _xnli.few_shot),
    Task("americasnli", _americasnli.LANGUAGES, _americasnli.americasnli),
    Task("americasnli-first", _americasnli.LANGUAGES, partial(_americasnli.americasnli, revised=False)),
    Task("multinli", ("en",), _multinli.multinli),
    Task("mnli-9k", _multinli.SUBSET_LANGUAGES, _multinli.multinli_subset),
    Task("smsa", ("id",), _smsa.smsa, _smsa.LABELS, "macro_f1", "text"),
    Task("smsa-full", ("id",), partial(_smsa.smsa, trimmed=False), _smsa.LABELS, "macro_f1", "text"),
    Task("nusax", tuple(_nusax.FOLDERS), _nusax.nusax, _smsa.LABELS, "macro_f1", "text"),
    Task("generated", _generated.LANGUAGES, _generated.generated),
    Task("sib200", _sib200.XNLI_LANGUAGES, _sib200.sib200, _sib200.LABELS, "accuracy", "text"),
)

TASKS: dict[str, Task] = {task.name: task for task in _TASKS}


def task(name: str) -> Task:
    """A task by its name. Raises ValueError, with the known names, if there is none."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; expected one of {', '.join(TASKS)}")
    return TASKS[name]


def languages(name: str) -> tuple[str, ...]:
    """The languages of a task."""
    return task(name).languages


def tested(name: str, asked: str | Sequence[str] | None, train_language: str) -> tuple[str, ...]:
    """The languages on which a recipe tests.

    Args:
        name: the task.
        asked: a list of languages, the name of one of SIB-200's lists, "same" for the language of training, or None for
            all languages of the task.
        train_language: the language of training.

    Raises:
        ValueError: `asked` is an unknown name.
    """
    if asked is None:
        return task(name).languages
    if asked == "same":
        return (train_language,)
    if not isinstance(asked, str):
        return tuple(asked)
    if name != "sib200" or asked not in _sib200.LISTS:
        raise ValueError(
            f"{name}: languages must be a list, same or, for sib200, {', '.join(_sib200.LISTS)}; got {asked!r}"
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
    """`task(name).load(...)` for tasks with fixed samples."""
    return list(task(name).load(split, language, shots=shots, data=data))
