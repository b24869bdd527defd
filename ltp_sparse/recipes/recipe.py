"""Recipes: a YAML file that names methods x data x grid; every combination is a cell, which is run once.

title: LTP, table 1
paper: ltp-table-1              # figures to print beside ours (papers.yaml), optional
by: [label, shots]              # what makes a row of the table; the other facts are averaged over (the seeds)
compare: SP                     # a paired comparison of every label with this one, optional
chance: 0.3333                  # tell in which languages the scores lie above this, optional
model: FacebookAI/xlm-roberta-base
plugins: [my_method.py]         # Python files beside this one, run first: methods of one's own, optional
defaults:                       # of every cell
  train: {task: xnli-fewshot, language: en}
  test: {task: xnli}
grid: {shots: [1, 4], seed: [1, 2, 3]}
cells:
  - {label: SP, method: soft-prompt}
  - {label: LTP, method: ltp, ticket: {density: 0.2}}
  - {label: LTP, method: ltp, grid: {ticket.density: [0.05, 0.5]}}    # a grid of its own, on top of the recipe's
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import itertools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from ltp_sparse.names import closest

_FOLDER = resources.files("ltp_sparse.recipes")

CELL_KEYS = {
    "label": "name in the table",
    "method": "key of a method",
    "options": "fields of the method",
    "settings": "fields of the method's settings",
    "shots": "training examples per class",
    "seed": "of the run",
    "train": "task, language, stand_in, limit",
    "test": "task, split, languages, limit",
    "verbalizer": "language of the label words, or class -> word",
    "ticket": "stage 1: strategy, density, budget, segment, intersect, order, language (or several), text, lines, mlm",
    "language_sft": "language SFTs below the task: kind, source, k, density, text, lines, mlm",
    "adapters": "language adapters below the task: source, text, lines, mlm",
    "model": "folder or Hub name of the model",
    "tokenizer": "the same of its tokenizer, if it lies elsewhere",
}
_STAGES = ("ticket", "language_sft", "adapters")
_RECIPE_KEYS = (
    "title",
    "paper",
    "by",
    "model",
    "plugins",
    "defaults",
    "grid",
    "cells",
    "compare",
    "chance",
    "plots",
    "notes",
)


@dataclass(frozen=True)
class Cell:
    """One run: nested facts as in the recipe, with every choice made."""

    facts: Mapping[str, Any]

    @property
    def id(self) -> str:
        """A digest of the facts: the same cell has the same one in every recipe."""
        text = json.dumps({k: v for k, v in self.facts.items() if k != "label"}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __getitem__(self, path: str) -> Any:
        return look_up(self.facts, path)

    def __str__(self) -> str:
        train = self["train.task"], self["train.language"]
        shots = [] if self["shots"] is None else [f"{self['shots']}-shot"]
        return " ".join([str(self["label"]), *map(str, train), *shots, f"seed {self['seed']}"])


@dataclass(frozen=True)
class Recipe:
    """A titled list of cells, and how their results become a table.

    by:    facts (dotted paths) that make a row of the table
    paper: key of printed figures in `papers.yaml`
    compare: label that the report compares every other one with, in pairs of equal seeds
    chance: score of a guess; the report tells the languages above it
    plots: names of plots in `ltp_sparse.report`
    """

    name: str
    title: str
    cells: tuple[Cell, ...]
    by: tuple[str, ...] = ("label",)
    paper: str | None = None
    compare: str | None = None
    chance: float | None = None
    plots: tuple[str, ...] = ()
    notes: str = ""

    def only(self, filters: Iterable[tuple[str, Any]]) -> Recipe:
        """The recipe with the cells in which every dotted path has one of the values given for it."""
        wanted: dict[str, list[str]] = {}
        for path, value in filters:
            wanted.setdefault(path, []).append(str(value))
        kept = tuple(c for c in self.cells if all(str(c[path]) in values for path, values in wanted.items()))
        if not kept:
            seen = {path: sorted({str(cell[path]) for cell in self.cells}) for path in wanted}
            raise ValueError(f"recipe {self.name}: no cell has {wanted}; values that occur: {seen}")
        return replace(self, cells=kept)


def recipe_names() -> list[str]:
    """The recipes that come with the library."""
    files = [Path(file.name) for file in _FOLDER.iterdir()]
    return sorted(file.stem for file in files if file.suffix == ".yaml" and file.stem != "papers")


def load_recipe(name: str, overrides: Sequence[tuple[str, Any]] = ()) -> Recipe:
    """A recipe by the name of one that comes with the library, or from a YAML file of one's own.

    overrides: (dotted path, value) set in every cell, such as ("settings.epochs", 1) or ("model", "folder"); a list as
        the value becomes a dimension of the grid. Those of a stage ("ticket.density") are for the cells that have it.

    Raises ValueError for an unknown recipe or key, with the known ones.
    """
    import yaml

    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        text, name = path.read_text(encoding="utf-8"), path.stem
    elif name in recipe_names():
        text = (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        raise ValueError(f"unknown recipe {name!r}; known: {', '.join(recipe_names())}, or the path of a .yaml file")
    source = yaml.safe_load(text)
    if not isinstance(source, dict) or "cells" not in source:
        raise ValueError(f"recipe {name}: expected a mapping with title and cells")
    if unknown := [key for key in source if key not in _RECIPE_KEYS]:
        raise ValueError(f"recipe {name}: unknown key {unknown[0]!r}, closest: {closest(unknown[0], _RECIPE_KEYS)}")
    for plugin in source.get("plugins", ()):
        _run_file(path.parent / plugin)
    cells = list(_expand(source, overrides, name))
    different = {cell.id: cell for cell in reversed(cells)}
    if overrides:  # which may make cells equal: the first one stays
        cells = [cell for cell in cells if different[cell.id] is cell]
    elif len(different) != len(cells):
        raise ValueError(f"recipe {name}: some cells are equal but for their label; every cell is run once")
    return Recipe(
        name=name,
        title=source.get("title", name),
        cells=tuple(cells),
        by=tuple(source.get("by", ["label"])),
        paper=source.get("paper"),
        compare=source.get("compare"),
        chance=source.get("chance"),
        plots=tuple(source.get("plots", ())),
        notes=source.get("notes", ""),
    )


def _run_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"recipe: no plugin {path}; plugins are paths relative to the recipe's folder")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)


def _expand(source: Mapping[str, Any], overrides: Sequence[tuple[str, Any]], name: str) -> Iterable[Cell]:
    for entry in source["cells"]:
        facts = _merged({"model": source.get("model")}, source.get("defaults", {}), entry)
        grid = {**source.get("grid", {}), **facts.pop("grid", {})}
        for path, value in overrides:
            stage, nested, _ = path.partition(".")
            if nested and stage in _STAGES and facts.get(stage) is None and not any(p.startswith(stage) for p in grid):
                continue  # a cell without this stage keeps none
            grid.pop(path, None)
            if isinstance(value, list) and path != "test.languages":
                grid[path] = value
            else:
                _set(facts, path, value)
        if unknown := [key for key in (*facts, *(p.split(".")[0] for p in grid)) if key not in CELL_KEYS]:
            raise ValueError(
                f"recipe {name}: unknown key {unknown[0]!r} in a cell, closest: {closest(unknown[0], CELL_KEYS)}"
            )
        for choice in itertools.product(*grid.values()):
            chosen = copy.deepcopy(facts)
            for path, value in zip(grid, choice, strict=True):
                _set(chosen, path, value)
            yield Cell({"seed": 1, "shots": None, **chosen, "label": chosen.get("label") or chosen["method"]})


def _merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, the later ones winning."""
    result: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = _merged(result[key], value) if both else copy.deepcopy(value)
    return result


def _set(facts: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        if facts.get(key) is None:
            facts[key] = {}
        facts = facts[key]
    facts[last] = value


def look_up(facts: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; None where there is none."""
    value: Any = facts
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
