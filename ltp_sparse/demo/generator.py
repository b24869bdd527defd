"""The demo's own data: inference examples and plain text, the same meanings in all languages of `languages.LANGUAGES`.

Everything is drawn from a seed; nothing is read or downloaded. An example is drawn as two facts whose label follows from what
they say (`facts.relation`), and only then put into words, so that example i means the same, with the same label, in every language.

Leaks are closed by the way of drawing: each hypothesis comes with all three labels (three premises), so it alone tells
nothing; the three premises leave equally many slots open and are about equally often denied. Word overlap tells little: each
label has premises with all words of the hypothesis and premises that differ from it in one word.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace

from ltp_sparse.demo.facts import (
    AGENTS, GROUP, LABELS, OPPOSITE, OPTIONAL, PARENT, PLACES, PROPERTIES_OF_THINGS, THINGS, TIMES, Fact, actions, ancestors,
    plausible, qualities, relation,
)  # fmt: skip
from ltp_sparse.demo.languages import LANGUAGES, capitalised, clause, sentence
from ltp_sparse.tasks.pairs import Pair

SPLITS = {"text": 70, "train": 10, "dev": 5, "test": 15}
"""Hundredths of all hypotheses that each split may use. "text" is what the pre-training text asks about."""

_SLOTS = ("agent", "quality", "action", "thing", "attribute", "place", "time")
_TREES = {"agent": AGENTS, "thing": THINGS, "place": PLACES}
# Share of denied premises by (hypothesis denied, label). A denied premise never entails a hypothesis that is not denied;
# the shares make up for that, so that 1 premise in 5 is denied whatever the label.
_DENIED = {
    (False, "entailment"): 0.0, (False, "neutral"): 0.15, (False, "contradiction"): 0.3,
    (True, "entailment"): 0.6, (True, "neutral"): 0.3, (True, "contradiction"): 0.0,
}  # fmt: skip


_CHANGES = {
    "entailment": ("narrow",), "neutral": ("widen", "drop"), "contradiction": ("clash",),
    "any": ("keep", "narrow", "widen", "drop", "clash"),
}  # fmt: skip
_OTHERS = {"entailment": (7, 3), "neutral": (3, 7), "contradiction": (6, 4)}


@dataclass(frozen=True)
class FactPair:
    """A premise, a hypothesis, and the label that follows from them."""

    premise: Fact
    hypothesis: Fact
    label: str

    def say(self, language: str) -> Pair:
        return Pair(sentence(self.premise, language), sentence(self.hypothesis, language), self.label, language)


def _open_slots(fact: Fact) -> list[str]:
    return [
        slot for slot in OPTIONAL if getattr(fact, slot) is None and not (slot == "attribute" and fact.thing is None)
    ]


def _node(rng: random.Random, tree: Sequence[str]) -> str:
    """A node of a tree; general and specific ones equally often."""
    general = rng.random() < 0.5
    return rng.choice([node for node in tree if (node in PARENT.values()) == general])


def _value(rng: random.Random, slot: str, fact: Fact) -> str:
    if slot == "place":
        return _node(rng, PLACES)
    choices = TIMES
    if slot == "quality":
        choices = qualities(fact.agent)
    elif slot == "attribute":
        choices = PROPERTIES_OF_THINGS[ancestors(fact.thing)[-1]]
    return rng.choice(choices)


def _extend(rng: random.Random, fact: Fact, count: int) -> Fact:
    """The fact with `count` more optional slots, or with all that it can have."""
    slots = _open_slots(fact)
    for slot in rng.sample(slots, min(count, len(slots))):
        if slot == "quality" and not qualities(fact.agent):
            continue
        fact = replace(fact, **{slot: _value(rng, slot, fact)})
    return fact


def draw_fact(rng: random.Random, optional: int | None = None) -> Fact:
    """A random fact with 0 to 3 (or `optional`) optional slots."""
    thing = _node(rng, THINGS) if rng.random() < 0.6 else None
    agent = _node(rng, AGENTS)
    fact = Fact(agent, rng.choice(actions(agent, thing)), thing=thing, negated=thing is None and rng.random() < 0.4)
    fact = _extend(rng, fact, rng.choices((0, 1, 2, 3), (2, 4, 3, 1))[0] if optional is None else optional)
    return replace(fact, fronted=fact.time is not None and rng.random() < 0.5)


def _clashing(rng: random.Random, slot: str, value: str) -> str:
    if slot == "action":
        return rng.choice(OPPOSITE[value])
    if slot in GROUP or value in GROUP:
        return rng.choice([other for other in GROUP if GROUP[other] == GROUP[value] and other != value])
    if slot == "time":
        return rng.choice([other for other in TIMES if other != value])
    return rng.choice([o for o in _TREES[slot] if o not in ancestors(value) and value not in ancestors(o)])


def _changed(rng: random.Random, slot: str, value: str, change: str) -> str | None:
    """The value after a change; the same value where the slot does not allow that change."""
    if change == "clash":
        return _clashing(rng, slot, value)
    if change == "drop":
        return None if slot in OPTIONAL else value
    if slot in _TREES and change == "narrow":
        return rng.choice([node for node in _TREES[slot] if value in ancestors(node)])
    if slot in _TREES and change == "widen":
        return rng.choice(ancestors(value))
    return value


def _generals(fact: Fact) -> int:
    return sum(getattr(fact, slot) in PARENT.values() for slot in _TREES)


def _draw_premise(rng: random.Random, hypothesis: Fact, label: str, optional: int, generals: int | None) -> Fact | None:
    """A premise for which the hypothesis has the label, None if none is found soon.

    optional: how many optional slots it fills; generals: how many general words it has (None: any number)
    """
    negated = hypothesis.thing is None and rng.random() < _DENIED[hypothesis.negated, label]
    slots = [slot for slot in _SLOTS if getattr(hypothesis, slot) is not None]
    general = [slot for slot in _TREES if getattr(hypothesis, slot) in PARENT.values()]
    changes = _CHANGES["any" if negated or hypothesis.negated else label]
    for _ in range(40):
        focus = rng.choice(general if label == "entailment" and general else slots)
        values = {}
        for slot in slots:
            change = rng.choice(changes) if slot == focus else rng.choices(("keep", "narrow"), _OTHERS[label])[0]
            values[slot] = _changed(rng, slot, getattr(hypothesis, slot), change)
        premise = Fact(**values, negated=negated)
        missing = optional - sum(getattr(premise, slot) is not None for slot in OPTIONAL)
        if missing < 0:
            continue
        premise = _extend(rng, premise, missing)
        if not plausible(premise) or sum(getattr(premise, slot) is not None for slot in OPTIONAL) != optional:
            continue
        if generals is not None and generals != _generals(premise):
            continue
        if premise == replace(hypothesis, fronted=False) or relation(premise, hypothesis) != label:
            continue
        return replace(premise, fronted=premise.time is not None and rng.random() < 0.5)
    return None


def draw_triple(rng: random.Random) -> list[FactPair]:
    """One hypothesis with three premises, one for each label, in a random order."""
    while True:
        hypothesis = draw_fact(rng, rng.choices((0, 1, 2), (2, 5, 3))[0])
        optional = rng.choice((1, 2, 3))
        triple = []
        for label in LABELS:
            generals = _generals(triple[0].premise) if triple else None
            premise = _draw_premise(rng, hypothesis, label, optional, generals)
            if premise is None:
                break
            triple.append(FactPair(premise, hypothesis, label))
        else:
            rng.shuffle(triple)
            return triple


def split_of(hypothesis: Fact) -> str:
    """The split that may use a hypothesis; word order does not count, so splits share no hypothesis in any form."""
    place = zlib.crc32(repr(astuple(replace(hypothesis, fronted=False))).encode()) % 100
    for split, share in SPLITS.items():
        if place < share:
            return split
        place -= share
    raise AssertionError("the shares of SPLITS must add up to 100")


def fact_pairs(count: int, split: str, seed: int = 0) -> list[FactPair]:
    """`count` different examples of a split, in a random order; as many of each label as `count` allows.

    split: "train", "dev" or "test" (or "text": the examples that the pre-training text talks about)
    """
    if split not in SPLITS:
        raise ValueError(f"fact_pairs: split must be one of {', '.join(SPLITS)}, got {split!r}")
    rng = random.Random(f"{seed} {split}")
    seen: set[tuple[Fact, Fact]] = set()
    found: list[FactPair] = []
    while len(found) < count:
        triple = draw_triple(rng)
        key = [(replace(p.premise, fronted=False), replace(p.hypothesis, fronted=False)) for p in triple]
        if split_of(triple[0].hypothesis) == split and seen.isdisjoint(key):
            seen.update(key)
            found += triple
    found = found[:count]
    rng.shuffle(found)
    return found


@dataclass(frozen=True)
class Document:
    """A line of pre-training text; `answer` is its last word if that answers a question, as in "Right."."""

    text: str
    answer: str | None = None


def _exchange(rng: random.Random, pair: FactPair, premise_language: str, language: str) -> Document:
    """Somebody states the premise, asks whether the hypothesis holds, and is told."""
    grammar = LANGUAGES[language]
    answer = grammar.answers[pair.label]
    frame = rng.choice(grammar.asked)
    asked = frame.format(hypothesis=capitalised(clause(pair.hypothesis, language)), answer=capitalised(answer))
    return Document(f"{sentence(pair.premise, premise_language)} {asked}", answer)


def _remark(rng: random.Random, fact: Fact, language: str) -> Document:
    frame = rng.choice(list(LANGUAGES[language].said.values()))
    return Document(frame.format(sentence=clause(fact, language)))


def documents(
    count: int, seed: int = 0, languages: Sequence[str] = tuple(LANGUAGES), exchanges: int = 20_000
) -> list[Document]:
    rng = random.Random(f"{seed} documents")
    pairs = fact_pairs(exchanges, "text", seed)
    found = []
    while len(found) < count:
        kind = rng.random()
        one, other = rng.sample(list(languages), 2) if len(languages) > 1 else (languages[0],) * 2
        if kind < KINDS[0]:
            found.append(Document(sentence(draw_fact(rng), one)))
        elif kind < KINDS[1]:
            found.append(_remark(rng, draw_fact(rng), one))
        elif kind < KINDS[2]:
            fact = draw_fact(rng)
            found.append(Document(f"{sentence(fact, one)} {sentence(fact, other)}"))
        elif kind < KINDS[3]:
            found.append(_exchange(rng, rng.choice(pairs), one, one))
        else:
            found.append(_exchange(rng, rng.choice(pairs), one, other))
    return found


KINDS = (0.1, 0.15, 0.35, 0.8)
