"""Runs a recipe cell by cell: what is finished stays, what was interrupted goes on, what fails is told."""

from __future__ import annotations

import os
import shutil
import subprocess
import traceback
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from ltp_sparse import results
from ltp_sparse.recipes.cell import Workbench, check_cell, run_cell
from ltp_sparse.recipes.recipe import Cell, Recipe


def unfinished(recipe: Recipe, folder: Path) -> list[Cell]:
    """The cells without a row in the folder's results."""
    done = {row["id"] for row in results.read(folder / results.RESULTS)}
    return [cell for cell in recipe.cells if cell.id not in done]


def run_recipe(
    recipe: Recipe,
    folder: Path,
    bench: Workbench,
    *,
    save_every: int | None = None,
    part: tuple[int, int] = (1, 1),
    progress: bool = True,
) -> int:
    """Runs the cells that have no row yet, and adds their rows to `results.jsonl` in the folder.

    save_every: epochs between checkpoints inside a cell; None: an interrupted cell starts anew
    part:       (i, n): every n-th cell from the i-th on, for n processes on one recipe

    Returns the number of cells that failed; each is told in `failures.jsonl` with its error.
    """
    index, parts = part
    mine = {cell.id for cell in recipe.cells[index - 1 :: parts]}
    todo = [cell for cell in unfinished(recipe, folder) if cell.id in mine]
    for cell in todo:
        check_cell(cell)
    failed = 0
    with tqdm(todo, unit="cell", disable=not progress, desc=recipe.name) as bar:
        for cell in bar:
            bar.set_postfix_str(str(cell))
            own = folder / "cells" / cell.id if save_every is not None else None
            try:
                row = run_cell(cell, bench, folder=own, save_every=save_every)
            except Exception as error:  # one cell that cannot run must not cost the others
                failed += 1
                told = {"id": cell.id, "cell": dict(cell.facts), "error": repr(error), "trace": traceback.format_exc()}
                results.append(folder / results.FAILURES, told)
                tqdm.write(f"{cell}: {error}")
                bench.forget()
                continue
            results.append(folder / results.RESULTS, {"recipe": recipe.name, **row})
            if own is not None:
                shutil.rmtree(own, ignore_errors=True)
            tqdm.write(f"{cell}: {row['mean']:.2%} ({row['seconds']:.0f} s)") if progress else None
    return failed


def run_on_devices(command: Sequence[str], devices: Sequence[str]) -> int:
    """Runs a command once a device, with the cells shared out among them; returns the worst exit status.

    Every process sees one device (CUDA_VISIBLE_DEVICES); all write into the same results.
    """
    processes = [
        subprocess.Popen(
            [*command, "--part", f"{i}/{len(devices)}"], env={**os.environ, "CUDA_VISIBLE_DEVICES": device}
        )
        for i, device in enumerate(devices, 1)
    ]
    try:
        return max(process.wait() for process in processes)
    except BaseException:
        for process in processes:
            process.terminate()
        raise
