"""Measures one optimizer step on a GPU, cell by cell: `make gpu`, or `python benchmarks/gpu/measure.py --help`.

A cell is a model size, a density, a precision and a backend. In every cell the same weights and gradients go through
`masked_adamw_` and through the peers; the result is compared with the reference before anything is timed. Steps are
captured in a CUDA graph and replayed; "eager" rows time `MaskedAdamW.step()` from the host. Rows are appended to the
CSV after every cell, and cells that it already holds are skipped, so that an interrupted run goes on where it stopped.

With --device cpu the same code runs without graphs: that is how it is tested.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import ltp_sparse as ls
from ltp_sparse.testing import random_weights, xlmr_shapes

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"layers": 1, "hidden": 32, "intermediate": 64, "vocabulary": 200, "positions": 20},
    "encoder": {"embeddings": False},  # 85M
    "base": {},  # 277M
    "large": {"layers": 24, "hidden": 1024, "intermediate": 4096},  # 559M
}
CORE = [("base", density) for density in (0.2, 0.05, 0.01, 0.75)]
REST = [
    (model, density)
    for model in ("base", "encoder", "large")
    for density in (0.0005, 0.01, 0.05, 0.2, 0.5, 0.75, 1.0)
    if (model, density) not in CORE
]
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"rounding": "stochastic"},
    "bfloat16-8bit": {"rounding": "stochastic", "states": "8bit"},
}
PATIENCE_MS = 1000
OPTIONS = {"lr": 1e-3, "weight_decay": 0.01}
FIELDS = [
    "model", "n", "k", "density", "precision", "provider", "mode", "p50_ms", "p20_ms", "p80_ms", "host_ms",
    "touched_sectors", "bytes", "gbps", "share_of_copy", "state_bytes_per_entry", "ratio_to_fused", "verified",
]  # fmt: skip


class Cell(NamedTuple):
    model: str
    density: float
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

    def times(self, run: Callable[[], object]) -> list[float]:
        """Milliseconds per run, the caches flushed before each; what takes long is timed twice only."""
        found = []
        for number in range(self.repeats + 2):
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

    def host_time(self, run: Callable[[], object]) -> float:
        """Milliseconds that the host spends in a run, the device's work left out."""
        found = []
        for _ in range(5):
            self.synchronize()
            begin = time.perf_counter()
            run()
            found.append(1e3 * (time.perf_counter() - begin))
        self.synchronize()
        return statistics.median(found)


class Problem:
    def __init__(self, cell: Cell, device: torch.device) -> None:
        shapes = xlmr_shapes(**MODELS[cell.model])
        dtype = torch.float32 if cell.precision == "float32" else torch.bfloat16
        self.ticket = ls.Ticket.full(shapes) if cell.density == 1 else ls.Ticket.random(shapes, density=cell.density)
        self.initial = {name: tensor.to(device, dtype) for name, tensor in random_weights(self.ticket.shapes).items()}
        grads = random_weights(self.ticket.shapes, seed=1, scale=1e-3)
        self.params = {name: nn.Parameter(tensor.clone()) for name, tensor in self.initial.items()}
        for name, param in self.params.items():
            param.grad = grads[name].to(device, dtype)
        self.n, self.k, self.dtype = self.ticket.n, self.ticket.k, dtype

    def reset(self) -> None:
        for name, param in self.params.items():
            param.detach().copy_(self.initial[name])

    def optimizer(self, precision: str) -> ls.MaskedAdamW:
        return ls.MaskedAdamW(self.params, self.ticket, **OPTIONS, **PRECISIONS[precision])

    def touched_sectors(self) -> float:
        """Share of the 32-byte sectors of the weights that hold an active entry."""
        entries = 32 // self.dtype.itemsize
        touched = total = 0
        for index_set in self.ticket.sets.values():
            total += -(-index_set.n // entries)
            view = torch.int8 if entries == 8 else torch.int16
            full = index_set.k == index_set.n
            touched += -(-index_set.n // entries) if full else int(index_set.bitmap().view(view).count_nonzero())
        return touched / total

    def verify(self, precision: str, backend: str) -> None:
        """Two steps from the initial weights against the reference on a few parameters; raises if a bit differs."""
        names = sorted(self.params, key=lambda name: self.params[name].numel())[:12]
        small = self.ticket.restrict(names)
        outcomes = []
        for used, device in ((backend, self.flat_device), ("reference", torch.device("cpu"))):
            params = {name: nn.Parameter(self.initial[name].to(device, copy=True)) for name in names}
            for name, param in params.items():
                param.grad = self.params[name].grad.to(device)
            ls.use_backend(used)
            optimizer = ls.MaskedAdamW(params, small, **OPTIONS, **PRECISIONS[precision])
            optimizer.step()
            optimizer.step()
            outcomes.append([param.detach().cpu() for param in params.values()])
        if not all(map(torch.equal, *outcomes)):
            raise SystemExit(f"{backend}, {precision}: the update differs from the reference; nothing is timed")

    @property
    def flat_device(self) -> torch.device:
        return next(iter(self.params.values())).device


def state_bytes_moved(problem: Problem, optimizer: ls.MaskedAdamW, precision: str, touched: float) -> int:
    """Memory traffic of a step: sectors of p (read, written) and g, state read and written, the index read."""
    width = problem.dtype.itemsize
    moments = 2 if "8bit" in precision else 8
    return int(3 * width * touched * problem.n + moments * problem.k + optimizer.state_bytes())


def peers(problem: Problem) -> Iterator[tuple[str, Callable[[], object], int | None]]:
    """(name, step, bytes) of the optimizers that we are compared with, on the same parameters."""
    params = list(problem.params.values())
    width = problem.dtype.itemsize
    fused = torch.optim.AdamW(params, **OPTIONS, fused=True, capturable=params[0].is_cuda)
    yield "torch AdamW(fused=True)", fused.step, 7 * width * problem.n
    masks = {name: problem.ticket.mask(name).to(params[0].device) for name in problem.params}

    def multiplied() -> None:
        for name, param in problem.params.items():
            param.grad.mul_(masks[name])
        fused.step()

    yield "grad.mul_(mask) + fused", multiplied, (9 * width + 1) * problem.n
    fused.state.clear()  # the moments of one optimizer at a time
    foreach = torch.optim.AdamW(params, **OPTIONS, foreach=True, capturable=params[0].is_cuda)
    yield "torch AdamW(foreach=True)", foreach.step, None
    foreach.state.clear()
    yield "index_select + fused + index_copy_", _gathered(problem), None
    if params[0].is_cuda:
        yield from _packages(params)


def _gathered(problem: Problem) -> Callable[[], object]:
    names = [name for name, index_set in problem.ticket.sets.items() if index_set.k]
    device = problem.flat_device
    indices = {name: problem.ticket.indices(name).to(device) for name in names}
    flat = {name: problem.params[name].detach().view(-1) for name in names}
    compact = {name: nn.Parameter(flat[name][indices[name]]) for name in names}
    for param in compact.values():
        param.grad = torch.empty_like(param)
    optimizer = torch.optim.AdamW(compact.values(), fused=True, capturable=device.type == "cuda", **OPTIONS)

    def step() -> None:
        for name in names:
            torch.index_select(flat[name], 0, indices[name], out=compact[name].detach())
            torch.index_select(problem.params[name].grad.view(-1), 0, indices[name], out=compact[name].grad)
        optimizer.step()
        for name in names:
            flat[name].index_copy_(0, indices[name], compact[name].detach())

    return step


def _packages(params: list[nn.Parameter]) -> Iterator[tuple[str, Callable[[], object], int | None]]:
    def bitsandbytes() -> torch.optim.Optimizer:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(params, **OPTIONS)

    def torchao() -> torch.optim.Optimizer:
        from torchao.optim import AdamW8bit

        return AdamW8bit(params, **OPTIONS)

    def flashoptim() -> torch.optim.Optimizer:
        from flashoptim import FlashAdamW

        return FlashAdamW(params, **OPTIONS)

    for make in (bitsandbytes, torchao, flashoptim):
        try:
            yield f"{make.__name__} 8-bit AdamW", make().step, None
        except Exception as error:  # a peer that is missing or does not run here is named, not fatal
            print(f"  skipped: {make.__name__} ({type(error).__name__}: {error})", flush=True)


def copy_of(n: int, bench: Bench) -> list[float]:
    """Milliseconds of a plain copy of n float32 entries: the speed of light of a step."""
    source = torch.zeros(n, device=bench.device)
    target = torch.empty_like(source)
    return bench.times(lambda: target.copy_(source))


def measure(cell: Cell, bench: Bench, backends: list[str]) -> list[dict[str, Any]]:
    problem = Problem(cell, bench.device)
    touched = problem.touched_sectors()
    common = {
        "model": cell.model, "n": problem.n, "k": problem.k, "density": cell.density, "precision": cell.precision,
        "touched_sectors": touched,
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    copy_times = copy_of(problem.n, bench)
    copy_gbps = 8 * problem.n / statistics.median(copy_times) / 1e6

    def add(provider: str, mode: str, times: list[float], host: float | None, moved: int | None, **more: Any) -> None:
        p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive")
        p50 = statistics.median(times)
        gbps = moved / p50 / 1e6 if moved else None
        share = gbps / copy_gbps if gbps else None
        rows.append(
            {**common, "provider": provider, "mode": mode, "p50_ms": p50, "p20_ms": p20, "p80_ms": p80, "host_ms": host,
             "bytes": moved, "gbps": gbps, "share_of_copy": share, **more}
        )  # fmt: skip
        print(f"  {provider:<36}{mode:<7}{p50:>10.4f} ms" + (f"{gbps:>9.0f} GB/s" if gbps else ""), flush=True)

    add("copy", "eager", copy_times, None, 8 * problem.n)
    for backend in backends:
        problem.verify(cell.precision, backend)
        ls.use_backend(backend)
        problem.reset()
        optimizer = problem.optimizer(cell.precision)
        moved = state_bytes_moved(problem, optimizer, cell.precision, touched)
        held = optimizer.state_bytes() / problem.n
        for mode in ("graph", "eager"):
            step = bench.captured(optimizer.step) if mode == "graph" else optimizer.step
            host = bench.host_time(optimizer.step) if mode == "eager" else None
            add(f"MaskedAdamW ({backend})", mode, bench.times(step), host, moved,
                state_bytes_per_entry=held, verified=True)  # fmt: skip
        del optimizer, step
    ls.use_backend(None)
    for name, step, moved in peers(problem):
        problem.reset()
        mode = "graph" if "foreach" not in name and "8-bit" not in name else "eager"
        run = bench.captured(step) if mode == "graph" else step
        add(name, mode, bench.times(run), None, moved)
        del step, run
    baseline = next(row["p50_ms"] for row in rows if row["provider"] == "torch AdamW(fused=True)")
    for row in rows:
        row["ratio_to_fused"] = baseline / row["p50_ms"]
    return rows


def done(path: Path) -> set[Cell]:
    if not path.exists():
        return set()
    with path.open() as file:
        return {Cell(row["model"], float(row["density"]), row["precision"]) for row in csv.DictReader(file)}


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
    places = {"core": CORE, "rest": REST, "tiny": [("tiny", 0.2), ("tiny", 1.0)]}[args.grid]
    part, parts = map(int, args.part.split("/"))
    cells = [Cell(model, density, precision) for model, density in places for precision in PRECISIONS][
        part - 1 :: parts
    ]
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
        print(f"{cell.model}, density {cell.density:g}, {cell.precision}", flush=True)
        append(args.out, measure(cell, bench, backends), FIELDS)


if __name__ == "__main__":
    main()
