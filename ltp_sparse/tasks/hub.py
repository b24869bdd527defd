"""What comes from the Hub by name, or from a local copy; labelled pairs of it."""

from __future__ import annotations

import os
from typing import Any

from ltp_sparse.tasks.pairs import LABELS, Pair, pair_in
from ltp_sparse.weights.hub import hub_answers
from ltp_sparse.weights.reading import Place


def load_hub(name: str, config: str | None, **options: Any) -> Any:
    """`datasets.load_dataset`; where the Hub does not answer, from its cache, without half a minute of tries.

    Raises:
        ValueError: the Hub cannot be reached, and the data set has not been downloaded before.
    """
    from datasets import load_dataset
    from huggingface_hub import constants

    if os.path.isdir(name) or hub_answers():
        return load_dataset(name, config, **options)
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        return load_dataset(name, config, **options)
    except ConnectionError as error:
        raise ValueError(
            f"no data set {name!r}: there is no such folder, it has not been downloaded before, and the Hub cannot be "
            "reached"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = before


def hub_pairs(name: str, config: str | None, split: str, language: str) -> list[Pair]:
    """One split of a data set with the columns premise, hypothesis and label (its number or its word).

    Args:
        name: Hub name, or a folder that `datasets.load_dataset` reads.
    """
    from datasets import ClassLabel

    data = load_hub(name, config, split=split)
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
