"""Times both operations of this checkout and of another one alternately: is anything slower than before?

The other checkout is named by a Python that has it installed:

    git worktree add ../before v0.1.0 && make -C ../before .venv/.installed-test
    python benchmarks/compare.py ../before/.venv/bin/python

Each checkout has a process with its tensors. The two take turns, one case at a time, so that other work on the machine
affects both. The ratio is the median over the rounds of each round's ratio. Results are compared elsewhere.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

CASES: dict[str, dict[str, object]] = {
    "masked_adamw_, float32, 1 %": {"density": 0.01},
    "masked_adamw_, float32, 5 %": {"density": 0.05},
    "masked_adamw_, float32, 20 %": {"density": 0.2},
    "masked_adamw_, float32, 75 %": {"density": 0.75},
    "masked_adamw_, 8-bit moments, 5 %": {"density": 0.05, "states": "8bit"},
    "masked_adamw_, 8-bit moments, 20 %": {"density": 0.2, "states": "8bit"},
    "masked_adamw_, bfloat16 with master, 20 %": {"density": 0.2, "dtype": "bfloat16", "master": True},
    "masked_adamw_, bfloat16 stochastic, 20 %": {"density": 0.2, "dtype": "bfloat16", "stochastic": True},
    "topk_delta, float32, 1 %": {"k": 0.01, "dtype": "float32"},
    "topk_delta, float32, 20 %": {"k": 0.2, "dtype": "float32"},
    "topk_delta, bfloat16, 20 %": {"k": 0.2, "dtype": "bfloat16"},
}
"""Name -> options of `update_problem`, or the share and dtype of a selection."""

FIELDS = ("case", "entries", "ms", "ms_before", "ratio", "rounds", "threads", "commit", "commit_before", "time")


def problem(options: dict[str, object], shapes: dict[str, tuple[int, int]]) -> Callable[[], object]:
    """The function of a case, by an API that older checkouts also have."""
    from ltp_sparse.ops import adamw_coefficients, topk_delta
    from ltp_sparse.testing import random_weights, update_problem

    dtype = getattr(torch, str(options.get("dtype", "float32")))
    if "k" in options:
        initial = list(random_weights(shapes, seed=0).values())
        moves = random_weights(shapes, seed=1, scale=1e-3).values()
        tuned = [(before + move).to(dtype) for before, move in zip(initial, moves, strict=True)]
        initial = [tensor.to(dtype) for tensor in initial]
        k = int(float(str(options["k"])) * sum(tensor.numel() for tensor in tuned))
        return lambda: topk_delta(initial, tuned, k)
    update = update_problem(shapes, **{**options, "dtype": dtype})  # type: ignore[arg-type]
    rows = adamw_coefficients(torch.full((len(shapes),), 5), lr=1e-4)
    return lambda: update.step(rows)


def work(entries: int, threads: int) -> None:
    """Reads names of cases from standard input and prints the seconds of each."""
    torch.set_num_threads(threads)
    shapes = {f"w{i}": (entries // 4 // 1024, 1024) for i in range(4)}
    name, run = "", None
    for line in sys.stdin:
        if (case := line.strip()) != name:
            run = None  # frees the tensors of the last case first
            name, run = case, problem(CASES[case], shapes)
            run()
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)


class Checkout:
    """A checkout and its process, which runs cases by name.

    Args:
        python: a Python that has the checkout installed.
        arguments: arguments of this script for the process.
    """

    def __init__(self, python: str, arguments: list[str]) -> None:
        self.commit = commit_of(python)
        command = [python, str(Path(__file__).resolve()), "--work", *arguments]
        self._worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ms(self, case: str) -> float:
        """The milliseconds of one run of a case."""
        assert self._worker.stdin is not None and self._worker.stdout is not None
        self._worker.stdin.write(case + "\n")
        self._worker.stdin.flush()
        return 1e3 * json.loads(self._worker.stdout.readline())

    def close(self) -> None:
        assert self._worker.stdin is not None
        self._worker.stdin.close()
        self._worker.wait()


def commit_of(python: str) -> str:
    """The commit of the checkout that a Python has installed."""
    code = "import pathlib, ltp_sparse; print(pathlib.Path(ltp_sparse.__file__).parents[1])"
    folder = subprocess.run([python, "-c", code], cwd="/", capture_output=True, text=True, check=True).stdout.strip()
    git = ["git", "-C", folder, "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", nargs="?", help="the Python of the other checkout")
    parser.add_argument("--entries", type=int, default=1 << 26, help="of the weights (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="timed runs of each case (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="CSV file for the rows (default: none)")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options.entries, options.threads)
    if options.python is None:
        parser.error("expected the Python of the other checkout, e.g. ../before/.venv/bin/python")
    arguments = ["--entries", str(options.entries), "--threads", str(options.threads)]
    checkouts = [Checkout(python, arguments) for python in (sys.executable, options.python)]
    commits = [checkout.commit for checkout in checkouts]
    rows = []
    print(f"{'milliseconds':44} {'now':>9} {'before':>9}   ratio   ({', '.join(commits)})")
    for case in CASES:
        times: list[list[float]] = [[], []]
        for number in range(options.rounds + 1):
            for side in (0, 1) if number % 2 else (1, 0):
                times[side].append(checkouts[side].ms(case))
        now, before = (found[1:] for found in times)  # the first round warms up
        ratio = statistics.median(a / b for a, b in zip(now, before, strict=True))
        medians = statistics.median(now), statistics.median(before)
        print(f"{case:44} {medians[0]:9.3f} {medians[1]:9.3f}   {ratio:.3f}", flush=True)
        at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        figures = [f"{value:.4g}" for value in (*medians, ratio)]
        rows.append([case, options.entries, *figures, options.rounds, options.threads, *commits, at])
    for checkout in checkouts:
        checkout.close()
    if options.out is not None:
        with options.out.open("w", newline="") as file:
            csv.writer(file).writerows([FIELDS, *rows])


if __name__ == "__main__":
    main()
