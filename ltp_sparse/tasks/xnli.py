"""XNLI (Conneau et al. 2018) and its K-shot samples (Zhao & Schütze 2021), from original files or the Hub."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ltp_sparse.tasks.files import existing, folder_of, read_columns, read_jsonl, read_table
from ltp_sparse.tasks.hub import hub_pairs
from ltp_sparse.tasks.pairs import Pair, check_balance, checked_label, pair_in
from ltp_sparse.weights.reading import FileFormatError

LANGUAGES = ("ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh")
SHOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
HUB_NAME = "facebook/xnli"

_ROWS = {"dev": 2490, "test": 5010}
_FAULTY_ARABIC_FROM = 382_175
"""Arabic training rows with this MultiNLI index or a higher one have the hypothesis of another example."""


class FaultyRows(UserWarning):
    """A data set has rows with known errors."""


def few_shot(split: str, language: str, data: Path | None, shots: int | None, *_: Any) -> list[Pair]:
    """The sample of `shots` pairs per class. There is one per number of shots, the same for all seeds (docs/papers.md).

    Args:
        split: "train" (MultiNLI and its translations) or "dev" (from XNLI dev).
        language: one of `LANGUAGES`.
        data: the folder with `train/` and `dev/` of the original files, which are not on the Hub.
        shots: one of `SHOTS`.
    """
    if split not in ("train", "dev"):
        raise ValueError(f"xnli-fewshot: split must be train or dev, got {split!r}; test on the task xnli")
    if shots not in SHOTS:
        raise ValueError(f"xnli-fewshot: shots must be one of {', '.join(map(str, SHOTS))}, got {shots}")
    if data is None:
        raise ValueError(
            "xnli-fewshot: the K-shot samples are not on the Hub; pass the folder common_datasets of the repository "
            "mprompting/xlmrprompt as the data folder"
        )
    base = folder_of(data, "xnli_fewshot") / split
    name = f"en/{split}_split,{shots}.jsonl" if language == "en" else f"rest/{split}_split,{language},{shots}.jsonl"
    path = existing(base / name)
    pairs, faulty = [], 0
    for where, row in read_jsonl(path, ("lang", "sentence1", "sentence2", "gold")):
        if row["lang"] != language:
            raise where.error(f"expected language {language!r} in column lang, got {row['lang']!r}")
        if language == "ar" and split == "train":
            if not isinstance(index := row.get("file_idx"), int):
                raise where.error(f"expected a number in column file_idx, got {index!r}")
            faulty += index >= _FAULTY_ARABIC_FROM
        pairs.append(pair_in(row, where, language, checked_label(row["gold"], where), ("sentence1", "sentence2")))
    check_balance(pairs, shots, path)
    if faulty:
        warnings.warn(
            f"{path}: {faulty} of {len(pairs)} Arabic rows have the hypothesis of another example (a known fault of "
            "the original file); they are kept",
            FaultyRows,
            stacklevel=2,
        )
    return pairs


def xnli(split: str, language: str, data: Path | None, *_: Any) -> list[Pair]:
    """XNLI dev (2,490 pairs) or test (5,010) of one language.

    Args:
        split: "dev" or "test".
        language: one of `LANGUAGES`.
        data: the folder with `dev/`, `test/` and `test-labels.tsv`; None: the Hub.
    """
    if split not in _ROWS:
        raise ValueError(f"xnli: split must be dev or test, got {split!r}; train on xnli-fewshot")
    if data is None:
        return hub_pairs(HUB_NAME, language, split, language)
    data = folder_of(data, "xnli")
    path = existing(data / split / f"{split}-{language}.tsv")
    columns = ("premise", "hypothesis", "label") if split == "dev" else ("premise", "hypothesis")
    rows = list(read_columns(path, columns))
    labelled = rows if split == "dev" else read_table(existing(data / "test-labels.tsv"), ("label",))
    labels = [checked_label(row["label"], where) for where, row in labelled]
    if not len(rows) == len(labels) == _ROWS[split]:
        raise FileFormatError(path, f"expected {_ROWS[split]} pairs and labels, got {len(rows)} and {len(labels)}")
    pairs = zip(rows, labels, strict=True)
    return [Pair(row["premise"], row["hypothesis"], label, language) for (_, row), label in pairs]
