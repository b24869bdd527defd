"""NusaX-senti: sentiment in 12 languages of Indonesia, parallel (Winata et al. 2023)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ltp_sparse.tasks.files import existing, folder_of, read_table
from ltp_sparse.tasks.smsa import LABELS
from ltp_sparse.tasks.texts import Text, hub_texts, labelled_text

FOLDERS = {
    "ace": "acehnese",
    "ban": "balinese",
    "bjn": "banjarese",
    "bug": "buginese",
    "eng": "english",
    "ind": "indonesian",
    "jav": "javanese",
    "mad": "madurese",
    "min": "minangkabau",
    "nij": "ngaju",
    "sun": "sundanese",
    "bbc": "toba_batak",
}
"""ISO 639-3 code -> folder of the original files."""

HUB_NAME = "indonlp/NusaX-senti"

_SPLITS = {"train": "train", "dev": "valid", "test": "test"}


def nusax(split: str, language: str, data: Path | None, *_: Any) -> list[Text]:
    """500, 100 or 400 texts of a language.

    Args:
        split: "train", "dev" or "test".
        language: a key of `FOLDERS`.
        data: the folder with `acehnese/train.csv`, ...; None: the Hub.
    """
    if split not in _SPLITS:
        raise ValueError(f"nusax: split must be one of {', '.join(_SPLITS)}, got {split!r}")
    if data is None:
        return hub_texts(HUB_NAME, language, split, language, LABELS)
    path = existing(folder_of(data, "nusax_senti") / FOLDERS[language] / f"{_SPLITS[split]}.csv")
    # some texts contain line breaks, inside quotes
    rows = read_table(path, ("id", "text", "label"), quoted=True, comma=True)
    return [labelled_text(row, where, LABELS, language) for where, row in rows]
