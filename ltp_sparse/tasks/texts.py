"""Labelled texts, and the functions that their readers share. Plain text for tuning is in `text.py`."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ltp_sparse.tasks.files import text_in
from ltp_sparse.tasks.hub import hub_rows
from ltp_sparse.tasks.pairs import require_label
from ltp_sparse.weights.reading import Place


@dataclass(frozen=True)
class Text:
    """A text, its label (a class of the task; None: not labelled), and its language ("en", "ace", "swh_Latn", ...)."""

    text: str
    label: str | None
    language: str


def hub_texts(
    name: str, config: str | None, split: str, language: str, labels: Sequence[str], *, label: str = "label"
) -> list[Text]:
    """One split of a Hub data set with a column "text" and a column of labels.

    Args:
        name, config, split: as in `hub_rows`.
        language: language of the texts.
        labels: the classes.
        label: name of the column of labels.
    """
    rows = hub_rows(name, config, split, ("text", label))
    return [labelled_text(row, where, labels, language, label) for where, row in rows]


def labelled_text(
    row: dict[str, Any], where: Place, labels: Sequence[str], language: str, label: str = "label"
) -> Text:
    """The text and label of a row; the text must not be blank, the label be one of `labels`."""
    text = text_in(row, "text", where)
    if not text.strip():
        raise where.error("no text in column text; the file is not the original")
    return Text(text, require_label(row[label], labels, where, label), language)


def few_shot(texts: Sequence[Text], split: str, labels: Sequence[str], shots: int, seed: int) -> list[Text]:
    """Draws the same number of texts from each class.

    If the languages of a data set are parallel and in the same order, the same texts are drawn from each.

    Args:
        texts: labelled texts.
        split: "train" takes `shots` texts per class; "dev" takes a quarter of that, rounded up, or the size of its
            smallest class if that is less.
        labels: the classes.
        shots: training texts per class.
        seed: seed of the draw.

    Raises:
        ValueError: a class has no text, or a class of "train" fewer than `shots`.
    """
    by_label = {label: [i for i, text in enumerate(texts) if text.label == label] for label in labels}
    smallest = min(map(len, by_label.values()))
    wanted = shots if split == "train" else min(smallest, math.ceil(shots / 4))
    if not 1 <= wanted <= smallest:
        raise ValueError(f"shots must be in [1, {smallest}], the smallest class of {split}, got {shots}")
    draws = random.Random(seed)
    chosen = [i for label in labels for i in draws.sample(by_label[label], wanted)]
    draws.shuffle(chosen)
    return [texts[i] for i in chosen]
