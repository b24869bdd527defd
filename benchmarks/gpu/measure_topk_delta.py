"""Measures the selection on a GPU, cell by cell: `make gpu`, or `python benchmarks/gpu/measure_topk_delta.py --help`.

A cell is a model size, a density, a dtype and a distribution of deltas. In every cell `topk_delta` runs on each backend
and route beside the usual recipes, which have the easier task: they find entries or a threshold, build no masks, break
ties as they like and never look for NaN. Nothing is timed before its result was compared with the definition; a peer
that fails has a row without figures. Times are those of the whole call, host included; "pass" rows are single passes
over the weights.

Rows are appended to the CSV after every cell, and cells that it already holds are skipped. --device cpu tries the code.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cub_topk import CubTopK, UnavailableError
from measure import MODELS, Bench, append, copy_provider
from torch import Tensor

import ltp_sparse as ls
from ltp_sparse import backends
from ltp_sparse.backends.arguments import Band, Histogram, Tensors
from ltp_sparse.ops import index_sets
from ltp_sparse.ops.routes import Selection, select_topk
from ltp_sparse.ops.sources import TensorSource
from ltp_sparse.testing import xlmr_shapes
from ltp_sparse.tickets.layout import Layout

SHAPES = MODELS | {"7b": {"layers": 32, "hidden": 4096, "intermediate": 16_384}}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
UNTOUCHED = 0.7  # share of embedding rows that keep their values, as those of absent words do
PEERS = {
    "topk": "sub + abs + cat + topk(sorted=False)",
    "topk_sorted": "sub + abs + cat + topk",
    "sort": "sub + abs + cat + sort",
    "kthvalue": "sub + abs + cat + kthvalue",
    "cub": "sub + abs + cat + CUB DeviceTopK",
    "cub_flat": "CUB DeviceTopK on weights in one tensor",
}
KTHVALUE_UP_TO = 300_000_000  # entries: two seconds a run, on one processor of the device, and at every k
FIELDS = [
    "model", "n", "k", "density", "dtype", "deltas", "provider", "p50_ms", "p20_ms", "p80_ms", "bytes", "gbps",
    "share_of_copy", "temporary_bytes_per_entry", *(f"ratio_to_{peer}" for peer in PEERS), "verified",
]  # fmt: skip


class Cell(NamedTuple):
    model: str
    density: float
    dtype: str
    deltas: str


# cells of the same tensors stand together: these are made once
CORE = [
    *(Cell("base", density, "float32", "normal") for density in (0.2, 0.01, 0.5)),
    Cell("base", 0.2, "float32", "untouched"),
    Cell("base", 0.2, "bfloat16", "normal"),
]
REST = [
    Cell(model, density, dtype, deltas)
    for model in ("base", "encoder", "large", "7b")
    for dtype in DTYPES
    for deltas in ("normal", "untouched", "heavy")
    for density in (0.0005, 0.01, 0.05, 0.2, 0.5, 0.95)
    if (model, dtype) != ("7b", "float32") and Cell(model, density, dtype, deltas) not in CORE
]
TINY = [Cell("tiny", 0.2, "float32", "normal"), Cell("tiny", 0.5, "bfloat16", "untouched")]


class Problem:
    """Weights before and after tuning, on the device.

    flat: all of them before, and after; the tensors are views of these
    """

    def __init__(self, cell: Cell, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        dtype = DTYPES[cell.dtype]
        shapes = xlmr_shapes(**SHAPES[cell.model])
        self.sizes = [shape.numel() for shape in shapes.values()]
        self.n, self.device, self.width = sum(self.sizes), device, dtype.itemsize
        self.flat = torch.empty(self.n, dtype=dtype, device=device), torch.empty(self.n, dtype=dtype, device=device)
        self.initial, self.tuned = (
            [part.view(shape) for part, shape in zip(flat.split(self.sizes), shapes.values(), strict=True)]
            for flat in self.flat
        )
        for (name, shape), before, after in zip(shapes.items(), self.initial, self.tuned, strict=True):
            before.copy_(torch.randn(shape, generator=generator, device=device).mul_(0.02))
            delta = torch.randn(shape, generator=generator, device=device).mul_(1e-3)
            if cell.deltas == "heavy":
                delta *= torch.randn(shape, generator=generator, device=device).exp_()
            if cell.deltas == "untouched" and "embeddings" in name:
                delta[torch.rand(len(delta), generator=generator, device=device) < UNTOUCHED] = 0
            after.copy_(delta.add_(before))

    def each_delta(self) -> Iterator[Tensor]:
        """float32, flat: the absolute deltas of every tensor."""
        for before, after in zip(self.initial, self.tuned, strict=True):
            yield (after.float() - before.float()).abs_().view(-1)

    def deltas(self) -> Tensor:
        """float32 [n]"""
        return torch.cat(list(self.each_delta()))

    def threshold(self, k: int) -> float:
        """The k-th largest delta, by bisection of its bits: in little memory, and unlike any of the contestants."""
        low, high = 0, 0x7F800000
        while high - low > 1:
            middle = (low + high) // 2
            reached = sum((delta.view(torch.int32) >= middle).sum() for delta in self.each_delta())
            low, high = (middle, high) if int(reached) >= k else (low, middle)
        return torch.tensor(low, dtype=torch.int32).view(torch.float32).item()

    def check(self, selection: Selection, k: int, threshold: float) -> bool:
        """Whether these are all entries above the threshold and, of those at it, the earliest; zeros never."""
        above = sum((delta > threshold).sum() for delta in self.each_delta())
        ties = k - int(above) if threshold > 0 else 0
        for delta, index_set in zip(self.each_delta(), index_sets(selection, self.sizes), strict=True):
            expected = delta > threshold
            at = (delta == threshold).nonzero().view(-1)[:ties]
            expected[at] = True
            ties -= at.numel()
            if not torch.equal(index_set.mask().to(self.device), expected):
                return False
        return True

    def check_values(self, values: Tensor, k: int, threshold: float) -> bool:
        """Whether these are the k largest deltas, in any order: their number, the least, and the sum of their bits."""
        ties, expected = k, 0
        for delta in self.each_delta():
            above = delta[delta > threshold].view(torch.int32)
            ties, expected = ties - above.numel(), expected + int(above.sum(dtype=torch.int64))
        expected += ties * int(torch.tensor(threshold).view(torch.int32))
        found = int(values.view(torch.int32).sum(dtype=torch.int64))
        return (values.numel(), values.min().item(), found) == (k, threshold, expected)

    def check_band(self, counts: Tensor, threshold: float) -> bool:
        above = sum((delta > threshold).sum() for delta in self.each_delta())
        at = sum((delta == threshold).sum() for delta in self.each_delta())
        return threshold == 0 or counts.tolist() == [int(above), int(at)]

    def check_histogram(self, bins: Tensor) -> bool:
        """Whether these are the numbers of deltas above zero by the upper 15 bits of their magnitude."""
        keys = (delta[delta > 0].view(torch.int32) for delta in self.each_delta())
        return torch.equal(bins, sum(torch.bincount(key >> 16, minlength=bins.numel()) for key in keys))


class Provider(NamedTuple):
    """run: does it once; check: whether what it returned is right; bytes: memory traffic of a run."""

    name: str
    run: Callable[[], Any]
    check: Callable[[Any], bool]
    bytes: float


def ours(problem: Problem, k: int, threshold: float) -> Iterator[Provider]:
    """Every backend and route. Triton has no histogram pass of its own."""
    reading, bitmap = 2 * problem.width * problem.n, problem.n // 8
    known = ls.available_backends(problem.device)
    for name in ("triton", "compiled"):
        if known[name] != "ok" or (name == "triton" and problem.device.type == "cpu"):
            continue
        ls.use_backend(name)
        passes = backends.resolve(problem.device)
        ls.use_backend(None)
        for route, moved in (("sample", reading + bitmap), ("histogram", 2 * reading + bitmap)):
            if name == "triton" and route == "histogram":
                continue
            run = partial(select, problem, passes, k, route)
            check = partial(problem.check, k=k, threshold=threshold)
            yield Provider(f"topk_delta, {route} ({name})", run, check, moved)
        run, check = partial(band, problem, passes, threshold), partial(problem.check_band, threshold=threshold)
        yield Provider(f"pass: delta_band ({name})", run, check, reading + bitmap)
        if name == "compiled":
            run = partial(histogram, problem, passes)
            yield Provider("pass: delta_histogram (compiled)", run, problem.check_histogram, reading)


def select(problem: Problem, passes: backends.Backend, k: int, route: str) -> Selection:
    source = TensorSource(problem.initial, problem.tuned)
    return select_topk(passes, source, [0] * len(problem.sizes), [k], route=route)


def histogram(problem: Problem, passes: backends.Backend) -> Tensor:
    bins = torch.zeros(1, 32_768, dtype=torch.int64, device=problem.device)
    nonfinite = torch.zeros(1, dtype=torch.int64, device=problem.device)
    sides, groups = (Tensors(problem.initial), Tensors(problem.tuned)), [0] * len(problem.sizes)
    passes.delta_histogram(Histogram(*sides, groups, None, bins, nonfinite))
    return bins[0]


def band(problem: Problem, passes: backends.Backend, threshold: float) -> Tensor:
    """Marks what is above the threshold, collects what is at it; returns the two counts."""
    layout, device = Layout(problem.sizes), problem.device
    words, keys = (torch.empty(n, dtype=torch.int32, device=device) for n in (layout.words, problem.n // 156))
    above, inside, offsets = (torch.empty(layout.tiles, dtype=torch.int64, device=device) for _ in range(3))
    cursor, nonfinite = torch.zeros(2, 1, dtype=torch.int64, device=device)
    low = torch.tensor([threshold], device=device).view(torch.int32).to(torch.int64).clamp_(min=1)
    passes.delta_band(Band(
        Tensors(problem.initial), Tensors(problem.tuned), [0] * len(problem.sizes), low, low + 1, words,
        layout.word_offsets[:-1], above, inside, None, keys, torch.empty_like(keys, dtype=torch.int16), offsets,
        cursor, nonfinite,
    ))  # fmt: skip
    return torch.stack([above.sum(), inside.sum()])


def peers(
    problem: Problem, k: int, threshold: float, with_kthvalue: bool, cub: CubTopK | None
) -> Iterator[tuple[str, Provider]]:
    """(key, recipe): what it returns are the k largest deltas, of kthvalue the least of them.

    bytes: the least there are. Subtraction, absolute value and concatenation, then what is counted for topk and
    kthvalue, a sort by four 8-bit digits of keys with 64-bit indices, or three readings of its keys by CUB.
    """
    share, place = k / problem.n, problem.n - k + 1
    deltas, pair = 2 * problem.width + 4 + 8 + 8, 2 * problem.width
    recipes: dict[str, tuple[Callable[[], Tensor], float]] = {
        "topk": (lambda: torch.topk(problem.deltas(), k, sorted=False).values, deltas + 20 + 12 * share),
        "topk_sorted": (lambda: torch.topk(problem.deltas(), k).values, deltas + 20 + 12 * share),
        "sort": (lambda: torch.sort(problem.deltas(), descending=True).values[:k], deltas + 4 + 4 * 24),
    }
    if problem.n <= KTHVALUE_UP_TO and with_kthvalue:
        recipes["kthvalue"] = lambda: torch.kthvalue(problem.deltas(), place).values, deltas + 64
    if cub is not None:
        recipes["cub"] = lambda: cub(k, problem.deltas()), deltas + 3 * 4 + 4 * share
        recipes["cub_flat"] = lambda: cub(k, *problem.flat), 3 * pair + 4 * share
    for key, (run, per_entry) in recipes.items():
        check: Callable[[Tensor], bool] = partial(problem.check_values, k=k, threshold=threshold)
        if key == "kthvalue":
            check = partial(torch.equal, torch.tensor(threshold, device=problem.device))
        yield key, Provider(PEERS[key], run, check, per_entry * problem.n)


def with_peak(run: Callable[[], Any], device: torch.device) -> tuple[Any, int | None]:
    """What a call returns, and the bytes that it allocated at most, its result included."""
    if device.type != "cuda":
        return run(), None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    return result, torch.cuda.max_memory_allocated() - before


def measure(cell: Cell, problem: Problem, bench: Bench, cub: CubTopK | None) -> list[dict[str, Any]]:
    k = int(cell.density * problem.n)
    threshold = problem.threshold(k)
    common = {**cell._asdict(), "n": problem.n, "k": k}
    rows: list[dict[str, Any]] = []
    copy_gbps = 0.0

    def add(name: str, times: list[float], moved: float, temporary: int | None) -> float:
        nonlocal copy_gbps
        p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive")
        p50 = statistics.median(times)
        gbps = moved / p50 / 1e6
        copy_gbps = copy_gbps or gbps  # the copy comes first
        rows.append(
            {**common, "provider": name, "p50_ms": p50, "p20_ms": p20, "p80_ms": p80, "bytes": int(moved), "gbps": gbps,
             "share_of_copy": gbps / copy_gbps, "verified": True,
             "temporary_bytes_per_entry": None if temporary is None else temporary / problem.n}
        )  # fmt: skip
        print(f"  {name:<40}{p50:>11.4f} ms{gbps:>9.0f} GB/s", flush=True)
        return p50

    def run(provider: Provider) -> float | None:
        """Milliseconds; none where the result is wrong."""
        result, temporary = with_peak(provider.run, problem.device)
        if not provider.check(result):
            print(f"  {provider.name}: the result is not the exact one; nothing is timed", flush=True)
            rows.append({**common, "provider": provider.name, "verified": False})
            return None
        del result
        return add(provider.name, bench.times(provider.run), provider.bytes, temporary)

    copy = copy_provider(problem.n, problem.device)
    copy.verify()
    add(copy.name, bench.times(copy.run), copy.bytes, None)
    for provider in ours(problem, k, threshold):
        if run(provider) is None:
            raise SystemExit(1)
    taken: dict[str, float | None] = {}
    for key, peer in peers(problem, k, threshold, cell.density == 0.2, cub):
        try:
            taken[key] = run(peer)
        except RuntimeError as error:  # a peer that does not fit or does not run is named, not fatal
            print(f"  skipped: {peer.name} ({type(error).__name__}: {error})", flush=True)
            torch.cuda.empty_cache()
    for row in rows:
        if row["verified"]:
            row |= {f"ratio_to_{key}": p50 / row["p50_ms"] for key, p50 in taken.items() if p50 is not None}
    return rows


def cub_on(device: torch.device) -> CubTopK | None:
    """CUB for this device; where there is none, the peers that need it are named with the reason."""
    try:
        if device.type != "cuda":
            raise UnavailableError("needs a CUDA device")
        major, minor = torch.cuda.get_device_capability(device)
        return CubTopK(f"sm_{major}{minor}")
    except UnavailableError as error:
        for key in ("cub", "cub_flat"):
            print(f"skipped: {PEERS[key]} ({error})", flush=True)
        return None


def done(path: Path) -> set[Cell]:
    if not path.exists():
        return set()
    with path.open() as file:
        rows = csv.DictReader(file)
        return {Cell(row["model"], float(row["density"]), row["dtype"], row["deltas"]) for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--grid", choices=("core", "rest", "tiny"), default="core")
    parser.add_argument("--part", default="1/1", help="i/n: the i-th of n parts of the grid")
    parser.add_argument("--seconds", type=float, default=60, help="no cell is begun after this many seconds")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True, help="CSV file, appended to")
    args = parser.parse_args()
    device = torch.device(args.device)
    known = ls.available_backends(device)
    if all(known[name] != "ok" for name in ("triton", "compiled")):
        sys.exit(f"no backend to measure: {known}")
    part, parts = map(int, args.part.split("/"))
    cells = {"core": CORE, "rest": REST, "tiny": TINY}[args.grid][part - 1 :: parts]
    cub = cub_on(device)
    bench, start, finished = Bench(device, args.repeats), time.perf_counter(), done(args.out)
    left = [cell for cell in cells if cell not in finished]
    made: tuple[Cell, Problem] | None = None
    for number, cell in enumerate(left):
        if time.perf_counter() - start > args.seconds:
            print("time is up; left for another run:", *(str(tuple(rest)) for rest in left[number:]))
            break
        print(f"{cell.model}, density {cell.density:g}, {cell.dtype}, {cell.deltas} deltas", flush=True)
        same = cell._replace(density=0)
        if made is None or made[0] != same:
            made = None  # one at a time
            made = same, Problem(cell, device)
        append(args.out, measure(cell, made[1], bench, cub), FIELDS)


if __name__ == "__main__":
    main()
