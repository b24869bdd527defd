"""Labelled sentence pairs, and files of pairs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltp_sparse.tasks.files import read_rows, suffix_of, text_in
from ltp_sparse.weights.reading import FileFormatError, Place, reader

LABELS = ("entailment", "neutral", "contradiction")
"""The labels, in the order of their numbers in XNLI and AmericasNLI."""

CLASSES = ("contradiction", "entailment", "neutral")
"""The same labels in the order of the logits."""

_SENTENCES = ("premise", "hypothesis")


@dataclass(frozen=True)
class Pair:
    """A premise, a hypothesis, one of `LABELS` (None: not labelled), and the language of both ("en", "aym", ...)."""

    premise: str
    hypothesis: str
    label: str | None
    language: str


def require_label(label: Any, labels: Sequence[str], where: Place, column: str = "label") -> str:
    """The label, checked to be one of `labels`."""
    if label not in labels:
        raise where.error(f"expected one of {', '.join(labels)} in column {column}, got {label!r}")
    return str(label)


def checked_label(label: Any, where: Place) -> str:
    """The label of a pair, checked to be one of `LABELS`."""
    return require_label(label, LABELS, where)


def numbered_label(label: Any, where: Place) -> str:
    """The label of a pair from its number in XNLI, or from its name."""
    return checked_label(LABELS[label] if type(label) is int and 0 <= label < len(LABELS) else label, where)


def pair_in(
    row: dict[str, Any], where: Place, language: str, label: str | None, columns: Sequence[str] = _SENTENCES
) -> Pair:
    """The pair of a row, whose two columns must be texts."""
    premise, hypothesis = (text_in(row, column, where) for column in columns)
    return Pair(premise, hypothesis, label, language)


def check_balance(pairs: Iterable[Pair], per_class: int, path: Path) -> None:
    """Raises a FileFormatError unless every label occurs `per_class` times."""
    labels = [pair.label for pair in pairs]
    counts = {label: labels.count(label) for label in LABELS}
    if any(count != per_class for count in counts.values()):
        raise FileFormatError(
            path, f"expected {per_class} pairs of each label, got {counts}; the file is not the original"
        )


@reader("labelled pairs")
def read_pairs(path: str | os.PathLike[str], language: str = "") -> list[Pair]:
    """Pairs from a .tsv, .csv or .jsonl file (also .gz) with the columns premise and hypothesis, and optionally label.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: there is no pair in it, a column is missing, a row is short, a value is no text, or a label is
            unknown; file and row are named.
    """
    path = Path(path)
    if suffix_of(path) not in ("tsv", "csv", "jsonl"):
        raise ValueError(f"{path}: expected a .tsv, .csv or .jsonl file, got .{suffix_of(path)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected pairs with the columns premise and hypothesis")
    pairs = []
    for where, row in read_rows(path):
        label = row.get("label")
        label = None if label in (None, "") else checked_label(label, where)
        pairs.append(pair_in(row, where, language, label))
    if not pairs:
        raise FileFormatError(path, "no pair in it; expected a header with premise and hypothesis, then pairs")
    if blank := sum(not (pair.premise.strip() and pair.hypothesis.strip()) for pair in pairs):
        warnings.warn(f"{path}: {blank:,} of {len(pairs):,} pairs have a blank premise or hypothesis", stacklevel=2)
    return pairs
