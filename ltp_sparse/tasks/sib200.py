"""SIB-200: topics of sentences in 205 languages, parallel (Adelani et al. 2024)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ltp_sparse.tasks.files import existing, folder_of, read_table
from ltp_sparse.tasks.texts import Text, hub_texts, labelled_text

LABELS = ("science/technology", "travel", "politics", "sports", "health", "entertainment", "geography")
"""In the order of the original `labels.txt`."""

HUB_NAME = "Davlan/sib200"
XNLI_LANGUAGES = (
    "arb_Arab", "bul_Cyrl", "deu_Latn", "ell_Grek", "eng_Latn", "fra_Latn", "hin_Deva", "rus_Cyrl", "spa_Latn",
    "swh_Latn", "tha_Thai", "tur_Latn", "urd_Arab", "vie_Latn", "zho_Hans",
)  # fmt: skip
"""The languages of XNLI, by FLORES-200 code."""

_SPLITS = ("train", "dev", "test")


def sib200(split: str, language: str, data: Path | None, *_: Any) -> list[Text]:
    """701, 99 or 204 sentences of a language (a FLORES-200 code), the same ones in every language.

    `data`: the folder with `eng_Latn/train.tsv`, ...; None: the Hub.
    """
    if split not in _SPLITS:
        raise ValueError(f"sib200: split must be one of {', '.join(_SPLITS)}, got {split!r}")
    if data is None:
        return hub_texts(HUB_NAME, language, split, language, LABELS, label="category")
    path = existing(folder_of(data, "sib200") / language / f"{split}.tsv")
    rows = read_table(path, ("index_id", "category", "text"), quoted=True)
    return [labelled_text(row, where, LABELS, language, "category") for where, row in rows]
