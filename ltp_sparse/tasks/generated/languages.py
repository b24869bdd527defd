"""The eight languages of the demo: a table of phrases, and the order of words that turns a fact into a sentence.

`phrases.tsv` lists every phrase in the form in which it is used (a definite subject, an indefinite object in the
accusative, a place), so nothing has to be derived by rules that have exceptions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ltp_sparse.tasks.files import read_table
from ltp_sparse.tasks.generated.facts import Fact
from ltp_sparse.tasks.pairs import LABELS


@dataclass(frozen=True)
class Language:
    """A language of the demo.

    Attributes:
        phrases: concept (agent, action, thing or place) -> phrase.
        order: the slots of a `Fact`, in the order of words.
        answers: label -> the word that answers "is that so?".
        asked: patterns of a question with its answer, with `{hypothesis}` and `{answer}`.
    """

    phrases: Mapping[str, str]
    order: tuple[str, ...]
    answers: Mapping[str, str]
    asked: tuple[str, ...]


def _read() -> dict[str, Language]:
    rows = {row.pop("concept"): row for _, row in read_table(Path(__file__).with_name("phrases.tsv"))}
    orders = rows.pop("order")
    answers = {label: rows.pop(label) for label in LABELS}
    questions = [rows.pop(name) for name in list(rows) if name.startswith("question")]
    return {
        language: Language(
            {concept: row[language] for concept, row in rows.items()},
            tuple(order.split()),
            {label: row[language] for label, row in answers.items()},
            tuple(row[language] for row in questions),
        )
        for language, order in orders.items()
    }


LANGUAGES: dict[str, Language] = _read()


def clause(fact: Fact, language: str) -> str:
    """The fact in a language, without capital letter and full stop."""
    grammar = LANGUAGES[language]
    concepts = (getattr(fact, slot) for slot in grammar.order)
    return " ".join(grammar.phrases[concept] for concept in concepts if concept is not None)


def capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def sentence(fact: Fact, language: str) -> str:
    """The fact as a sentence."""
    return capitalised(clause(fact, language)) + "."
