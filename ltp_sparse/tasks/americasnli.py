"""AmericasNLI (Ebrahimi et al. 2022): ten indigenous languages of the Americas, from original files or the Hub."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from ltp_sparse.tasks.files import existing, folder_of, read_table
from ltp_sparse.tasks.hub import hub_pairs
from ltp_sparse.tasks.pairs import LABELS, Pair, checked_label, pair_in
from ltp_sparse.weights.reading import FileFormatError

LANGUAGES = ("aym", "bzd", "cni", "gn", "hch", "nah", "oto", "quy", "shp", "tar")
HUB_NAME = "nala-cub/americas_nli"

_SPLITS = ("train", "dev", "test")
_DRAW_SEED = 0


def americasnli(
    split: str, language: str, data: Path | None, shots: int | None = None, *_: Any, revised: bool = True
) -> list[Pair]:
    """Pairs of one language.

    Args:
        split: "dev" and "test" are the released sets. With `shots`, "train" and "dev" are two disjoint draws from the
            released dev set, always the same (docs/papers.md).
        language: one of `LANGUAGES`.
        data: the folder with `dev.tsv`, `test.tsv` and `revised/`; None: the Hub.
        shots: pairs per class; None: all.
        revised: the later release of the dev set (used by LTP) instead of the first one (used by the SFT papers).
    """
    if split not in _SPLITS or (split == "train" and shots is None):
        raise ValueError(f"americasnli: split must be dev or test, or train or dev with shots, got {split!r}")
    if split == "test" or shots is None:
        return _released(split, language, data, revised)
    released = _released("dev", language, data, revised)
    draws = random.Random(_DRAW_SEED)
    chosen: list[Pair] = []
    for label in LABELS:
        of_label = [pair for pair in released if pair.label == label]
        if len(of_label) < 2 * shots:
            raise ValueError(
                f"americasnli: {language} has {len(of_label)} dev pairs of {label}; "
                f"two draws of {shots} need {2 * shots}"
            )
        drawn = draws.sample(of_label, 2 * shots)
        chosen += drawn[:shots] if split == "train" else drawn[shots:]
    return chosen


def _released(split: str, language: str, data: Path | None, revised: bool) -> list[Pair]:
    if data is None:
        return hub_pairs(HUB_NAME, language, split, language)
    folder = folder_of(data, "americasnli")
    path = existing(folder / ("revised/anli.dev.tsv" if split == "dev" and revised else f"{split}.tsv"))
    pairs = [
        pair_in(row, where, language, checked_label(row["label"], where))
        for where, row in read_table(path, ("language", "premise", "hypothesis", "label"))
        if row["language"] == language
    ]
    if not pairs:
        raise FileFormatError(path, f"no row of language {language!r} in column language")
    return pairs
