"""Labelled pairs from the Hub (or a local copy of a Hub data set) by name."""

from __future__ import annotations

from ltp_sparse.reading import Place
from ltp_sparse.tasks.pairs import LABELS, Pair, pair_in


def hub_pairs(name: str, config: str | None, split: str, language: str) -> list[Pair]:
    """One split of a data set with the columns premise, hypothesis and label (its number or its word).

    name: Hub name, or a folder that `datasets.load_dataset` reads.
    """
    from datasets import ClassLabel, load_dataset

    data = load_dataset(name, config, split=split)
    if missing := {"premise", "hypothesis", "label"} - set(data.column_names):
        raise ValueError(f"{name} ({config}, {split}): no column {sorted(missing)[0]!r}, only {data.column_names}")
    feature = data.features["label"]
    names = tuple(feature.names) if isinstance(feature, ClassLabel) else LABELS
    if set(names) != set(LABELS):
        raise ValueError(f"{name}: expected the labels {', '.join(LABELS)}, got {', '.join(names)}")
    pairs = []
    for number, row in enumerate(data):
        label, where = row["label"], Place(f"{name} ({config}, {split})", f"row {number}")
        word = names[label] if isinstance(label, int) and 0 <= label < len(names) else label
        if word not in LABELS:
            raise where.error(f"expected a label, got {label!r}")
        pairs.append(pair_in(row, where, language, word))
    return pairs
