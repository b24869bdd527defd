"""Runs a recipe cell by cell: finished cells are kept, interrupted ones resume, failures are reported."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from ltp_sparse.recipes import results
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

    Several processes may work on one folder: a cell is locked while one runs it, and the others take the next.

    Args:
        save_every: epochs between checkpoints inside a cell; None: an interrupted cell starts anew
        part: (i, n): every n-th cell from the i-th on, for n processes on one recipe

    Returns the number of cells that failed; each is listed in `failures.jsonl` with its error.
    """
    index, parts = part
    mine = {cell.id for cell in recipe.cells[index - 1 :: parts]}
    todo = deque(cell for cell in unfinished(recipe, folder) if cell.id in mine)
    for cell in todo:
        check_cell(cell)
    failed, failures = 0, _failures(folder)
    others: set[str] = set()
    with tqdm(total=len(todo), unit="cell", disable=not progress, desc=recipe.name) as bar:
        while todo:
            cell = todo.popleft()
            bar.set_postfix_str(str(cell))
            path = folder / "cells" / f"{cell.id}.lock"
            path.parent.mkdir(parents=True, exist_ok=True)
            try:  # what another process works at comes last; if that has died by then, it is ours
                lock = FileLock(path).acquire(blocking=cell.id in others)
            except Timeout:
                others.add(cell.id)
                todo.append(cell)
                continue
            with lock:
                if not unfinished(replace(recipe, cells=(cell,)), folder):
                    tqdm.write(f"{cell}: another process has finished it") if progress else None
                elif cell.id in others and _failures(folder)[cell.id] > failures[cell.id]:
                    failed += 1
                    tqdm.write(f"{cell}: another process has tried it and failed")
                else:
                    failed += not _run(cell, recipe, folder, bench, save_every, progress)
                path.unlink(missing_ok=True)
            bar.update()
    return failed


def _run(cell: Cell, recipe: Recipe, folder: Path, bench: Workbench, save_every: int | None, progress: bool) -> bool:
    """Adds a row of results, or of failures; whether it is the former."""
    own = folder / "cells" / cell.id if save_every is not None else None
    try:
        row = run_cell(cell, bench, folder=own, save_every=save_every)
    except Exception as error:  # one cell that cannot run must not cost the others
        told = {"id": cell.id, "cell": dict(cell.facts), "error": repr(error), "trace": traceback.format_exc()}
        results.append(folder / results.FAILURES, told)
        tqdm.write(f"{cell}: {error}")
        bench.forget()
        return False
    results.append(folder / results.RESULTS, {"recipe": recipe.name, **row})
    if own is not None:
        shutil.rmtree(own, ignore_errors=True)
    tqdm.write(f"{cell}: {row['mean']:.2%} ({row['seconds']:.0f} s)") if progress else None
    return True


def _failures(folder: Path) -> Counter[str]:
    """Cell -> how often it has failed."""
    return Counter(row["id"] for row in results.read(folder / results.FAILURES))


def run_on_devices(command: Sequence[str], devices: Sequence[str]) -> int:
    """Runs a command once a device, with the cells shared out among them; returns the worst exit status.

    Every process sees one device (CUDA_VISIBLE_DEVICES); all write into the same results. One that ends by a signal
    has failed, and is told, like any whose status is not 0.
    """
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for i, device in enumerate(devices, 1):
            part = [*command, "--part", f"{i}/{len(devices)}"]
            processes.append(subprocess.Popen(part, env={**os.environ, "CUDA_VISIBLE_DEVICES": device}))
        statuses = [process.wait() for process in processes]
    except BaseException:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
        raise
    for device, status in zip(devices, statuses, strict=True):
        if status:
            print(
                f"device {device}: the process {_ended(status)}; run the same command again to continue",
                file=sys.stderr,
            )
    return max(128 - status if status < 0 else status for status in statuses)  # as a shell gives them


def _ended(status: int) -> str:
    if status > 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
