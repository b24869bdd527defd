"""The driver of a recipe, which alone writes results. Finished cells are kept, and interrupted ones resume."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ltp_sparse.recipes import results
from ltp_sparse.recipes.checks import check_cell
from ltp_sparse.recipes.engines import Engine, Here
from ltp_sparse.recipes.jobs import Job, Outcome, jobs_of
from ltp_sparse.recipes.recipe import Cell, Recipe
from ltp_sparse.recipes.workbench import Workbench
from ltp_sparse.training.run_folder import alone


def unfinished(recipe: Recipe, folder: Path) -> list[Cell]:
    """The cells without a row in the folder's results."""
    done = {row["id"] for row in results.read(folder / results.RESULTS)}
    return [cell for cell in recipe.cells if cell.id not in done]


def run_recipe(
    recipe: Recipe,
    folder: Path,
    bench: Workbench,
    *,
    engine: Engine | None = None,
    retries: int = 3,
    save_every: int | None = None,
    progress: bool = True,
) -> int:
    """Runs the cells that have no row yet, and adds their rows to `results.jsonl` in the folder.

    Args:
        recipe: the recipe.
        folder: the folder of the results. One run at a time can write there.
        bench: where data and artefacts are, and how to compute.
        engine: runs cells and makes artefacts; None: this process, one after the other.
        retries: how often a job is tried again if its worker dies. A cell that raises is not tried again.
        save_every: epochs between checkpoints inside a cell; None: an interrupted cell starts again.
        progress: show a bar, and finished cells.

    Returns:
        The number of cells that failed; each is listed in `failures.jsonl` with its error.

    Raises:
        ValueError: a cell has unknown options or settings, another run writes into the folder, or its rows are of
            other weights of the base model or of another `bf16`.
    """
    failed, scratch = 0, folder / "cells"
    with alone(folder):
        cells, rows = unfinished(recipe, folder), results.read(folder / results.RESULTS)
        for model in {cell["model"] for cell in cells}:
            _check_same(rows, model, "bf16", bench.bf16, folder)
        for cell in cells:
            check_cell(cell)
        jobs = jobs_of(recipe, cells, bench, scratch, save_every)
        with tqdm(total=len(cells), unit="cell", disable=not progress, desc=recipe.name) as bar:
            for job, outcome in run_jobs(jobs, engine or Here(), retries, bar.set_postfix_str):
                if outcome.error is not None:
                    tqdm.write(f"{job}: {outcome.error}")
                elif progress:
                    score = "" if outcome.row is None else f"{outcome.row['mean']:.2%} "
                    tqdm.write(f"{job}: {score}({outcome.seconds:.0f} s)")
                if isinstance(job.work, Cell):
                    bar.update()
                    failed += outcome.error is not None
                    if outcome.row is not None:
                        _check_same(rows, job.work["model"], "base", outcome.row["provenance"]["base"], folder)
                    _write(job.work, outcome, recipe, folder)
                    if outcome.error is None:
                        shutil.rmtree(scratch / job.id, ignore_errors=True)
    return failed


def _check_same(rows: Iterable[Mapping[str, Any]], model: str, what: str, found: object, folder: Path) -> None:
    """Raises ValueError if rows of the model differ in a fact of their provenance, which rows of 0.1.0 may lack."""
    known = {row.get("provenance", {}).get(what) for row in rows if row["model"] == model} - {None}
    if known - {found}:
        raise ValueError(
            f"{folder}: expected {what} {', '.join(map(str, known))}, as its rows of the model {model!r} have, got "
            f"{found}; results of both do not compare, take another --output"
        )


def _write(cell: Cell, outcome: Outcome, recipe: Recipe, folder: Path) -> None:
    """Adds a row of results, or of failures."""
    if outcome.row is not None:
        row = {"recipe": recipe.name, **outcome.row, "attempts": outcome.attempts}
        results.append(folder / results.RESULTS, row)
    else:
        facts = {"error": outcome.error, "trace": outcome.trace, "attempts": outcome.attempts}
        results.append(folder / results.FAILURES, {"id": cell.id, "cell": dict(cell.facts), **facts})


def run_jobs(
    jobs: Sequence[Job], engine: Engine, retries: int, report: Callable[[str], object] = lambda text: None
) -> Iterator[tuple[Job, Outcome]]:
    """Runs jobs in their order, each after those that it needs, as many at once as the engine has room for.

    Args:
        jobs: the jobs.
        engine: runs them.
        retries: how often a job is tried again if its worker dies.
        report: is called with the names of the running jobs whenever these change.

    Yields:
        Jobs as they end, with their outcomes. A job that needs a failed one fails with its error, without an attempt.
    """
    needs = {job.id: job.needs for job in jobs}
    waiting, running = list(jobs), dict[str, Job]()
    ended, attempts = dict[str, Outcome](), Counter[str]()
    while waiting or running:
        still = []
        for job in waiting:
            before = [ended.get(id) for id in needs[job.id]]
            broken = next((outcome for outcome in before if outcome is not None and outcome.error is not None), None)
            if broken is not None:
                ended[job.id] = replace(broken, attempts=0)
                yield job, ended[job.id]
            elif None in before or len(running) >= engine.room:
                still.append(job)
            else:
                attempts[job.id] += 1
                running[job.id] = job
                engine.submit(job)
        waiting = still
        report(_named(list(running.values())))
        for job, outcome in engine.wait() if running else ():
            del running[job.id]
            if outcome.died and attempts[job.id] <= retries:
                tqdm.write(f"{job}: its worker died ({outcome.error}), attempt {attempts[job.id] + 1} follows")
                waiting.insert(0, job)
                continue
            ended[job.id] = replace(outcome, attempts=attempts[job.id])
            yield job, ended[job.id]


def _named(jobs: Sequence[Job]) -> str:
    more = [] if len(jobs) <= 3 else [f"{len(jobs) - 3} more"]
    return ", ".join([*map(str, jobs[:3]), *more])
