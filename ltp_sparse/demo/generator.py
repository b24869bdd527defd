"""The demo's own data: inference examples and plain text, the same meanings in all languages of `languages.LANGUAGES`.

Everything is drawn from a seed; nothing is read or downloaded. An example is drawn as two facts whose label follows from what
they say (`facts.relation`), and only then put into words, so that example i means the same, with the same label, in every language.

Leaks are closed by the way of drawing: each hypothesis comes with all three labels (three premises), so it alone tells
nothing; the three premises leave equally many slots open, use equally many general words, and are about equally often
denied. Word overlap tells little: each label has premises with all words of the hypothesis and premises that lack some.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

from ltp_sparse.demo.facts import (
    AGENTS,
    GROUP,
    LABELS,
    OPPOSITE,
    OPTIONAL,
    PARENT,
    PLACES,
    PROPERTIES_OF_THINGS,
    THINGS,
    TIMES,
    Fact,
    actions,
    ancestors,
    plausible,
    qualities,
    relation,
)  # fmt: skip
from ltp_sparse.demo.languages import LANGUAGES, capitalised, clause, sentence
from ltp_sparse.tasks.pairs import Pair

SPLITS = {"text": 70, "train": 10, "dev": 5, "test": 15}
"""Hundredths of all hypotheses that each split may use. "text" is what the pre-training text asks about."""

_SLOTS = ("agent", "quality", "action", "thing", "attribute", "place", "time")
_TREES = {"agent": AGENTS, "thing": THINGS, "place": PLACES}
_GENERAL = frozenset(PARENT.values())
_WIDER = {node: ancestors(node)[1:] for tree in _TREES.values() for node in tree}
_NARROWER = {node: [other for other in _WIDER if node in _WIDER[other]] for node in _WIDER}
_EXCLUDED = {
    slot: {node: [o for o in tree if o != node and o not in _WIDER[node] and node not in _WIDER[o]] for node in tree}
    for slot, tree in _TREES.items()
}
_EXCLUDED["action"] = {action: list(others) for action, others in OPPOSITE.items()}
_EXCLUDED["time"] = {time: [other for other in TIMES if other != time] for time in TIMES}
_EXCLUDED["quality"] = _EXCLUDED["attribute"] = {
    name: [other for other in GROUP if GROUP[other] == GROUP[name] and other != name] for name in GROUP
}

# Share of denied partners by (the given fact is denied, label). A denied premise never entails a hypothesis that is not
# denied; the shares make up for that, so that 1 premise in 5 is denied whatever the label.
_DENIED_PREMISE = {
    (False, "entailment"): 0.0, (False, "neutral"): 0.15, (False, "contradiction"): 0.3,
    (True, "entailment"): 0.6, (True, "neutral"): 0.3, (True, "contradiction"): 0.0,
}  # fmt: skip
_DENIED_HYPOTHESIS = {
    (False, "entailment"): 0.3, (False, "neutral"): 0.3, (False, "contradiction"): 0.3,
    (True, "entailment"): 1.0, (True, "neutral"): 0.5, (True, "contradiction"): 0.0,
}  # fmt: skip
# What happens to the slot in focus to reach a label: premise from hypothesis, hypothesis from premise.
_TO_PREMISE = {"entailment": ("narrow",), "neutral": ("widen", "drop"), "contradiction": ("exclude",)}
_TO_HYPOTHESIS = {"entailment": ("widen",), "neutral": ("narrow", "keep"), "contradiction": ("exclude",)}
_ANY = ("keep", "narrow", "widen", "drop", "exclude")


@dataclass(frozen=True)
class FactPair:
    """A premise, a hypothesis, and the label that follows from them."""

    premise: Fact
    hypothesis: Fact
    label: str

    def say(self, language: str) -> Pair:
        return Pair(sentence(self.premise, language), sentence(self.hypothesis, language), self.label, language)


def _node(rng: random.Random, tree: Sequence[str]) -> str:
    """A node of a tree; general and specific ones equally often."""
    general = rng.random() < 0.5
    return rng.choice([node for node in tree if (node in _GENERAL) == general])


def _extend(rng: random.Random, values: dict[str, str], count: int) -> bool:
    """Fill `count` more optional slots in place; whether there were as many."""
    free = [slot for slot in OPTIONAL if slot not in values and (slot != "attribute" or "thing" in values)]
    if count > len(free):
        return False
    for slot in rng.sample(free, count):
        if slot == "place":
            values[slot] = _node(rng, PLACES)
        elif slot == "time":
            values[slot] = rng.choice(TIMES)
        elif slot == "quality":
            values[slot] = rng.choice(qualities(values["agent"]))
        else:
            values[slot] = rng.choice(PROPERTIES_OF_THINGS[ancestors(values["thing"])[-1]])
    return True


def _order(rng: random.Random, values: dict[str, str], negated: bool) -> Fact:
    return Fact(**values, negated=negated, fronted="time" in values and rng.random() < 0.5)


def draw_fact(rng: random.Random, optional: int | None = None) -> Fact:
    """A random fact with 0 to 3 (or `optional`, at most 2) optional slots."""
    values = {"agent": _node(rng, AGENTS)}
    if rng.random() < 0.6:
        values["thing"] = _node(rng, THINGS)
    values["action"] = rng.choice(actions(values["agent"], values.get("thing")))
    negated = "thing" not in values and rng.random() < 0.4
    _extend(rng, values, rng.choices((0, 1, 2, 3), (2, 4, 3, 1))[0] if optional is None else optional)
    return _order(rng, values, negated)


def _generals(values: dict[str, str]) -> int:
    return sum(values.get(slot) in _GENERAL for slot in _TREES)


def _draw_partner(
    rng: random.Random, given: Fact, label: str, optional: int, generals: int | None, premise_wanted: bool
) -> Fact | None:
    """A premise for the hypothesis `given` (or the other way round) with this label; None if none is found soon.

    optional: how many optional slots it fills; generals: how many general words it has (None: any number)
    """
    shares = _DENIED_PREMISE if premise_wanted else _DENIED_HYPOTHESIS
    negated = given.thing is None and rng.random() < shares[given.negated, label]
    changes = (_TO_PREMISE if premise_wanted else _TO_HYPOTHESIS)[label]
    if negated or given.negated:
        changes = _ANY
    known = {slot: value for slot in _SLOTS if (value := getattr(given, slot)) is not None}
    slots = list(known)
    changeable = [s for s in slots if known[s] in _GENERAL] if changes == ("narrow",) else slots
    for _ in range(30):
        values = dict(known)
        focus = rng.choice(changeable or slots)
        for slot in slots:
            change = rng.choice(changes) if slot == focus else _SIDE[premise_wanted] if rng.random() < 0.25 else "keep"
            if change == "widen" and slot not in _TREES and slot == focus and premise_wanted:
                change = "drop"
            if change == "exclude":
                values[slot] = rng.choice(_EXCLUDED[slot][values[slot]])
            elif change == "narrow" and slot in _TREES and _NARROWER[values[slot]]:
                values[slot] = rng.choice(_NARROWER[values[slot]])
            elif change == "widen" and slot in _TREES and _WIDER[values[slot]]:
                values[slot] = rng.choice(_WIDER[values[slot]])
            elif change == "drop" and slot in OPTIONAL:
                del values[slot]
        filled = [slot for slot in OPTIONAL if slot in values]
        if len(filled) > optional and not premise_wanted:
            for slot in rng.sample(filled, len(filled) - optional):
                del values[slot]
        elif len(filled) > optional or not _extend(rng, values, optional - len(filled)):
            continue
        if generals is not None and generals != _generals(values):
            continue
        partner = _order(rng, values, negated)
        if not plausible(partner):
            continue
        premise, hypothesis = (partner, given) if premise_wanted else (given, partner)
        if relation(premise, hypothesis) == label and replace(partner, fronted=False) != replace(given, fronted=False):
            return partner
    return None


_SIDE = {True: "narrow", False: "widen"}


def draw_triple(rng: random.Random) -> list[FactPair]:
    """One hypothesis with three premises, one for each label, in a random order."""
    while True:
        hypothesis = draw_fact(rng, rng.choices((0, 1, 2), (2, 5, 3))[0])
        optional = rng.choice((1, 2, 3))
        triple: list[FactPair] = []
        generals = None
        for label in LABELS:
            premise = _draw_partner(rng, hypothesis, label, optional, generals, True)
            if premise is None:
                break
            generals = _generals(vars(premise))
            triple.append(FactPair(premise, hypothesis, label))
        else:
            rng.shuffle(triple)
            return triple


def draw_questions(rng: random.Random, count: int) -> list[FactPair]:
    """One premise with `count` hypotheses of independent random labels."""
    while True:
        premise = draw_fact(rng, rng.choice((1, 2, 2)))
        found = []
        for _ in range(count):
            label = rng.choice(LABELS)
            for _ in range(4):
                h = _draw_partner(
                    rng, premise, label, rng.choices((0, 1, 2), (3, 5, 2))[0], rng.choice((0, 1, 2)), False
                )
                if h is not None and split_of(h) == "text":
                    found.append(FactPair(premise, h, label))
                    break
        if len(found) == count:
            return found


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
