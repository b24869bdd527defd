"""MultiNLI (Williams et al. 2018), and 9,000 of its training pairs with machine translations."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from ltp_sparse.tasks.files import existing, folder_of, read_jsonl
from ltp_sparse.tasks.hub import hub_pairs
from ltp_sparse.tasks.pairs import Pair, checked_label, numbered_label, pair_in

HUB_NAME = "nyu-mll/multi_nli"
SUBSET_LANGUAGES = ("de", "en", "es", "fr", "sw", "tr", "vi", "zh")

_SPLITS = {"train": ("train", "train"), "dev": ("dev_matched", "validation_matched")}
_SHUFFLE_SEED = 0
_SUBSET_DEV = 900


def multinli(split: str, language: str, data: Path | None, *_: Any) -> list[Pair]:
    """Training pairs (392,702) or those of validation_matched ("dev", 9,815), in English.

    Args:
        split: "train" or "dev".
        language: "en".
        data: the folder with `multinli_1.0_train.jsonl` and `multinli_1.0_dev_matched.jsonl`; None: the Hub. Pairs on
            which the annotators did not agree (label "-") are left out, as the authors of the data set recommend.
    """
    if split not in _SPLITS:
        raise ValueError(f"multinli: split must be train or dev, got {split!r}; it has no labelled test set")
    file, hub = _SPLITS[split]
    if data is None:
        return hub_pairs(HUB_NAME, None, hub, language)
    path = existing(folder_of(data, "multinli", "multinli_1.0") / f"multinli_1.0_{file}.jsonl")
    rows = read_jsonl(path, ("sentence1", "sentence2", "gold_label"))
    return [
        pair_in(row, where, language, checked_label(row["gold_label"], where), ("sentence1", "sentence2"))
        for where, row in rows
        if row["gold_label"] != "-"
    ]


def multinli_subset(split: str, language: str, data: Path | None, *_: Any) -> list[Pair]:
    """`mnli_9k`: 8,100 training and 900 dev pairs of MultiNLI's training set, also machine-translated.

    The file is sorted by label, so the pairs are shuffled, in the same order for every language: they are parallel.

    Args:
        split: "train" or "dev".
        language: one of `SUBSET_LANGUAGES`.
        data: the folder with `{language}/train.jsonl.gz`; it is not on the Hub.
    """
    if split not in ("train", "dev"):
        raise ValueError(f"mnli-9k: split must be train or dev, got {split!r}")
    if data is None:
        raise ValueError(
            "mnli-9k: this subset is not on the Hub; pass a data folder that holds mnli_9k/, or use multinli"
        )
    path = existing(folder_of(data, "mnli_9k") / language / "train.jsonl")
    rows = read_jsonl(path, ("premise", "hypothesis", "label"))
    pairs = [pair_in(row, where, language, numbered_label(row["label"], where)) for where, row in rows]
    random.Random(_SHUFFLE_SEED).shuffle(pairs)
    return pairs[:-_SUBSET_DEV] if split == "train" else pairs[-_SUBSET_DEV:]
