"""The demo's own data: inference examples and plain text, the same meanings in all languages of `languages.LANGUAGES`.

Everything is drawn from a seed, nothing is read or downloaded. An example is drawn as two facts, whose label follows
from what they say (`facts.relation`), and only then put into words, so example i means the same, with the same label,
in every language. Premise and hypothesis differ in one slot, the place or the thing, which is wider, narrower, other or
open in one of them. Neither sentence alone gives the label away (`tests/cli/test_demo.py` measures it).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ltp_sparse.tasks.generated.facts import AGENTS, PLACES, THINGS, Fact, actions, relation
from ltp_sparse.tasks.generated.languages import LANGUAGES, capitalised, clause, sentence
from ltp_sparse.tasks.pairs import LABELS, Pair

SPLITS = {"text": 70, "train": 10, "dev": 5, "test": 15}
"""Percentage of all examples in each split. "text" is for the pre-training text."""

VALUES = {"place": PLACES, "thing": THINGS}
"""Values of the two slots, parents next to their children."""

_FILLED = 0.7  # how often a slot of a hypothesis is filled
_TRIES = 60
_PARALLEL = 0.2  # share of the documents that are a sentence next to its translation


@dataclass(frozen=True)
class FactPair:
    """A premise, a hypothesis, and the label that follows from them."""

    premise: Fact
    hypothesis: Fact
    label: str

    def say(self, language: str) -> Pair:
        """The pair in words of a language."""
        return Pair(sentence(self.premise, language), sentence(self.hypothesis, language), self.label, language)

    @property
    def split(self) -> str:
        """The split that may use this example: fixed by its hypothesis, so no two splits share one."""
        fact = self.hypothesis
        # the constants stand for slots that facts once had: without them every example would change its split
        key = (fact.agent, fact.action, None, fact.thing, None, fact.place, None, False, False)
        place = zlib.crc32(repr(key).encode()) % 100
        for split, share in SPLITS.items():
            if place < share:
                return split
            place -= share
        raise AssertionError("the shares of SPLITS must add up to 100")


def _draw_hypothesis(rng: random.Random) -> Fact:
    agent = rng.choice(AGENTS)
    values = {slot: rng.choice(VALUES[slot]) for slot in VALUES if rng.random() < _FILLED}
    return Fact(agent, rng.choice(actions(agent, values.get("thing"))), **values)


def _draw_premise(rng: random.Random, hypothesis: Fact, label: str) -> Fact | None:
    """A premise that gives the hypothesis this label, or None after `_TRIES` draws."""
    for _ in range(_TRIES):
        slot = rng.choice(sorted(VALUES))
        value: Any = rng.choice((*VALUES[slot], None))
        premise = replace(hypothesis, **{slot: value})
        plausible = premise.action in actions(premise.agent, premise.thing)
        if premise != hypothesis and plausible and relation(premise, hypothesis) == label:
            return premise
    return None


def draw_triple(rng: random.Random) -> list[FactPair]:
    """One hypothesis with three premises, one for each label, in the order of `LABELS`."""
    while True:
        hypothesis = _draw_hypothesis(rng)
        premises = [(_draw_premise(rng, hypothesis, label), label) for label in LABELS]
        triple = [FactPair(premise, hypothesis, label) for premise, label in premises if premise is not None]
        if len(triple) == len(LABELS):
            return triple


def fact_pairs(count: int, split: str, seed: int = 0) -> list[FactPair]:
    """`count` different examples of a split, labels in turn.

    Args:
        count: number of examples.
        split: "train", "dev", "test" or "text" (the examples of the pre-training text).
        seed: seed of the draw.

    Raises:
        ValueError: the split is unknown, or has fewer examples.
    """
    if split not in SPLITS:
        raise ValueError(f"fact_pairs: split must be one of {', '.join(SPLITS)}, got {split!r}")
    rng = random.Random(f"{seed} {split}")
    found: dict[FactPair, None] = {}
    for _ in range(200 * count):
        if len(found) >= count:
            return list(found)[:count]
        triple = draw_triple(rng)
        if triple[0].split == split and not any(pair in found for pair in triple):
            found |= dict.fromkeys(triple)
    raise ValueError(f"fact_pairs: the split {split} of this small world has fewer than {count} examples; ask for less")


def pairs(count: int, split: str, language: str, seed: int = 0) -> list[Pair]:
    """Labelled pairs in one language; the same call with another language gives their translations."""
    return [pair.say(language) for pair in fact_pairs(count, split, seed)]


def sentences(count: int, language: str, seed: int = 0) -> list[str]:
    """Plain sentences of one language, for masked-language-model tuning."""
    rng = random.Random(f"{seed} sentences")
    return [sentence(_draw_hypothesis(rng), language) for _ in range(count)]


@dataclass(frozen=True)
class Document:
    """A line of pre-training text.

    Attributes:
        text: the line.
        answer: the last word, if it answers a question.
    """

    text: str
    answer: str | None = None


def documents(count: int, seed: int = 0) -> Iterator[Document]:
    """Pre-training text (`count` lines, or up to two more): parallel sentences, and questions with answers.

    A fifth are parallel sentences in two languages. The others read "premise. Hypothesis? answer." or longer, with the
    answer in the same or another language. They teach the model its answer words, which large models learn from far
    more text.
    """
    rng = random.Random(f"{seed} documents")
    made = 0
    while made < count:
        triple = draw_triple(rng)
        if triple[0].split != "text":
            continue
        for pair in triple:
            one, two = rng.sample(sorted(LANGUAGES), 2)
            premise = sentence(pair.premise, one)
            if rng.random() < _PARALLEL:
                yield Document(f"{premise} {sentence(pair.premise, two)}")
            else:
                answer = LANGUAGES[one if rng.random() < 0.5 else two].answers[pair.label]
                pattern = rng.choice(LANGUAGES[one].asked)
                exchange = pattern.format(hypothesis=capitalised(clause(pair.hypothesis, one)), answer=answer)
                yield Document(f"{premise} {exchange}", answer)
        made += len(triple)
