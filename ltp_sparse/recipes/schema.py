"""The keys of a recipe and the kinds of their values, which are checked before anything is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ltp_sparse.weights.reading import FileFormatError, closest, shown


class Kind(NamedTuple):
    """A kind of value: its name in messages, and whether a value is of it."""

    name: str
    holds: Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


TEXT = Kind("a text", lambda v: isinstance(v, str))
NAME = Kind("a text or a number", lambda v: isinstance(v, str) or _number(v))
NUMBER = Kind("a number", _number)
SHARE = Kind("a number in (0, 1]", lambda v: _number(v) and 0 < v <= 1)
WHOLE = Kind("a whole number", lambda v: isinstance(v, int) and not isinstance(v, bool))
COUNT = Kind("a whole number of at least 1", lambda v: WHOLE.holds(v) and v >= 1)
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
TEXTS = Kind(
    "a list of texts, e.g. [label, shots]", lambda v: isinstance(v, list) and all(isinstance(t, str) for t in v)
)
SOME = Kind("a text, or a list of texts", lambda v: TEXT.holds(v) or TEXTS.holds(v))
NAMES = Kind("a label, or a list of labels", lambda v: NAME.holds(v) or TEXTS.holds(v))
WORDS = Kind(
    "a language, or class: word for every class",
    lambda v: TEXT.holds(v) or isinstance(v, dict) and all(isinstance(word, str) for word in v.values()),
)
SEEDS = Kind(
    "a list of different whole numbers, e.g. [1, 2]",
    lambda v: isinstance(v, list) and bool(v) and all(map(WHOLE.holds, v)) and len(set(v)) == len(v),
)
FILES = Kind("a path with {language} in it", lambda v: TEXT.holds(v) and "{language}" in v)
FIELDS = Kind("names with values", lambda v: isinstance(v, dict))
GRID = Kind(
    "names with lists of values, e.g. {shots: [1, 4]}",
    lambda v: isinstance(v, dict) and all(isinstance(values, list) and values for values in v.values()),
)
ENTRIES = Kind(
    "a list of mappings, e.g. [{label: LTP, method: ltp}]",
    lambda v: isinstance(v, list) and all(isinstance(entry, dict) for entry in v),
)

_TEXT_OF_A_STAGE: dict[str, Kind] = {"text": TEXT, "lines": COUNT, "mlm": FIELDS}
CELL: dict[str, Any] = {
    "label": NAME,
    "method": TEXT,
    "options": FIELDS,
    "settings": FIELDS,
    "shots": COUNT,
    "seed": WHOLE,
    "last": FLAG,
    "train": {"task": TEXT, "language": TEXT, "stand_in": TEXT, "limit": COUNT},
    "test": {"task": TEXT, "split": TEXT, "languages": SOME, "limit": COUNT},
    "verbalizer": WORDS,
    "ticket": {
        "strategy": TEXT, "density": SHARE, "of": TEXT, "budget": TEXT, "segment": TEXT, "intersect": FLAG,
        "order": TEXT, "score": TEXT, "seeds": SEEDS, "language": SOME, **_TEXT_OF_A_STAGE,
    },
    "language_sft": {"files": FILES, "kind": TEXT, "source": TEXT, "k": COUNT, "density": SHARE, **_TEXT_OF_A_STAGE},
    "adapters": {"source": TEXT, **_TEXT_OF_A_STAGE},
    "model": TEXT,
    "tokenizer": TEXT,
}  # fmt: skip
"""Keys of a cell: its label in the table; the method, its options and settings; training examples per class; whether
the weights of the last update are scored as well; tasks; label words; the stages before, with text and tuning; folder
or Hub name of model and tokenizer."""

RECIPE: dict[str, Any] = {
    "title": NAME,
    "paper": TEXT,
    "by": TEXTS,
    "model": TEXT,
    "plugins": TEXTS,
    "defaults": FIELDS,
    "grid": GRID,
    "cells": ENTRIES,
    "compare": NAMES,
    "margin": NUMBER,
    "chance": NUMBER,
    "kinship": FLAG,
    "rates": TEXT,
    "plots": TEXTS,
    "notes": TEXT,
}


def check(value: Any, schema: Mapping[str, Any] | Kind, path: Path, place: str, where: str = "") -> None:
    """Raises FileFormatError for an unknown key, with the closest known ones, or a value of another kind.

    Args:
        value: what the recipe says; None: it is left out.
        place: its place in the recipe, for the message.
        where: " in a cell", for the message of an unknown key.
    """
    if value is None:
        return
    if isinstance(schema, Kind):
        if not schema.holds(value):
            raise FileFormatError(path, f"expected {schema.name}, got {shown(value)}", place)
        return
    if not isinstance(value, Mapping):
        raise FileFormatError(path, f"expected {', '.join(schema)} with values, got {shown(value)}", place)
    for key, inside in value.items():
        if key not in schema:
            raise FileFormatError(path, f"unknown key {key!r}{where}, closest: {closest(str(key), schema)}", place)
        check(inside, schema[key], path, f"{place}, {key}" if place else key)
