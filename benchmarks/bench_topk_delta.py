"""Selection of the k largest |tuned - initial|: `topk_delta` and `select` against the usual recipes of torch and numpy.

`select` is the whole call: it also checks names and tensors, makes the ticket and takes the digests of the initial
weights, which the pass that reads them takes along.

The recipes get an easier task: they find the entries (torch.topk, torch.kthvalue, np.partition on the concatenated
absolute deltas) but build no masks, break ties as they like, and never look for NaN.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from harness import (
    MODELS,
    Provider,
    Row,
    WrongResult,
    argument_parser,
    instruction_sets,
    parse,
    peak_memory,
    time_rows,
    value_row,
    with_isa,
    write_csv,
)
from torch import Tensor

from ltp_sparse import backends
from ltp_sparse.ops import index_sets
from ltp_sparse.ops.routes import sampling_pays, select_topk
from ltp_sparse.ops.sources import TensorSource
from ltp_sparse.selection import select
from ltp_sparse.testing import random_weights, tuned_weights
from ltp_sparse.tickets.index_set import IndexSet
from ltp_sparse.weights.names import parameter_order

BASELINE = "abs + torch.topk(sorted=False)"
LT_SFT = "list of floats + np.partition (LT-SFT)"
LT_SFT_AT = 0.2, "float32", "normal"  # density, dtype and deltas
UNTOUCHED = 0.7  # share of embedding rows that do not move in tuning: words that are not in its text
OPS = {
    "normal": "topk_delta",
    "heavy": "topk_delta, heavy-tailed deltas",
    "untouched": f"topk_delta, {100 * UNTOUCHED:g} % of embedding rows untouched",
}
"""Distribution of the deltas -> name of the operation in rows. Heavy-tailed: a normal times a log-normal number."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Cell(NamedTuple):
    model: str
    density: float
    dtype: str
    deltas: str


class Problem:
    """Weights before and after tuning, and the exact threshold."""

    def __init__(self, cell: Cell) -> None:
        dtype = DTYPES[cell.dtype]
        weights = random_weights(MODELS[cell.model])
        tuned = tuned_weights(weights, untouched_rows=UNTOUCHED if cell.deltas == "untouched" else 0.0)
        if cell.deltas == "heavy":
            generator = torch.Generator().manual_seed(2)
            for name, initial in weights.items():
                tails = torch.randn(initial.shape, generator=generator).exp_()
                tuned[name].sub_(initial).mul_(tails).add_(initial)
        names = parameter_order(weights)  # in which ties are resolved
        self.named = [{name: side[name].to(dtype) for name in names} for side in (weights, tuned)]
        self.initial, self.tuned = (list(side.values()) for side in self.named)
        self.sizes = [t.numel() for t in self.tuned]
        self.n = sum(self.sizes)
        self.reading = 2 * dtype.itemsize * self.n  # bytes of one pass over both weights
        self.k = int(cell.density * self.n)
        self.threshold = float(np.partition(self.deltas().numpy(), self.n - self.k)[self.n - self.k])

    def each_delta(self) -> Iterator[Tensor]:
        """float32, flat: the absolute deltas of every tensor."""
        for initial, tuned in zip(self.initial, self.tuned, strict=True):
            yield (tuned.float() - initial.float()).abs_().view(-1)

    def deltas(self) -> Tensor:
        """float32 [n]"""
        return torch.cat(list(self.each_delta()))

    def check_sets(self, name: str, sets: list[IndexSet]) -> None:
        """All entries above the threshold and the earliest at it; zeros never."""
        above = sum(int((delta > self.threshold).sum()) for delta in self.each_delta())
        ties = self.k - above if self.threshold > 0 else 0
        for tensor, (delta, found) in enumerate(zip(self.each_delta(), sets, strict=True)):
            expected = delta > self.threshold
            at = (delta == self.threshold).nonzero().view(-1)[:ties]
            expected[at] = True
            ties -= at.numel()
            if not torch.equal(found.mask(), expected):
                raise WrongResult(f"{name}: tensor {tensor} has other entries than the exact selection")

    def check_values(self, name: str, count: int, smallest: float) -> None:
        if (count, smallest) != (self.k, self.threshold):
            raise WrongResult(f"{name}: {count} entries from {smallest}, expected {self.k} from {self.threshold}")


def ours(problem: Problem, route: str) -> Callable[[], list[IndexSet]]:
    def run() -> list[IndexSet]:
        source = TensorSource(problem.initial, problem.tuned)
        groups = [0] * len(problem.sizes)
        passes = backends.resolve(source.device)
        return index_sets(select_topk(passes, source, groups, [problem.k], route=route), problem.sizes)

    return run


def whole(problem: Problem) -> Callable[[], list[IndexSet]]:
    """The call that people make: names, checks, the passes, counts, and the digests of the initial weights."""
    return lambda: list(select(*problem.named, k=problem.k).sets.values())


def providers_of(problem: Problem) -> list[Provider]:
    n, k = problem.n, problem.k
    best, *others = instruction_sets()
    # The bitmap is written once. Many equal deltas, as with bfloat16 weights, need more reads.
    once, twice = problem.reading + n // 8, 2 * problem.reading + n // 8
    if problem.tuned[0].dtype != torch.float32:
        once = twice = None
    route = "sampled" if sampling_pays(TensorSource(problem.initial, problem.tuned)) else "histogram"
    runs = {
        f"select, {route} ({best})": (with_isa(best, whole(problem)), once if route == "sampled" else twice),
        f"topk_delta, sampled ({best})": (with_isa(best, ours(problem, "sample")), once),
        f"topk_delta, histogram ({best})": (with_isa(best, ours(problem, "histogram")), twice),
        **{f"topk_delta, sampled ({isa})": (with_isa(isa, ours(problem, "sample")), once) for isa in others},
    }

    def checked(name: str, run: Callable[[], list[IndexSet]]) -> Callable[[], None]:
        return lambda: problem.check_sets(name, run())

    providers = [Provider(name, run, checked(name, run), traffic) for name, (run, traffic) in runs.items()]

    def topk() -> tuple[Tensor, Tensor]:
        return torch.topk(problem.deltas(), k, sorted=False)

    def partition() -> np.ndarray:
        return np.partition(problem.deltas().numpy(), n - k)

    def kthvalue() -> Tensor:
        return torch.kthvalue(problem.deltas(), n - k + 1).values

    def check_topk() -> None:
        values = topk()[0]
        problem.check_values(BASELINE, values.numel(), float(values.min()))

    def check_partition() -> None:
        upper = partition()[n - k :]
        problem.check_values("abs + np.partition", upper.size, float(upper.min()))

    return [
        *providers,
        Provider(BASELINE, topk, check_topk),
        Provider("abs + np.partition", partition, check_partition),
        Provider("abs + torch.kthvalue", kthvalue, lambda: problem.check_values("kthvalue", k, float(kthvalue()))),
    ]


def lt_sft_row(problem: Problem, op: str, baseline: Row) -> Row:
    """The selection of LT-SFT, which makes a Python list of all deltas; timed once, because it is slow."""
    start = time.perf_counter()
    deltas: list[float] = []
    for delta in problem.each_delta():
        deltas.extend(delta.tolist())
    parted = np.partition(deltas, problem.n - problem.k)
    seconds = time.perf_counter() - start
    problem.check_values(LT_SFT, problem.k, float(parted[problem.n - problem.k]))
    milliseconds = [1e3 * seconds] * 3
    ratio = baseline.p50 / (1e3 * seconds)
    print(f"  {LT_SFT:<54}{1e3 * seconds:>11.3f} ms   {ratio:>7.2f} x", flush=True)
    return Row(op, LT_SFT, "float32", problem.n, problem.k, "time", "ms", *milliseconds, ratio=ratio)


def measure(cell: Cell, rounds: int) -> list[Row]:
    problem, op = Problem(cell), OPS[cell.deltas]
    print(f"\n{op}: {problem.n:,} {cell.dtype} entries, {100 * cell.density:g} % selected", flush=True)
    providers = providers_of(problem)
    size: dict[str, Any] = {"n": problem.n, "k": problem.k, "dtype": cell.dtype}
    rows = time_rows(op, providers, **size, rounds=rounds, baseline=BASELINE)
    if cell[1:] == LT_SFT_AT:
        rows.append(lt_sft_row(problem, op, next(row for row in rows if row.provider == BASELINE)))
    for provider in providers:
        peak = min(peak_memory(provider.run) for _ in range(2)) / problem.n  # leftovers of the first call do not count
        rows.append(value_row(op, provider.name, metric="temporary memory", unit="bytes/entry", value=peak, **size))
    return rows


def main() -> None:
    densities = [0.0005, 0.01, 0.05, 0.2, 0.5, 0.95]
    args = parse(argument_parser(__doc__, "topk_delta.csv", densities, dtypes=tuple(DTYPES)))
    cells = [
        Cell(model, density, dtype, deltas)
        for deltas in OPS
        for dtype in args.dtypes
        for model in args.models
        for density in args.densities
        # the other distributions at one density, and untouched rows if there are embeddings
        if deltas == "normal" or (density == 0.2 and model != "encoder")
    ]
    rows = []
    for cell in cells:
        rows += measure(cell, args.rounds)
        write_csv(args.out, rows)  # after every cell, to keep the rows of an interrupted run


if __name__ == "__main__":
    main()
