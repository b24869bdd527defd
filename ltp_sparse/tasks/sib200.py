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

XGLM_LANGUAGES = (
    "arb_Arab", "ben_Beng", "bul_Cyrl", "cat_Latn", "deu_Latn", "ell_Grek", "eng_Latn", "est_Latn", "eus_Latn",
    "fin_Latn", "fra_Latn", "hat_Latn", "hin_Deva", "ind_Latn", "ita_Latn", "jpn_Jpan", "kor_Hang", "mya_Mymr",
    "por_Latn", "quy_Latn", "rus_Cyrl", "spa_Latn", "swh_Latn", "tam_Taml", "tel_Telu", "tha_Thai", "tur_Latn",
    "urd_Arab", "vie_Latn", "zho_Hans",
)  # fmt: skip
"""The 30 languages that XGLM was trained on."""

BLOOM_LANGUAGES = (
    "aka_Latn", "arb_Arab", "asm_Beng", "bam_Latn", "ben_Beng", "cat_Latn", "eng_Latn", "eus_Latn", "fon_Latn",
    "fra_Latn", "guj_Gujr", "hin_Deva", "ibo_Latn", "ind_Latn", "kan_Knda", "kik_Latn", "kin_Latn", "lin_Latn",
    "lug_Latn", "mal_Mlym", "mar_Deva", "npi_Deva", "nso_Latn", "nya_Latn", "ory_Orya", "pan_Guru", "por_Latn",
    "run_Latn", "sna_Latn", "sot_Latn", "spa_Latn", "swh_Latn", "tam_Taml", "tel_Telu", "tsn_Latn", "tso_Latn",
    "tum_Latn", "twi_Latn", "urd_Arab", "vie_Latn", "wol_Latn", "xho_Latn", "yor_Latn", "zho_Hans", "zho_Hant",
    "zul_Latn",
)  # fmt: skip
"""The 46 that BLOOM was trained on, Chinese in both of its scripts."""

LISTS = {"xnli": XNLI_LANGUAGES, "xglm": XGLM_LANGUAGES, "bloom": BLOOM_LANGUAGES}
"""Lists by name, for recipes."""

_SPLITS = ("train", "dev", "test")


def sib200(split: str, language: str, data: Path | None, *_: Any) -> list[Text]:
    """701, 99 or 204 sentences of a language, the same ones in every language.

    Args:
        split: "train", "dev" or "test".
        language: a FLORES-200 code.
        data: the folder with `eng_Latn/train.tsv`, ...; None: the Hub.
    """
    if split not in _SPLITS:
        raise ValueError(f"sib200: split must be one of {', '.join(_SPLITS)}, got {split!r}")
    if data is None:
        return hub_texts(HUB_NAME, language, split, language, LABELS, label="category")
    path = existing(folder_of(data, "sib200") / language / f"{split}.tsv")
    rows = read_table(path, ("index_id", "category", "text"), quoted=True)
    return [labelled_text(row, where, LABELS, language, "category") for where, row in rows]
