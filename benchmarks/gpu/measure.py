"""Measures one optimizer step on a GPU, cell by cell: `make gpu`, or `python benchmarks/gpu/measure.py --help`.

A cell is a model size, a density, the masks (uniformly random, or clustered as those of a real MLM run), and a
precision. In every cell the same weights and gradients go through `masked_adamw_` on every backend and through the
peers. Before anything is timed, ours is compared with the reference bit by bit, and all of them with AdamW in float64
(see `updates.py`); a peer that differs has a row without figures. Steps are captured in a CUDA graph and replayed;
"eager" rows time the step from the host, with gradients that stay where they are ("static") or lie elsewhere in every
step ("fresh"), as after a backward pass that made them anew. Rows are appended to the CSV after every cell, and cells
that it already holds are skipped: an interrupted run goes on where it stopped.

With --device cpu the same code runs without graphs: that is how it is tested.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import ltp_sparse as ls
from ltp_sparse.testing import xlmr_shapes

sys.path.append(str(Path(__file__).parents[1]))  # last: this folder, too, has a report.py and a run.py
import clustered
import updates
from harness import Provider, WrongResult, copy_provider
from updates import FOREACH, FUSED, GATHERED, MULTIPLIED, OPTIONS, Dense, gathered, masked, packages

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"layers": 1, "hidden": 32, "intermediate": 64, "vocabulary": 200, "positions": 20},
    "encoder": {"embeddings": False},  # 85M
    "base": {},  # 277M
    "large": {"layers": 24, "hidden": 1024, "intermediate": 4096},  # 559M
}
CORE = [*(("base", density, "uniform") for density in (0.2, 0.05, 0.01, 0.75)), ("base", 0.2, "clustered")]
REST = [
    (model, density, masks)
    for model in ("base", "encoder", "large")
    for masks, densities in (
        ("uniform", (0.5, 0.2, 0.05, 0.01, 0.0005, 0.75, 1.0)),
        ("clustered", (0.5, 0.2, 0.05, 0.01)),  # that many entries move at all
    )
    for density in densities
    if (model, density, masks) not in CORE
]
TINY = [("tiny", 0.2, "uniform"), ("tiny", 1.0, "uniform"), ("tiny", 0.2, "clustered")]
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"rounding": "stochastic"},
    "bfloat16-8bit": {"rounding": "stochastic", "states": "8bit"},
    "float16": {"master": True},
}
CAPTURED = (FUSED, MULTIPLIED, GATHERED)  # the peers whose steps are also replayed as graphs
SECTOR = 32  # bytes of memory that a GPU moves at least
PATIENCE_MS = 1000
FIELDS = [
    "model", "n", "k", "density", "masks", "precision", "provider", "mode", "gradients", "p50_ms", "p20_ms", "p80_ms",
    "host_ms", "touched_sectors", "bytes", "gbps", "share_of_copy", "state_bytes_per_entry", "ratio_to_fused",
    "verified",
]  # fmt: skip


class Cell(NamedTuple):
    model: str
    density: float
    masks: str
    precision: str


class Bench:
    """Times callables on one device."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self.flush = torch.empty((256 if device.type == "cuda" else 1) << 20, dtype=torch.uint8, device=device)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def captured(self, step: Callable[[], object]) -> Callable[[], object]:
        """The step as a graph to replay; on the CPU the step itself."""
        step()
        if self.device.type != "cuda":
            return step
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def times(self, run: Callable[[], object], before: Callable[[], object] = lambda: None) -> list[float]:
        """Milliseconds per run, `before` called and the caches flushed before each; what takes long: two runs only."""
        found = []
        for number in range(self.repeats + 2):
            before()
            self.flush.zero_()
            if self.device.type == "cuda":
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                stop.record()
                stop.synchronize()
                elapsed = start.elapsed_time(stop)
            else:
                begin = time.perf_counter()
                run()
                elapsed = 1e3 * (time.perf_counter() - begin)
            if number >= 2:
                found.append(elapsed)
            if len(found) >= 2 and sum(found) > PATIENCE_MS:
                break
        return found

    def host_time(self, run: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
        """Milliseconds that the host spends in a run, the device's work left out."""
        found = []
        for _ in range(5):
            before()
            self.synchronize()
            begin = time.perf_counter()
            run()
            found.append(1e3 * (time.perf_counter() - begin))
        self.synchronize()
        return statistics.median(found)


@lru_cache(maxsize=1)
def ticket_of(model: str, density: float, masks: str) -> ls.Ticket:
    """Kept for the precisions that follow each other."""
    shapes = xlmr_shapes(**MODELS[model])
    if masks == "clustered":
        return clustered.ticket(shapes, density)
    return ls.Ticket.full(shapes) if density == 1 else ls.Ticket.random(shapes, density=density)


class Problem(updates.Problem):
    def __init__(self, cell: Cell, device: torch.device) -> None:
        dtype = getattr(torch, cell.precision.partition("-")[0])
        ticket = ticket_of(cell.model, cell.density, cell.masks)
        generator = torch.Generator(device).manual_seed(0)

        def random(scale: float) -> dict[str, torch.Tensor]:
            made = (
                (name, torch.randn(shape, generator=generator, device=device)) for name, shape in ticket.shapes.items()
            )
            return {name: tensor.mul_(scale).to(dtype) for name, tensor in made}

        # float16: as under a loss scale, without which torch's moments in float16 vanish
        super().__init__(ticket, random(0.02), random(1.0 if dtype == torch.float16 else 1e-3), SECTOR)
        self.spare: dict[str, torch.Tensor] = {}

    def move_grads(self) -> None:
        """The same gradients, from now on at other addresses."""
        spare, self.spare = self.spare or self.copied_grads(), self.grads
        self.use_grads(spare)

    def optimizer(self, precision: str) -> ls.MaskedAdamW:
        return ls.MaskedAdamW(self.params, self.ticket, **OPTIONS, **PRECISIONS[precision])

    def touched_sectors(self) -> float:
        """Share of the sectors of the weights that hold an active entry."""
        entries = self.line // self.width
        return self.lines / sum(-(-index_set.n // entries) for index_set in self.ticket.sets.values())

    def check_bits(self, precision: str, backend: str) -> None:
        """Two steps from the initial weights against the reference on a few parameters; raises if a bit differs."""
        names = sorted(self.params, key=lambda name: self.params[name].numel())[:12]
        small = self.ticket.restrict(names)
        outcomes = []
        for used, device in ((backend, self.device), ("reference", torch.device("cpu"))):
            params = {name: nn.Parameter(self.initial[name].to(device, copy=True)) for name in names}
            for name, param in params.items():
                param.grad = self.params[name].grad.to(device)
            ls.use_backend(used)
            optimizer = ls.MaskedAdamW(params, small, **OPTIONS, **PRECISIONS[precision])
            optimizer.step()
            optimizer.step()
            outcomes.append([param.detach().cpu() for param in params.values()])
        if not all(map(torch.equal, *outcomes)):
            raise WrongResult(f"{backend}, {precision}: the update differs from the reference")


def peers(problem: Problem) -> Iterator[Provider]:
    """The optimizers that we are compared with, on the same parameters."""
    dense = Dense(problem)
    yield dense.fused()
    yield dense.multiplied()
    yield dense.provider(FOREACH, None, foreach=True)
    yield gathered(problem)
    yield from packages(problem)


def measure(cell: Cell, bench: Bench, backends: list[str]) -> list[dict[str, Any]]:
    problem = Problem(cell, bench.device)
    common = {**cell._asdict(), "n": problem.n, "k": problem.k, "touched_sectors": problem.touched_sectors()}
    rows: list[dict[str, Any]] = []

    def add(provider: Provider, mode: str, *, fresh: bool = False, **more: Any) -> None:
        """Rows of a provider that was verified."""
        run = bench.captured(provider.run) if mode == "graph" else provider.run
        move = problem.move_grads if fresh else lambda: None
        times, host = bench.times(run, move), bench.host_time(run, move)
        p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive")
        p50 = statistics.median(times)
        gbps = provider.bytes / p50 / 1e6 if provider.bytes else None
        copy_gbps = rows[0]["gbps"] if rows else gbps  # the copy comes first
        gradients = "fresh" if fresh else "static"
        rows.append(
            {**common, "provider": provider.name, "mode": mode, "gradients": gradients, "p50_ms": p50, "p20_ms": p20,
             "p80_ms": p80, "host_ms": host, "bytes": provider.bytes, "gbps": gbps,
             "share_of_copy": gbps / copy_gbps if gbps else None, "verified": True, **more}
        )  # fmt: skip
        gbps_text = f"{gbps:>9.0f} GB/s" if gbps else ""
        print(f"  {provider.name:<36}{mode:<6} {gradients:<7}{p50:>10.4f} ms{gbps_text}", flush=True)

    copy = copy_provider(problem.n, bench.device)
    copy.verify()
    add(copy, "eager")
    for backend in backends:
        problem.check_bits(cell.precision, backend)
        ls.use_backend(backend)
        optimizer = problem.optimizer(cell.precision)
        ours = masked(problem, f"MaskedAdamW ({backend})", optimizer)
        ours.verify()
        for mode, fresh in (("graph", False), ("eager", False), ("eager", True)):
            add(ours, mode, fresh=fresh, state_bytes_per_entry=optimizer.state_bytes() / problem.n)
        del optimizer, ours
    ls.use_backend(None)
    for peer in peers(problem):
        try:
            peer.verify()
        except WrongResult as error:
            print(f"  {error}; nothing is timed", flush=True)
            rows.append({**common, "provider": peer.name, "mode": "eager", "gradients": "static", "verified": False})
            continue
        for mode in ("graph", "eager") if peer.name in CAPTURED else ("eager",):
            add(peer, mode)
    baseline = next((row["p50_ms"] for row in rows if row["provider"] == FUSED and row["verified"]), None)
    for row in rows:
        row["ratio_to_fused"] = baseline / row["p50_ms"] if baseline and row["verified"] else None
    return rows


def done(path: Path) -> set[Cell]:
    if not path.exists():
        return set()
    with path.open() as file:
        rows = csv.DictReader(file)
        return {Cell(row["model"], float(row["density"]), row["masks"], row["precision"]) for row in rows}


def append(path: Path, rows: list[dict[str, Any]], fields: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--grid", choices=("core", "rest", "tiny"), default="core")
    parser.add_argument("--part", default="1/1", help="i/n: the i-th of n parts of the grid")
    parser.add_argument("--seconds", type=float, default=300, help="no cell is begun after this many seconds")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True, help="CSV file, appended to")
    args = parser.parse_args()
    device = torch.device(args.device)
    places = {"core": CORE, "rest": REST, "tiny": TINY}[args.grid]
    part, parts = map(int, args.part.split("/"))
    cells = [Cell(*place, precision) for place in places for precision in PRECISIONS][part - 1 :: parts]
    known = ls.available_backends(device)
    backends = [
        name for name in (("triton", "compiled") if device.type == "cuda" else ("compiled",)) if known[name] == "ok"
    ]
    for name, reason in known.items():
        if name not in backends and name != "reference":
            print(f"skipped: {name} ({reason})")
    if not backends:
        sys.exit("no backend to measure")
    bench, start, finished = Bench(device, args.repeats), time.perf_counter(), done(args.out)
    left = [cell for cell in cells if cell not in finished]
    for number, cell in enumerate(left):
        if time.perf_counter() - start > args.seconds:
            print("time is up; left for another run:", *(str(tuple(rest)) for rest in left[number:]))
            break
        print(f"{cell.model}, density {cell.density:g}, {cell.masks} masks, {cell.precision}", flush=True)
        try:
            rows = measure(cell, bench, backends)
        except WrongResult as error:
            sys.exit(f"{error}; nothing is timed")
        append(args.out, rows, FIELDS)


if __name__ == "__main__":
    main()
