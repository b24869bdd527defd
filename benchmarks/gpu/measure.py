"""Measures one optimizer step on a GPU, cell by cell: `make gpu`, or `python benchmarks/gpu/measure.py --help`.

A cell is a model size, a density, a precision and a backend. In every cell the same weights and gradients go through
`masked_adamw_` and through the peers; the result is compared with the reference before anything is timed. Steps are
captured in a CUDA graph and replayed; "eager" rows time the step from the host, with gradients that stay where they are
("static") or lie elsewhere in every step ("fresh"), as after a backward pass that made them anew. Rows are appended to
the CSV after every cell, and cells that it already holds are skipped: an interrupted run goes on where it stopped.

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
    "float16": {"master": True},
}
FUSED = "torch AdamW(fused=True)"
PATIENCE_MS = 1000
OPTIONS = {"lr": 1e-3, "weight_decay": 0.01}
FIELDS = [
    "model", "n", "k", "density", "precision", "provider", "mode", "gradients", "p50_ms", "p20_ms", "p80_ms", "host_ms",
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
def ticket_of(model: str, density: float) -> ls.Ticket:
    """A uniformly random ticket, kept for the precisions that follow each other."""
    shapes = xlmr_shapes(**MODELS[model])
    return ls.Ticket.full(shapes) if density == 1 else ls.Ticket.random(shapes, density=density)


class Problem:
    def __init__(self, cell: Cell, device: torch.device) -> None:
        self.dtype = getattr(torch, cell.precision.partition("-")[0])
        self.ticket = ticket_of(cell.model, cell.density)
        self.n, self.k = self.ticket.n, self.ticket.k
        generator = torch.Generator(device).manual_seed(0)

        def random(scale: float) -> dict[str, torch.Tensor]:
            shapes = self.ticket.shapes.items()
            made = ((name, torch.randn(shape, generator=generator, device=device)) for name, shape in shapes)
            return {name: tensor.mul_(scale).to(self.dtype) for name, tensor in made}

        self.initial = random(0.02)
        self.params = {name: nn.Parameter(tensor.clone()) for name, tensor in self.initial.items()}
        self.grads = [random(1e-3)]
        self.use_grads(0)

    def use_grads(self, number: int) -> None:
        for name, param in self.params.items():
            param.grad = self.grads[number][name]

    def move_grads(self) -> None:
        """The same gradients, from now on at other addresses."""
        if len(self.grads) == 1:
            self.grads.append({name: grad.clone() for name, grad in self.grads[0].items()})
        self.grads.reverse()
        self.use_grads(0)

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
    held = (2 if "8bit" in precision else 8) + (4 if optimizer.precision.keeps_master(problem.dtype) else 0)
    return int(3 * width * touched * problem.n + held * problem.k + optimizer.state_bytes())


def peers(problem: Problem) -> Iterator[tuple[str, Callable[[], object], int | None]]:
    """(name, step, bytes) of the optimizers that we are compared with, on the same parameters."""
    params = list(problem.params.values())
    width = problem.dtype.itemsize
    fused = torch.optim.AdamW(params, **OPTIONS, fused=True, capturable=params[0].is_cuda)
    yield FUSED, fused.step, 7 * width * problem.n
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


def copier(n: int, device: torch.device) -> Callable[[], object]:
    """A plain copy of n float32 entries: the speed of light of a step."""
    source = torch.zeros(n, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def copy_of(n: int, bench: Bench) -> list[float]:
    """Milliseconds of a plain copy of n float32 entries."""
    return bench.times(copier(n, bench.device))


def measure(cell: Cell, bench: Bench, backends: list[str]) -> list[dict[str, Any]]:
    problem = Problem(cell, bench.device)
    touched = problem.touched_sectors()
    common = {
        "model": cell.model, "n": problem.n, "k": problem.k, "density": cell.density, "precision": cell.precision,
        "touched_sectors": touched,
    }  # fmt: skip
    rows: list[dict[str, Any]] = []

    def add(
        provider: str, step: Callable[[], object], mode: str, moved: int | None, *, fresh: bool = False, **more: Any
    ) -> None:
        run = bench.captured(step) if mode == "graph" else step
        move = problem.move_grads if fresh else lambda: None
        times, host = bench.times(run, move), bench.host_time(run, move)
        p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive")
        p50 = statistics.median(times)
        gbps = moved / p50 / 1e6 if moved else None
        copy_gbps = rows[0]["gbps"] if rows else gbps  # the copy comes first
        gradients = "fresh" if fresh else "static"
        rows.append(
            {**common, "provider": provider, "mode": mode, "gradients": gradients, "p50_ms": p50, "p20_ms": p20,
             "p80_ms": p80, "host_ms": host, "bytes": moved, "gbps": gbps,
             "share_of_copy": gbps / copy_gbps if gbps else None, **more}
        )  # fmt: skip
        gbps_text = f"{gbps:>9.0f} GB/s" if gbps else ""
        print(f"  {provider:<36}{mode:<6} {gradients:<7}{p50:>10.4f} ms{gbps_text}", flush=True)

    add("copy", copier(problem.n, bench.device), "eager", 8 * problem.n)
    for backend in backends:
        problem.verify(cell.precision, backend)
        ls.use_backend(backend)
        problem.reset()
        optimizer = problem.optimizer(cell.precision)
        moved = state_bytes_moved(problem, optimizer, cell.precision, touched)
        held = {"state_bytes_per_entry": optimizer.state_bytes() / problem.n, "verified": True}
        for mode, fresh in (("graph", False), ("eager", False), ("eager", True)):
            add(f"MaskedAdamW ({backend})", optimizer.step, mode, moved, fresh=fresh, **held)
        del optimizer
    ls.use_backend(None)
    for name, step, moved in peers(problem):
        problem.reset()
        for mode in ("eager",) if "foreach" in name or "8-bit" in name else ("graph", "eager"):
            add(name, step, mode, moved)
        del step
    baseline = next(row["p50_ms"] for row in rows if row["provider"] == FUSED)
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
