"""Recipes: a YAML file that names methods x data x grid; every combination is a cell, which is run once.

title: LTP, table 1
paper: ltp-table-1              # figures to print next to ours (papers.yaml), optional
by: [label, shots]              # what makes a row of the table; the other facts are averaged over (the seeds)
compare: SP                     # a paired comparison of every label with this one, or with each of several, optional
margin: 1.5                     # points within which it counts labels as equal, optional
chance: 0.3333                  # the report names the languages with scores above this, optional
kinship: true                   # the report gives scores by kinship with the training language, optional
rates: my-rates                 # the recipe whose rows choose the learning rates (ltp-sparse run --rates), optional
model: FacebookAI/xlm-roberta-base
plugins: [my_method.py]         # Python files in its folder, run first if allowed: methods of one's own, optional
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
import importlib.util
import itertools
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ltp_sparse.recipes.schema import CELL, GRID, RECIPE, check
from ltp_sparse.weights.reading import FileFormatError, read_yaml, reader, sha256_of

FOLDER = Path(__file__).parent
_STAGES = ("ticket", "language_sft", "adapters")
_LISTS = ("test.languages", "ticket.seeds")
"""Facts that are lists themselves."""

_OF_REPORT = ("by", "paper", "compare", "margin", "chance", "kinship", "rates", "plots", "notes")
_MOST_CELLS = 100_000


@dataclass(frozen=True)
class Cell:
    """One run: nested facts as in the recipe, with every choice made."""

    facts: Mapping[str, Any]

    @property
    def id(self) -> str:
        """A digest of the facts: the same cell has the same one in every recipe."""
        return sha256_of({key: value for key, value in self.facts.items() if key != "label"})[:16]

    def __getitem__(self, path: str) -> Any:
        return look_up(self.facts, path)

    def __str__(self) -> str:
        train = self["train.task"], self["train.language"]
        shots = [] if self["shots"] is None else [f"{self['shots']}-shot"]
        return " ".join([str(self["label"]), *map(str, train), *shots, f"seed {self['seed']}"])


@dataclass(frozen=True)
class Recipe:
    """A titled list of cells, and how their results become a table.

    Attributes:
        name: its name, which rows of results note.
        title: the title of its report.
        cells: the cells, in the order in which they run.
        by: facts (dotted paths) that make a row of the table.
        paper: key of printed figures in `papers.yaml`.
        compare: labels with which the report compares every other one, in pairs of equal seeds.
        margin: points within which the comparison counts labels as equal.
        chance: score of a guess; the report names the languages above it.
        kinship: whether the report also gives scores by kinship with the training language.
        rates: name of the recipe whose rows choose the learning rates of this one (`recipes.rates`).
        plots: names of plots in `ltp_sparse.report`.
        notes: text for the report.
        plugins: Python files of methods of one's own, which have run.
    """

    name: str
    title: str
    cells: tuple[Cell, ...]
    by: tuple[str, ...] = ("label",)
    paper: str | None = None
    compare: tuple[str, ...] = ()
    margin: float | None = None
    chance: float | None = None
    kinship: bool = False
    rates: str | None = None
    plots: tuple[str, ...] = ()
    notes: str = ""
    plugins: tuple[Path, ...] = ()

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
    return sorted(file.stem for file in FOLDER.glob("*.yaml") if file.stem != "papers")


@reader("recipe")
def load_recipe(name: str, overrides: Sequence[tuple[str, Any]] = (), *, allow_plugins: bool = False) -> Recipe:
    """A recipe of the library by its name, or your own recipe from a YAML file.

    Args:
        name: one of `recipe_names`, or the path of a .yaml file.
        overrides: (dotted path, value) to set in every cell, such as ("settings.epochs", 1) or ("model", "folder"); a
            list becomes a dimension of the grid. Those of a stage ("ticket.density") are for the cells that have it.
        allow_plugins: whether to run the Python files that the recipe names (`plugins`).

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: a key, method or task is unknown, a value is of another kind, there are too many cells, or
            plugins that are not allowed.
        ValueError: the recipe is unknown.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        name = path.stem
    elif name in recipe_names():
        path = FOLDER / f"{name}.yaml"
    else:
        raise ValueError(f"unknown recipe {name!r}; known: {', '.join(recipe_names())}, or the path of a .yaml file")
    source = read_yaml(path, "a recipe")
    check(source, RECIPE, path, "")
    if not source.get("cells"):
        raise FileFormatError(path, "expected a mapping with title and cells")
    plugins = tuple(_plugin(path, plugin, allow_plugins) for plugin in source.get("plugins") or ())
    for plugin in plugins:
        run_plugin(plugin)
    cells = list(_expand(source, overrides, path))
    different = {cell.id: cell for cell in reversed(cells)}
    if overrides:  # which may make cells equal: the first one stays
        cells = [cell for cell in cells if different[cell.id] is cell]
    elif len(different) != len(cells):
        raise FileFormatError(path, "some cells differ in their label only; every cell is run once")
    _check_names(cells, path)
    of_report = {key: value for key, value in source.items() if key in _OF_REPORT and value not in (None, [])}
    if not isinstance(compare := of_report.get("compare", []), list):
        of_report["compare"] = [compare]
    of_report = {key: tuple(value) if isinstance(value, list) else value for key, value in of_report.items()}
    return Recipe(name, str(source.get("title") or name), tuple(cells), plugins=plugins, **of_report)


def _plugin(recipe: Path, name: str, allowed: bool) -> Path:
    """A Python file, which must lie in the recipe's folder; a link that leads elsewhere does not."""
    folder = recipe.parent.resolve()
    path = (folder / name).resolve()
    if path.parent != folder or path.suffix != ".py":
        raise FileFormatError(recipe, f"expected a .py file in the recipe's folder, got {name!r}", "plugins")
    if not allowed:
        raise FileFormatError(
            recipe,
            f"it wants to run the Python file {name!r}; read that file, then allow it by --allow-plugins "
            "(load_recipe(..., allow_plugins=True))",
            "plugins",
        )
    if not path.is_file():
        raise FileNotFoundError(f"{recipe}: no plugin {path}; plugins are files in the recipe's folder")
    return path


def run_plugin(path: Path) -> None:
    """Runs a Python file, which registers what it defines."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)


def _check_names(cells: Sequence[Cell], path: Path) -> None:
    """Raises FileFormatError unless every cell has a known method and known tasks: before hours of work."""
    from ltp_sparse.methods import METHODS
    from ltp_sparse.tasks import TASKS

    known: dict[str, Mapping[str, Any]] = {
        "method": METHODS, "train.task": TASKS, "test.task": TASKS, "train.stand_in": TASKS
    }  # fmt: skip
    for cell in cells:
        for key, names in known.items():
            value = cell[key]
            if value is None and key == "train.stand_in":
                continue
            if value is None or value not in names:
                what = "method" if key == "method" else "task"
                problem = f"no {what}" if value is None else f"unknown {what} {value!r}"
                raise FileFormatError(path, f"{problem}; known: {', '.join(names)}", f"cell {cell['label']!r}, {key}")


def _expand(source: Mapping[str, Any], overrides: Sequence[tuple[str, Any]], path: Path) -> Iterable[Cell]:
    total = 0
    for number, entry in enumerate(source["cells"], 1):
        facts = _merged({"model": source.get("model")}, source.get("defaults") or {}, entry)
        check(own := facts.pop("grid", None), GRID, path, f"cell {number}, grid")
        check(facts, CELL, path, f"cell {number}", " in a cell")
        grid = {**(source.get("grid") or {}), **(own or {})}
        for dotted, value in overrides:
            stage, nested, _ = dotted.partition(".")
            if nested and stage in _STAGES and facts.get(stage) is None and not any(p.startswith(stage) for p in grid):
                continue  # a cell without this stage keeps none
            grid.pop(dotted, None)
            if isinstance(value, list) and dotted not in _LISTS:
                grid[dotted] = value
            else:
                _set(facts, dotted, value)
        total += math.prod(map(len, grid.values()))
        if total > _MOST_CELLS:
            raise FileFormatError(path, f"more than {_MOST_CELLS:,} cells; make the grid smaller", f"cell {number}")
        for choice in itertools.product(*grid.values()):
            chosen = copy.deepcopy(facts)
            for dotted, value in zip(grid, choice, strict=True):
                _set(chosen, dotted, value)
            cell = {"seed": 1, "shots": None, **chosen, "label": chosen.get("label") or chosen.get("method")}
            check(cell, CELL, path, f"cell {number}", " in a cell")
            yield Cell(cell)


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
        if not isinstance(facts.get(key), dict):
            facts[key] = {}
        facts = facts[key]
    facts[last] = value


def with_fact(facts: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of the facts with the value at a dotted path."""
    changed = copy.deepcopy(dict(facts))
    _set(changed, path, value)
    return changed


def look_up(facts: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; None where there is none."""
    value: Any = facts
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
