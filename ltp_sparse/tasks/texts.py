"""A labelled text, and what its readers share."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ltp_sparse.tasks.files import text_in
from ltp_sparse.tasks.hub import load_hub
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
    """One split of a Hub data set (or a folder that `datasets.load_dataset` reads) with a text and a label.

    Args:
        label: the column of the label, its word or, if it is a ClassLabel, its number

    Raises:
        ValueError: a column is missing or a label unknown; the message names the row.
    """
    from datasets import ClassLabel

    data = load_hub(name, config, split=split)
    if missing := {"text", label} - set(data.column_names):
        raise ValueError(f"{name} ({config}, {split}): no column {sorted(missing)[0]!r}, only {data.column_names}")
    feature = data.features[label]
    texts = []
    for number, row in enumerate(data):
        value, where = row[label], Place(f"{name} ({config}, {split})", f"row {number}")
        if isinstance(feature, ClassLabel) and isinstance(value, int) and 0 <= value < len(feature.names):
            value = feature.names[value]
        texts.append(labelled_text({**row, label: value}, where, labels, language, label))
    return texts


def labelled_text(
    row: dict[str, Any], where: Place, labels: Sequence[str], language: str, label: str = "label"
) -> Text:
    """The text of a row, which must not be empty, with its label, which must be one of `labels`."""
    text = text_in(row, "text", where)
    if not text.strip():
        raise where.error("no text in column text; the file is not the original")
    return Text(text, require_label(row[label], labels, where, label), language)


def few_shot(texts: Sequence[Text], split: str, labels: Sequence[str], shots: int, seed: int) -> list[Text]:
    """`shots` texts a class of "train", and a quarter of it, rounded up, of "dev": as many as its smallest class has.

    Of data sets whose languages are parallel and in one order, every language gives the same texts.

    Raises:
        ValueError: the smallest class of "train" is smaller.
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
