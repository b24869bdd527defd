"""SMSA: sentiment of Indonesian texts (Purwarianti & Crisdayanti 2019), in full and trimmed for NusaX (LT-SFT)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ltp_sparse.tasks.files import existing, folder_of, read_columns, read_table
from ltp_sparse.tasks.texts import Text, hub_texts, labelled_text
from ltp_sparse.weights.reading import Place

LABELS = ("negative", "neutral", "positive")
"""In the order of their numbers in the trimmed files."""

HUB_NAME = "indonlp/indonlu"

_FULL = {"train": "train", "dev": "valid", "test": "test"}
_TRIMMED = {"train": "train", "dev": "validation", "test": "test"}


def smsa(split: str, language: str, data: Path | None, *_: Any, trimmed: bool = True) -> list[Text]:
    """Texts of a split: 11,000, 1,260 and 500, or trimmed 10,617, 1,251 and 492.

    Args:
        split: "train", "dev" or "test".
        language: "id".
        data: the folder with `train_preprocess.tsv`, ... and `trimmed/train.tsv`, ...; None: the Hub, which has the
            full set only.
        trimmed: leave out near-copies of texts in NusaX's test set, for tests on NusaX.
    """
    names = _TRIMMED if trimmed else _FULL
    if split not in names:
        raise ValueError(f"smsa: split must be one of {', '.join(names)}, got {split!r}")
    if data is None and trimmed:
        raise ValueError("smsa: the trimmed set is not on the Hub; pass a data folder, or use smsa-full")
    if data is None:
        return hub_texts(HUB_NAME, "smsa", split, language, LABELS)
    folder = folder_of(data, "smsa")
    if trimmed:
        path = existing(folder / "trimmed" / f"{names[split]}.tsv")
        by_number = {str(number): label for number, label in enumerate(LABELS)}
        rows: Iterable[tuple[Place, dict[str, str]]] = (
            (where, {**row, "label": by_number.get(row["label"], row["label"])})
            for where, row in read_table(path, ("text", "label"))
        )
    else:
        rows = read_columns(existing(folder / f"{names[split]}_preprocess.tsv"), ("text", "label"))
    return [labelled_text(row, where, LABELS, language) for where, row in rows]
