"""Learning rates for the cells of a recipe, chosen on dev data by the rows of another recipe."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ltp_sparse.recipes.recipe import Cell, Recipe, look_up, with_fact

_GROUP = ("label", "ticket.density", "options.density")
_RATE = "settings.learning_rate"


def best_rates(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[Any, ...], float]:
    """(label, density of its ticket or SFT) -> the learning rate with the best mean score over seeds.

    Of equally good rates, the smallest. Scores are those of the last update, where rows have them.
    """
    scores: dict[tuple[Any, ...], dict[float, list[float]]] = {}
    for row in rows:
        group = scores.setdefault(tuple(look_up(row, path) for path in _GROUP), {})
        group.setdefault(look_up(row, _RATE), []).append(row.get("last_update", row)["mean"])
    best = {}
    for label_and_density, by_rate in scores.items():
        means = {rate: statistics.fmean(by_rate[rate]) for rate in sorted(by_rate)}
        best[label_and_density] = max(means, key=means.__getitem__)
    return best


def with_rates(recipe: Recipe, rows: Iterable[Mapping[str, Any]]) -> Recipe:
    """The recipe with the best rate of some rows in every cell that has no rate of its own.

    Args:
        recipe: the recipe.
        rows: those of a recipe with the same labels and densities, with other seeds.

    Raises:
        ValueError: a cell has no rate, and no row gives one.
    """
    rates = best_rates(rows)
    cells = []
    for cell in recipe.cells:
        if cell[_RATE] is not None:
            cells.append(cell)
            continue
        group = tuple(cell[path] for path in _GROUP)
        if group not in rates:
            named = ", ".join(f"{path} {value}" for path, value in zip(_GROUP, group, strict=True) if value is not None)
            raise ValueError(f"recipe {recipe.name}: no learning rate for {named}; run it in the recipe of the rates")
        cells.append(Cell(with_fact(cell.facts, _RATE, rates[group])))
    return replace(recipe, cells=tuple(cells))
