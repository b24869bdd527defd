"""Selection of the k largest |tuned - initial|: `topk_delta` against the usual recipes of torch and numpy.

The recipes get an easier task: they find the entries (torch.topk, torch.kthvalue, np.partition on the concatenated
absolute deltas) but build no masks, break ties as they like, and never look for NaN.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from harness import (
    MODELS,
    Provider,
    Row,
    WrongResult,
    arguments,
    instruction_sets,
    peak_memory,
    time_rows,
    value_row,
    with_isa,
    write_csv,
)
from torch import Tensor

from ltp_sparse import backends
from ltp_sparse.encoding import IndexSet
from ltp_sparse.ops import index_sets
from ltp_sparse.testing import random_weights, tuned_weights
from ltp_sparse.topk import TensorSource, select_topk

BASELINE = "abs + torch.topk(sorted=False)"
LT_SFT = "list of floats + np.partition (LT-SFT)"
_LT_SFT_AT = 0.2
UNTOUCHED = 0.7  # share of embedding rows that a tuning run leaves alone: words that its text does not hold


class Problem:
    """Weights before and after tuning, and the exact threshold.

    untouched: share of embedding rows with a delta of zero
    """

    def __init__(self, model: str, density: float, untouched: float) -> None:
        weights = random_weights(MODELS[model])
        self.initial = list(weights.values())
        self.tuned = list(tuned_weights(weights, untouched_rows=untouched).values())
        self.sizes = [t.numel() for t in self.tuned]
        self.n = sum(self.sizes)
        self.k = int(density * self.n)
        self.threshold = float(np.partition(self.deltas().numpy(), self.n - self.k)[self.n - self.k])

    def deltas(self) -> Tensor:
        """float32 [n]: absolute deltas of all tensors, concatenated."""
        return torch.cat([(t - i).abs_().view(-1) for t, i in zip(self.tuned, self.initial, strict=True)])

    def check_sets(self, name: str, sets: list[IndexSet]) -> None:
        """All entries above the threshold, and of those at the threshold the earliest."""
        above = sum(int(((t - i).abs_() > self.threshold).sum()) for t, i in zip(self.tuned, self.initial, strict=True))
        ties = self.k - above
        for tensor, (i, t, found) in enumerate(zip(self.initial, self.tuned, sets, strict=True)):
            delta = (t - i).abs_().view(-1)
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


def providers_of(problem: Problem) -> list[Provider]:
    n, k = problem.n, problem.k
    best, *others = instruction_sets()
    # a reading of both weights per pass, the bitmap written once
    runs = {
        f"topk_delta, sampled ({best})": (with_isa(best, ours(problem, "sample")), 8 * n + n // 8),
        f"topk_delta, histogram ({best})": (with_isa(best, ours(problem, "histogram")), 16 * n + n // 8),
        **{f"topk_delta, sampled ({isa})": (with_isa(isa, ours(problem, "sample")), 8 * n + n // 8) for isa in others},
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
    """The selection of LT-SFT, which makes a Python list of all deltas; timed once, as it takes so long."""
    start = time.perf_counter()
    deltas: list[float] = []
    for initial, tuned in zip(problem.initial, problem.tuned, strict=True):
        deltas.extend((tuned - initial).abs_().view(-1).tolist())
    parted = np.partition(deltas, problem.n - problem.k)
    seconds = time.perf_counter() - start
    problem.check_values(LT_SFT, problem.k, float(parted[problem.n - problem.k]))
    milliseconds = [1e3 * seconds] * 3
    ratio = baseline.p50 / (1e3 * seconds)
    print(f"  {LT_SFT:<34}{1e3 * seconds:>11.3f} ms   {ratio:>7.2f} x", flush=True)
    return Row(op, LT_SFT, "float32", problem.n, problem.k, "time", "ms", *milliseconds, ratio=ratio)


def measure(model: str, density: float, rounds: int, untouched: float = 0.0) -> list[Row]:
    problem = Problem(model, density, untouched)
    op = f"topk_delta, {100 * untouched:g} % of embedding rows untouched" if untouched else "topk_delta"
    print(f"\n{op}: {problem.n:,} entries, {100 * density:g} % selected", flush=True)
    providers = providers_of(problem)
    rows = time_rows(op, providers, n=problem.n, k=problem.k, rounds=rounds, baseline=BASELINE)
    if density == _LT_SFT_AT and not untouched:
        rows.append(lt_sft_row(problem, op, next(row for row in rows if row.provider == BASELINE)))
    for provider in providers:
        peak = peak_memory(provider.run) / problem.n
        rows.append(value_row(op, provider.name, problem.n, problem.k, "temporary memory", "bytes/entry", peak))
    return rows


def main() -> None:
    args = arguments(__doc__, "topk_delta.csv", [0.01, 0.2, 0.5])
    cases: list[tuple] = [(model, density, args.rounds) for model in args.models for density in args.densities]
    if "base" in args.models:
        cases.append(("base", 0.2, args.rounds, UNTOUCHED))
    rows = []
    for case in cases:
        rows += measure(*case)
        write_csv(args.out, rows)  # after every case: an interrupted run keeps what it has measured


if __name__ == "__main__":
    main()
