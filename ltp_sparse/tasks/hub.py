"""Data sets from the Hub by name, or from a local copy."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from ltp_sparse.tasks.pairs import Pair, numbered_label, pair_in
from ltp_sparse.weights.hub import hub_answers
from ltp_sparse.weights.reading import Place


def load_hub(name: str, config: str | None, **options: Any) -> Any:
    """`datasets.load_dataset`; from its cache if the Hub cannot be reached, without half a minute of retries.

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


def rows_with_names(data: Any) -> Iterator[dict[str, Any]]:
    """Rows of a `datasets.Dataset`, with names of classes in place of their numbers; None for -1 (not labelled)."""
    from datasets import ClassLabel

    classes = {column: feature.names for column, feature in data.features.items() if isinstance(feature, ClassLabel)}
    for row in data:
        for column, names in classes.items():
            number = row[column]
            row[column] = None if number is None or not 0 <= number < len(names) else names[number]
        yield row


def hub_rows(
    name: str, config: str | None, split: str, columns: Sequence[str]
) -> Iterator[tuple[Place, dict[str, Any]]]:
    """(place, row) of one split of a data set.

    Args:
        name: name of the data set on the Hub, or a folder that `datasets.load_dataset` reads.
        config: its configuration.
        split: its split; "dev" is called "validation" there.
        columns: required columns.

    Raises:
        ValueError: a column is missing.
    """
    split = "validation" if split == "dev" else split
    data, source = load_hub(name, config, split=split), f"{name} ({config}, {split})"
    if missing := set(columns) - set(data.column_names):
        raise ValueError(f"{source}: no column {min(missing)!r}, only {data.column_names}")
    for number, row in enumerate(rows_with_names(data)):
        yield Place(source, f"row {number}"), row


def hub_pairs(name: str, config: str | None, split: str, language: str) -> list[Pair]:
    """One split of a data set with the columns premise, hypothesis and label (its number or its name)."""
    rows = hub_rows(name, config, split, ("premise", "hypothesis", "label"))
    return [pair_in(row, where, language, numbered_label(row["label"], where)) for where, row in rows]
