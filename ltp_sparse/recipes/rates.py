"""Learning rates for the cells of a recipe, chosen on dev data by the rows of another recipe."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ltp_sparse.recipes.recipe import Cell, Recipe, look_up, with_fact

_GROUP = ("label", "ticket.density", "options.density")
_RATE = "settings.learning_rate"


class UncertainRate(UserWarning):
    """A learning rate was chosen by one run, or is the largest or smallest of those tried."""


def scores_by_rate(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[Any, ...], dict[float, list[float]]]:
    """(label, density of its ticket or SFT) -> rate, ascending -> the mean score of each run.

    Scores are those of the last update, where rows have them.
    """
    scores: dict[tuple[Any, ...], dict[float, list[float]]] = {}
    for row in sorted(rows, key=lambda row: look_up(row, _RATE)):
        of_group = scores.setdefault(tuple(look_up(row, path) for path in _GROUP), {})
        of_group.setdefault(look_up(row, _RATE), []).append(row.get("last_update", row)["mean"])
    return scores


def best_rate(scores: Mapping[float, list[float]]) -> float:
    """The rate with the best mean over its runs; of equal ones the smallest."""
    return max(sorted(scores), key=lambda rate: statistics.fmean(scores[rate]))


def doubts(scores: Mapping[float, list[float]]) -> list[str]:
    """Why another rate than the best may be better."""
    best = best_rate(scores)
    found = ["by one run"] if len(scores[best]) == 1 else []
    if len(scores) > 1 and best in (min(scores), max(scores)):
        found.append(f"the {'smallest' if best == min(scores) else 'largest'} of {len(scores)}")
    return found


def with_rates(recipe: Recipe, rows: Iterable[Mapping[str, Any]]) -> Recipe:
    """The recipe with the best rate of some rows in every cell that has no rate of its own.

    Args:
        recipe: the recipe.
        rows: those of a recipe with the same labels and densities, with other seeds.

    Raises:
        ValueError: a cell has no rate, and no row gives one.

    Warns:
        UncertainRate: a rate was chosen by one run, or is the largest or smallest of those tried.
    """
    scores, uncertain = scores_by_rate(rows), dict[str, str]()
    cells = []
    for cell in recipe.cells:
        if cell[_RATE] is not None:
            cells.append(cell)
            continue
        group = tuple(cell[path] for path in _GROUP)
        named = ", ".join(f"{path} {value}" for path, value in zip(_GROUP, group, strict=True) if value is not None)
        if group not in scores:
            raise ValueError(f"recipe {recipe.name}: no learning rate for {named}; run it in the recipe of the rates")
        rate = best_rate(scores[group])
        if found := doubts(scores[group]):
            uncertain[named] = f"{rate:g} for {named} ({', '.join(found)})"
        cells.append(Cell(with_fact(cell.facts, _RATE, rate)))
    if uncertain:
        warnings.warn(
            f"recipe {recipe.name}: other learning rates may be better than {'; '.join(uncertain.values())}",
            UncertainRate,
            stacklevel=2,
        )
    return replace(recipe, cells=tuple(cells))
