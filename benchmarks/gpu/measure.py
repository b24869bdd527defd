"""Measures steps, selections and copies in the cells of a grid, for one backend or for the peers. `make gpu` runs it.

All providers of a cell get the same weights and gradients. Each is verified first, in the same form that is timed: a
step, replayed from a graph or eager, must match AdamW in float64, ours also the bits of the reference; selections and
copies must be exact. Then it is timed in turns with the baseline of the operation. Its row, with times or with an
error, is written at once. Providers that have a row are skipped, so that an interrupted run can be continued.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

sys.path.append(str(Path(__file__).parents[1]))  # last: this folder, too, has a report.py and a run.py
import copies
import device as devices
import rows
import selection
import step
from harness import Provider
from sources import code

import ltp_sparse as ls

OPERATIONS = (step, selection, copies)
WHO = ("compiled", "triton", "peers", "cub", "kthvalue")
T = TypeVar("T")


class Measurement:
    """The rows of one process."""

    def __init__(self, folder: Path, device: devices.Device, who: str) -> None:
        self.path, self.device, self.who = folder / rows.MEASURED_CSV, device, who
        self.code = code() if who in ls.available_backends() else ""  # peers do not depend on our sources
        self.made: Provider | None = None  # for all modes; made again after a failure
        self.errors: dict[tuple[str, ...], str] = {}
        for row in rows.read(self.path):
            if row["code"] in ("", self.code):
                self.errors[rows.key_of(row)] = row["error"]

    def add(self, row: rows.Row) -> None:
        rows.append(self.path, rows.MEASURED, {**row, "code": self.code})
        self.errors[rows.key_of(row)] = str(row.get("error", ""))

    def guarded(self, key: dict[str, Any], run: Callable[..., T], *arguments: Any) -> T | None:
        """The result of a run; None if it fails, which is written as its row, or has failed before."""
        if self.errors.get(rows.key_of(key)):
            return None
        rows.current().write_text(json.dumps({**key, "code": self.code}))
        result, failed = None, False
        try:
            result = run(*arguments)
        except Exception as error:
            self.add(rows.failure(key, f"{type(error).__name__}: {error}"))
            print(f"  {key['provider']}, {key['mode']}: {''.join(traceback.format_exception(error)[-2:])}", flush=True)
            failed = True
        rows.current().unlink()
        if failed:
            self.made = None
            gc.collect()
            self.device.synchronize()  # raises if the device is lost: then another process has to go on
        return result

    def cell(self, op: Any, cell: Any) -> None:
        known = {**cell._asdict(), "mode": ""}

        def keys(contestant: step.Contestant) -> list[dict[str, Any]]:
            found = [{**known, "provider": contestant.name, "mode": mode} for mode in contestant.modes]
            return [key for key in found if rows.key_of(key) not in self.errors]

        left = [contestant for contestant in op.contestants(cell, self.who) if keys(contestant)]
        if not left:
            return
        print(f"{cell.op}: {cell.model}, density {cell.density:g}, {cell.precision}, {cell.kind}", flush=True)
        gc.freeze()  # what is imported by now is no garbage, and takes .2 s to look through
        clocks = self.device.warm()
        problem = self.guarded({**known, "provider": "weights"}, op.Problem, cell, self.device)
        if problem is None:
            return
        mode = "graph" if op is step else "eager"
        baseline = self.guarded({**known, "provider": op.BASELINE, "mode": mode}, self.baseline, op, problem, mode)
        for contestant in left:
            for key in keys(contestant):
                row = self.guarded(key, self.row, contestant, key["mode"], problem, baseline)
                if row is not None:
                    self.add({**key, "n": problem.n, "k": problem.k, "clocks_mhz": clocks, **row})
                    print(f"  {key['provider']:<40}{key['mode']:<6}{row['p50_ms']:>11.4f} ms", flush=True)
            self.made = None
            gc.collect()

    def baseline(self, op: Any, problem: Any, mode: str) -> Provider:
        provider = op.baseline(problem)
        self.prepare(provider, mode)
        return provider

    def prepare(self, provider: Provider, mode: str) -> int | None:
        """Verifies it in the form that is timed; returns the nodes of its graph."""
        provider.run, nodes = self.device.prepared(provider.name, provider.run, mode == "graph")
        provider.verify()
        return nodes

    def row(self, contestant: step.Contestant, mode: str, problem: Any, baseline: Provider | None) -> dict[str, Any]:
        provider = self.made = self.made or contestant.make(problem)
        plain = provider.run
        nodes = self.prepare(provider, mode)
        before = problem.move_grads if mode == "fresh" else provider.before or (lambda: None)
        _, temporary = self.device.peak(provider.run)
        turns = [(provider.run, before)]
        if baseline is not None and contestant.rounds > 1:
            turns.append((baseline.run, lambda: None))
        times, *others = self.device.times(turns, contestant.rounds)
        p20, _, _, p80 = statistics.quantiles(times * 2, n=5, method="inclusive")
        p50, memory = statistics.median(times), temporary if provider.memory is None else provider.memory
        host_ms = self.device.host_ms(provider.run, before) if contestant.rounds > 1 else None
        provider.run = plain
        return {
            "p50_ms": p50, "p20_ms": p20, "p80_ms": p80, "nodes": nodes, "host_ms": host_ms,
            "ratio": statistics.median(others[0]) / p50 if others else None,
            "bytes": provider.bytes, "sector_bytes": provider.bytes_in_lines,
            "memory_per_entry": None if memory is None else memory / problem.n,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("who", choices=WHO)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--grid", choices=step.GRIDS, default="core")
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    device = devices.named(args.device)
    known = ls.available_backends(device.torch)
    if known.get(args.who, "ok") != "ok":
        sys.exit(f"{args.who}: {known[args.who]}")
    if args.who in known:
        ls.use_backend(args.who)
    measurement = Measurement(args.folder, device, args.who)
    for op in OPERATIONS:
        for cell in op.GRIDS[args.grid]:
            measurement.cell(op, cell)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
