"""Checks before anything runs: the method of a cell with its options and settings, and the choices of stage 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from ltp_sparse.methods import METHODS, Method, Settings
from ltp_sparse.recipes.recipe import Cell
from ltp_sparse.selection.ltp import STRATEGIES
from ltp_sparse.selection.scores import SCORES
from ltp_sparse.training.mlm import MLMSettings
from ltp_sparse.weights.reading import closest


def check_cell(cell: Cell) -> None:
    """Raises ValueError for options, settings or stages that are unknown, of another kind, or without effect."""
    method = method_of(cell)
    if cell["ticket"] is not None:
        strategy_and_score(cell)
    for stage in ("ticket", "language_sft", "adapters"):
        if cell[f"{stage}.mlm"]:
            _check_settings(cell[f"{stage}.mlm"], MLMSettings(), f"{stage}, mlm")
    if method.needs_ticket != (cell["ticket"] is not None):
        expected = "its stage 1, such as {density: 0.2}" if method.needs_ticket else "none, as no stage 1 is needed"
        raise ValueError(f"ticket: expected {expected}; got {cell['method']} and {cell['ticket']}")
    if cell["adapters"] is not None and not (cell["adapters.source"] and hasattr(method, "language_adapter")):
        raise ValueError(
            "adapters: expected the method mad-x and a source, the language that it trains in, such as "
            f"{{source: en}}; got {cell['method']} and {cell['adapters']}"
        )


def method_of(cell: Cell) -> Method:
    """The method of a cell, with its options and settings. Raises ValueError for unknown ones."""
    if cell["method"] not in METHODS:
        raise ValueError(f"unknown method {cell['method']!r}; known: {', '.join(METHODS)}")
    kind = METHODS[cell["method"]]
    default = kind()
    known = [f.name for f in fields(default) if f.name != "settings"]
    _refuse_unknown(cell["options"], known, f"options of {cell['method']}")
    _check_settings(cell["settings"], default.settings, f"settings of {cell['method']}")
    settings: Settings = replace(default.settings, **(cell["settings"] or {}))
    try:
        return kind(settings=settings, **(cell["options"] or {}))
    except TypeError as error:
        raise ValueError(f"options of {cell['method']}: {error}") from error


def strategy_and_score(cell: Cell) -> tuple[str, str]:
    """(strategy of the ticket of a cell, score that ranks its entries)"""
    spec = cell["ticket"]
    strategy, score = spec.get("strategy", "decoupled"), spec.get("score", "change")
    if strategy not in STRATEGIES:
        raise ValueError(f"ticket: strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if score not in ("change", "magnitude", *SCORES):
        raise ValueError(f"ticket: score must be one of change, magnitude, {', '.join(SCORES)}, got {score!r}")
    return strategy, score


def _check_settings(given: Mapping[str, Any] | None, defaults: Any, what: str) -> None:
    _refuse_unknown(given, [f.name for f in fields(defaults)], what)
    for key, value in (given or {}).items():
        if type(getattr(defaults, key)) in (int, float) and type(value) not in (int, float):
            raise ValueError(
                f"{what}: {key} must be a number, got {value!r} (YAML takes 1e-3 for a text: write 1.0e-3)"
            )


def _refuse_unknown(given: Mapping[str, Any] | None, known: Sequence[str], what: str) -> None:
    if unknown := [key for key in given or {} if key not in known]:
        raise ValueError(f"{what}: unknown {unknown[0]!r}, closest: {closest(unknown[0], known)}")
