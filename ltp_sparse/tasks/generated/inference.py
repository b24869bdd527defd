"""The demo's own data: inference examples and plain text, the same meanings in all languages of `languages.LANGUAGES`.

Everything is drawn from a seed, nothing is read or downloaded. An example is drawn as two facts whose label follows
from what they say (`facts.relation`) and only then put into words, so example i means the same, with the same label, in
every language. Premise and hypothesis differ in one slot, the place or the thing: it becomes wider, narrower, other, or
open. Neither sentence alone gives the label away (`tests/cli/test_demo.py` measures it).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import astuple, dataclass

from ltp_sparse.tasks.generated.facts import AGENTS, LABELS, PARENT, PLACES, THINGS, Fact, actions, relation
from ltp_sparse.tasks.generated.languages import LANGUAGES, capitalised, clause, sentence
from ltp_sparse.tasks.pairs import Pair

SPLITS = {"text": 70, "train": 10, "dev": 5, "test": 15}
"""Hundredths of all examples in each split. "text" is what the pre-training text talks about."""

VALUES = {"place": PLACES, "thing": THINGS}
"""What the two slots may say; each parent stands beside its children."""

_AGENTS = tuple(agent for agent in AGENTS if agent not in PARENT.values())
_FILLED = 0.7  # how often a slot of a hypothesis is filled
_TRIES = 60
_PARALLEL = 0.2


@dataclass(frozen=True)
class FactPair:
    """A premise, a hypothesis, and the label that follows from them."""

    premise: Fact
    hypothesis: Fact
    label: str

    def say(self, language: str) -> Pair:
        return Pair(sentence(self.premise, language), sentence(self.hypothesis, language), self.label, language)

    @property
    def split(self) -> str:
        """The split that may use this example: fixed by its hypothesis, so no two splits share one."""
        place = zlib.crc32(repr(astuple(self.hypothesis)).encode()) % 100
        for split, share in SPLITS.items():
            if place < share:
                return split
            place -= share
        raise AssertionError("the shares of SPLITS must add up to 100")


def _plausible(values: dict[str, str]) -> bool:
    return values["action"] in actions(values["agent"], values.get("thing"))


def _fact(values: dict[str, str]) -> Fact:
    return Fact(values["agent"], values["action"], thing=values.get("thing"), place=values.get("place"))


def _draw_hypothesis(rng: random.Random) -> dict[str, str]:
    values = {"agent": rng.choice(_AGENTS)}
    for slot in VALUES:
        if rng.random() < _FILLED:
            values[slot] = rng.choice(VALUES[slot])
    values["action"] = rng.choice(actions(values["agent"], values.get("thing")))
    return values


def _draw_premise(rng: random.Random, hypothesis: dict[str, str], label: str) -> dict[str, str] | None:
    """A premise that gives the hypothesis this label; None if none is found soon."""
    for _ in range(_TRIES):
        values = dict(hypothesis)
        slot = rng.choice(sorted(VALUES))
        value = rng.choice((*VALUES[slot], None))
        if value is None:
            values.pop(slot, None)
        else:
            values[slot] = value
        if values != hypothesis and _plausible(values) and relation(_fact(values), _fact(hypothesis)) == label:
            return values
    return None


def draw_triple(rng: random.Random) -> list[FactPair]:
    """One hypothesis with three premises, one for each label, in the order of `LABELS`."""
    while True:
        hypothesis = _draw_hypothesis(rng)
        premises = [_draw_premise(rng, hypothesis, label) for label in LABELS]
        if None not in premises:
            return [
                FactPair(_fact(premise), _fact(hypothesis), label)
                for premise, label in zip(premises, LABELS, strict=True)
                if premise is not None
            ]


def fact_pairs(count: int, split: str, seed: int = 0) -> list[FactPair]:
    """`count` different examples of a split, labels in turn.

    Args:
        split: "train", "dev" or "test" ("text": the examples that the pre-training text talks about)
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
    return [sentence(_fact(_draw_hypothesis(rng)), language) for _ in range(count)]


@dataclass(frozen=True)
class Document:
    """A line of pre-training text; `answer` is the word that stands before its final stop, if it answers a question."""

    text: str
    answer: str | None = None


def documents(count: int, seed: int = 0) -> Iterator[Document]:
    """Pre-training text (`count`, up to two more): sentences beside their translations, and answered questions.

    A fifth are parallel sentences in two languages. The others read "premise. Hypothesis? answer." or longer, with the
    answer in the same or another language: by them the model learns what its answer words mean, as large models do from
    far more text.
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
                frame = rng.choice(LANGUAGES[one].asked)
                exchange = frame.format(hypothesis=capitalised(clause(pair.hypothesis, one)), answer=answer)
                yield Document(f"{premise} {exchange}", answer)
        made += len(triple)
