"""Scores by kinship of languages: whether a method favours relatives of the language of training."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ltp_sparse.recipes.recipe import look_up
from ltp_sparse.report.escaping import Sheet, plain
from ltp_sparse.report.tables import figure, grouped

_FAMILIES = {
    "Indo-European, Germanic": "deu eng nld",
    "Indo-European, Romance": "cat fra hat ita por spa",
    "Indo-European, Slavic": "bul rus ukr",
    "Indo-European, Greek": "ell",
    "Indo-European, Iranian": "pes",
    "Indo-European, Indic": "asm ben guj hin mar npi ory pan urd",
    "Dravidian": "kan mal tam tel",
    "Afro-Asiatic, Semitic": "amh arb",
    "Niger-Congo, Bantu": "kik kin lin lug nso nya run sna sot swh tsn tso tum xho zul",
    "Niger-Congo, Kwa": "aka fon twi",
    "Niger-Congo, others": "bam ibo wol yor",
    "Austronesian, Malayo-Polynesian": "ace ban bjn bug ind jav min sun",
    "Sino-Tibetan, Sinitic": "zho",
    "Sino-Tibetan, Burmese": "mya",
    "Uralic, Finnic": "est fin",
    "Turkic": "tur",
    "Kra-Dai": "tha",
    "Austro-Asiatic": "vie",
    "Japonic": "jpn",
    "Koreanic": "kor",
    "Quechuan": "quy",
    "Aymaran": "ayr",
    "Tupian": "grn",
    "isolate": "eus",
}
_XNLI = (
    "ar:arb bg:bul de:deu el:ell en:eng es:spa fr:fra hi:hin id:ind ru:rus sw:swh th:tha tr:tur ur:urd vi:vie zh:zho"
)
_CODES = dict(pair.split(":") for pair in _XNLI.split())
_FAMILY_OF = {code: family for family, codes in _FAMILIES.items() for code in codes.split()}
DEGREES = ("same branch", "same family", "others")


def kinship(language: str, other: str) -> str | None:
    """One of `DEGREES`; None for a language and itself, and if one of their families is not known."""
    one, two = (_CODES.get(code, code.partition("_")[0]) for code in (language, other))
    if one == two or one not in _FAMILY_OF or two not in _FAMILY_OF:
        return None
    if _FAMILY_OF[one] == _FAMILY_OF[two]:
        return DEGREES[0]
    return DEGREES[1] if _FAMILY_OF[one].split(",")[0] == _FAMILY_OF[two].split(",")[0] else DEGREES[2]


def kinship_sheet(rows: Sequence[Mapping[str, Any]], by: Sequence[str]) -> Sheet:
    """For each group of rows, the mean scores in percent by kinship with the language of training.

    The last column, "others / related", is the mean score of unrelated languages divided by that of related ones. The
    smaller it is, the more a method favours related languages. The language of training itself is left out.

    Args:
        rows: results, with "scores" by language and "train.language".
        by: dotted paths of the facts that make a group.
    """
    out = [[*by, *DEGREES, "others / related"]]
    for facts, members in grouped(rows, by).items():
        scores: dict[str, list[float]] = {}
        for row in members:
            for language, score in row["scores"].items():
                if (degree := kinship(look_up(row, "train.language"), language)) is not None:
                    scores.setdefault(degree, []).append(score)
        means = {degree: statistics.fmean(values) for degree, values in scores.items()}
        related = [value for degree in DEGREES[:2] for value in scores.get(degree, ())]
        shown = [f"{100 * means[degree]:.2f}" if degree in means else "" for degree in DEGREES]
        share = means[DEGREES[2]] / statistics.fmean(related) if related and DEGREES[2] in means else None
        out.append([*map(plain, facts), *shown, figure(share, "{:.3f}")])
    return Sheet(out, [False] * len(by) + [True] * 4)
