"""The small world of the demo: what a sentence says, and when one fact follows from another or clashes with it.

A fact is about one event: who does what, to which thing, where and when. As in SNLI, premise and hypothesis speak of
the *same* event, so "finds an apple" clashes with "finds a doll", and "in the kitchen" with "in the garden". Nothing
here knows a language.
"""

from __future__ import annotations

from dataclasses import dataclass

LABELS = ("entailment", "neutral", "contradiction")

# Child -> parent. Two nodes of a tree are compatible only if one is an ancestor of the other.
PARENT = {
    "man": "person", "woman": "person", "child": "person", "dog": "animal", "cat": "animal",
    "apple": "fruit", "banana": "fruit", "rose": "flower", "lily": "flower",
    "ball": "toy", "doll": "toy", "hammer": "tool", "saw": "tool",
    "kitchen": "house", "bedroom": "house", "garden": "outside", "forest": "outside",
}  # fmt: skip
AGENTS = ("man", "woman", "child", "person", "dog", "cat", "animal")
THINGS = ("apple", "banana", "fruit", "rose", "lily", "flower", "ball", "doll", "toy", "hammer", "saw", "tool")
PLACES = ("kitchen", "bedroom", "house", "garden", "forest", "outside")
TIMES = ("morning", "night")

# Properties clash within their group and say nothing about another group.
GROUP = {
    "big": "size", "small": "size", "happy": "mood", "sad": "mood", "red": "colour", "white": "colour", "new": "age",
    "old": "age",
}  # fmt: skip
PROPERTIES_OF_THINGS = {
    "fruit": ("big", "small"),
    "flower": ("big", "small", "red", "white"),
    "toy": ("big", "small", "red", "white", "new", "old"),
    "tool": ("big", "small", "new", "old"),
}

# Actions without an object (of persons, and of animals), and with one. Only the listed pairs exclude each other; a pair
# such as eat and work, which might be done at once, is never compared.
PERSON_ACTIVITIES = ("sleep", "eat", "run", "work", "play")
ANIMAL_ACTIVITIES = ("sleep", "eat", "run", "play")
OPPOSITE = {
    "find": ("lose",), "lose": ("find",), "buy": ("sell",), "sell": ("buy",), "break": ("repair",), "repair":
    ("break",), "sleep": ("eat", "run", "work", "play"), "eat": ("sleep", "run"), "run": ("sleep", "eat"),
    "work": ("sleep", "play"), "play": ("sleep", "work"),
}  # fmt: skip
DEEDS = ("find", "lose", "buy", "sell", "break", "repair")
OPTIONAL = ("quality", "attribute", "place", "time")


@dataclass(frozen=True)
class Fact:
    """What one sentence says. A slot that is None is left open; `fronted` (time phrase first) is word order, not
    meaning.

    Attributes:
        negated: "does not"; it denies action, place and time together, never the subject. Only facts without a thing
            are negated.
    """

    agent: str
    action: str
    quality: str | None = None  # property of the agent
    thing: str | None = None
    attribute: str | None = None  # property of the thing
    place: str | None = None
    time: str | None = None
    negated: bool = False
    fronted: bool = False


def ancestors(node: str) -> list[str]:
    """The node itself, its parent, and so on up to the root."""
    chain = [node]
    while chain[-1] in PARENT:
        chain.append(PARENT[chain[-1]])
    return chain


def actions(agent: str, thing: str | None) -> tuple[str, ...]:
    """What an agent does, alone or to a thing."""
    person = "person" in ancestors(agent)
    if thing is None:
        return PERSON_ACTIVITIES if person else ANIMAL_ACTIVITIES
    if not person:
        return ("find", "lose")
    return DEEDS if ancestors(thing)[-1] in ("toy", "tool") else DEEDS[:4]


def _within(slot: str, narrow: str | None, wide: str | None) -> bool:
    """Whether every event described by `narrow` in this slot is described by `wide`."""
    if wide is None or narrow == wide:
        return True
    return narrow is not None and slot in ("agent", "thing", "place") and wide in ancestors(narrow)


def _clash(slot: str, one: str | None, other: str | None) -> bool:
    """Whether no event fits both in this slot."""
    if one is None or other is None or one == other:
        return False
    if slot == "action":
        return other in OPPOSITE[one]
    if slot in ("quality", "attribute"):
        return GROUP[one] == GROUP[other]
    return slot == "time" or (one not in ancestors(other) and other not in ancestors(one))


_SUBJECT = ("agent", "quality")
_PREDICATE = ("action", "thing", "attribute", "place", "time")


def relation(premise: Fact, hypothesis: Fact) -> str | None:
    """The label of the pair; None where the actions are neither equal nor opposite, which the demo does not decide."""
    if premise.action != hypothesis.action and hypothesis.action not in OPPOSITE[premise.action]:
        return None

    def within(slots: tuple[str, ...], narrow: Fact, wide: Fact) -> bool:
        return all(_within(slot, getattr(narrow, slot), getattr(wide, slot)) for slot in slots)

    def clash(slots: tuple[str, ...]) -> bool:
        return any(_clash(slot, getattr(premise, slot), getattr(hypothesis, slot)) for slot in slots)

    if clash(_SUBJECT):
        return "contradiction"
    match premise.negated, hypothesis.negated:
        case False, False:
            follows, excluded = within(_PREDICATE, premise, hypothesis), clash(_PREDICATE)
        case False, True:
            follows, excluded = clash(_PREDICATE), within(_PREDICATE, premise, hypothesis)
        case True, False:
            follows, excluded = False, within(_PREDICATE, hypothesis, premise)
        case _:
            follows, excluded = within(_PREDICATE, hypothesis, premise), False
    if excluded:
        return "contradiction"
    return "entailment" if follows and within(_SUBJECT, premise, hypothesis) else "neutral"
