"""Jobs: a cell, or an artefact that cells share, with all that a worker needs to do it anywhere."""

from __future__ import annotations

import hashlib
import os
import sys
import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltp_sparse.recipes.artefacts import Artefact, needed
from ltp_sparse.recipes.cell import run_cell
from ltp_sparse.recipes.recipe import Cell, Recipe, run_plugin
from ltp_sparse.recipes.workbench import Workbench


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        row: the row of results of a cell.
        seconds: how long it took.
        error: what was raised, or why the worker died; None: the job is done.
        trace: the traceback of the error.
        died: whether the worker died before the job ended, so that another one can try.
        attempts: number of workers that tried, counted by the driver.
    """

    row: Mapping[str, Any] | None = None
    seconds: float = 0.0
    error: str | None = None
    trace: str = ""
    died: bool = False
    attempts: int = 1


@dataclass(frozen=True, eq=False)
class Job:
    """One unit of work. It can be pickled, writes nothing but artefacts and checkpoints, and returns its outcome.

    Attributes:
        work: a cell to run, or an artefact to make.
        bench: where data and artefacts are, and how to compute.
        folder: the driver's working directory, from which relative paths lead.
        plugins: Python files to run first.
        scratch: folder for checkpoints, from which an interrupted cell resumes; None: there are none.
        save_every: epochs between checkpoints.
    """

    work: Cell | Artefact
    bench: Workbench
    folder: Path
    plugins: tuple[Path, ...] = ()
    scratch: Path | None = None
    save_every: int | None = None

    @property
    def id(self) -> str:
        return self.work.id

    @property
    def digest(self) -> str:
        """A digest of all that the outcome can depend on."""
        parts = self.id, self.bench.settings(), self.folder, self.plugins, self.scratch, self.save_every
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    @property
    def needs(self) -> list[str]:
        """Ids of the jobs that must be done before."""
        return [artefact.id for artefact in needed(self.work)] if isinstance(self.work, Cell) else []

    def __str__(self) -> str:
        return str(self.work)

    def __call__(self) -> Outcome:
        start = time.perf_counter()
        try:
            os.chdir(self.folder)
            for plugin in self.plugins:
                if getattr(sys.modules.get(plugin.stem), "__file__", None) != str(plugin):
                    run_plugin(plugin)
            if isinstance(self.work, Artefact):
                self.work.file(self.bench)
                return Outcome(seconds=time.perf_counter() - start)
            row = run_cell(self.work, self.bench, folder=self.scratch, save_every=self.save_every)
            return Outcome(row, time.perf_counter() - start)
        except Exception as error:  # one cell that cannot run must not cost the others
            self.bench.forget()
            return Outcome(None, time.perf_counter() - start, repr(error), traceback.format_exc())


def jobs_of(
    recipe: Recipe, cells: Iterable[Cell], bench: Workbench, scratch: Path, save_every: int | None
) -> list[Job]:
    """A job for each cell, and one for each artefact, before the first cell that needs it.

    Args:
        recipe: the recipe.
        cells: those of its cells that are to run.
        bench: data, cache and options of the cells.
        scratch: folder for the checkpoints of cells.
        save_every: epochs between checkpoints; None: none are written.
    """
    here = Path.cwd()
    found: dict[str, Job] = {}
    for cell in cells:
        for artefact in needed(cell):
            found.setdefault(artefact.id, Job(artefact, bench, here, recipe.plugins))
        own = None if save_every is None else scratch.absolute() / cell.id
        found[cell.id] = Job(cell, bench, here, recipe.plugins, own, save_every)
    return list(found.values())
