"""Labelled data in files: texts of four classes, and options to train on them."""

from __future__ import annotations

import random

from helpers.tiny_nli import CLUES, WORDS
from ltp_sparse.cli import main

LABELS = ("good", "bad", "so-so", "0")
COLUMNS = ("--text-column", "says", "--label-column", "class", "--language-column", "lang")
WORDS_GIVEN = ("--words", "good=right", "bad=wrong", "so-so=maybe", "0=word9")
QUICK = ("--epochs", 6, "--max-length", 24, "--learning-rate", 1e-2, "--batch-size", 8, "--quiet", "--seeds", 1)


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def rows(count: int, seed: int = 0, languages=("quy", "aym")) -> list[dict]:
    """Texts of four classes, which follow from the first word; one class is the number 0."""
    draws = random.Random(seed)
    clues = [*CLUES.values(), "word0"]
    return [
        {
            "lang": languages[i // 4 % len(languages)],
            "says": f"{clues[i % 4]} {draws.choice(WORDS)} {draws.choice(WORDS)}",
            "second": draws.choice(WORDS),
            "class": LABELS[i % 4],
        }
        for i in range(count)
    ]


def write_tsv(path, found, columns=("lang", "says", "second", "class")):
    lines = ["\t".join(columns), *("\t".join(str(row[name]) for name in columns) for row in found)]
    path.write_text("\n".join([*lines, ""]))
    return path
