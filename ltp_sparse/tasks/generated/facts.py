"""The small world of the demo: what a sentence says, and when one fact follows from another or contradicts it.

A fact is about one event: who does what, to which thing, and where. As in SNLI, premise and hypothesis describe the
*same* event, so "finds an apple" contradicts "finds a doll", and "in the kitchen" contradicts "in the garden". Nothing
here depends on a language.
"""

from __future__ import annotations

from dataclasses import dataclass

# Child -> parent. Two nodes of a tree are compatible only if one is an ancestor of the other.
PARENT = {
    "man": "person", "woman": "person", "child": "person", "dog": "animal", "cat": "animal",
    "apple": "fruit", "banana": "fruit", "rose": "flower", "lily": "flower",
    "ball": "toy", "doll": "toy", "hammer": "tool", "saw": "tool",
    "kitchen": "house", "bedroom": "house", "garden": "outside", "forest": "outside",
}  # fmt: skip
AGENTS = ("man", "woman", "child", "dog", "cat")
THINGS = ("apple", "banana", "fruit", "rose", "lily", "flower", "ball", "doll", "toy", "hammer", "saw", "tool")
PLACES = ("kitchen", "bedroom", "house", "garden", "forest", "outside")

# Actions without an object, of persons and of animals, and with one.
PERSON_ACTIVITIES = ("sleep", "eat", "run", "work", "play")
ANIMAL_ACTIVITIES = ("sleep", "eat", "run", "play")
DEEDS = ("find", "lose", "buy", "sell", "break", "repair")


@dataclass(frozen=True)
class Fact:
    """What one sentence says.

    Attributes:
        agent: who acts, one of `AGENTS`.
        action: what is done, one of `actions(agent, thing)`.
        thing: what it is done to, one of `THINGS`; None: nothing, or not said.
        place: where, one of `PLACES`; None: not said.
    """

    agent: str
    action: str
    thing: str | None = None
    place: str | None = None


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


def _within(narrow: str | None, wide: str | None) -> bool:
    """Whether every event that `narrow` describes is also described by `wide`."""
    return wide is None or (narrow is not None and wide in ancestors(narrow))


def relation(premise: Fact, hypothesis: Fact) -> str:
    """The label of a pair of facts about the same agent and action."""
    slots = [(premise.thing, hypothesis.thing), (premise.place, hypothesis.place)]
    if not all(_within(one, other) or _within(other, one) for one, other in slots):
        return "contradiction"
    return "entailment" if all(_within(one, other) for one, other in slots) else "neutral"
