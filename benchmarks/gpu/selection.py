"""Selection: the cells and the providers.

The peers have an easier task: they find entries or a threshold, build no masks, break ties in any way and do not check
for NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from cub_topk import CubTopK
from device import Device
from harness import Provider, WrongResult
from step import MODELS, Contestant
from torch import Tensor

import ltp_sparse as ls
from ltp_sparse import backends
from ltp_sparse.ops import index_sets
from ltp_sparse.ops.routes import select_topk
from ltp_sparse.ops.sources import TensorSource
from ltp_sparse.testing import xlmr_shapes
from ltp_sparse.tickets.index_set import IndexSet

SHAPES = MODELS | {"7b": {"layers": 32, "hidden": 4096, "intermediate": 16_384}}
UNTOUCHED = 0.7  # share of embedding rows that keep their values, as those of absent words do
TOPK = "sub + abs + cat + topk(sorted=False)"
TOPK_SORTED = "sub + abs + cat + topk"
SORT = "sub + abs + cat + sort"
KTHVALUE = "sub + abs + cat + kthvalue"
CUB = "sub + abs + cat + CUB DeviceTopK"
CUB_FLAT = "CUB DeviceTopK on weights in one tensor"
BASELINE = TOPK


class Cell(NamedTuple):
    """A cell of the grid; `kind` is that of the deltas."""

    model: str
    density: float
    precision: str
    kind: str = "normal"
    op: str = "selection"


FIRST = [Cell("base", 0.2, "float32"), Cell("base", 0.2, "bfloat16")]
CORE = FIRST + [Cell("base", density, "float32") for density in (0.05, 0.01, 0.5)]
CORE += [Cell("base", 0.2, "float32", "untouched")]
FULL = CORE + [
    Cell("7b", 0.2, "bfloat16"),
    Cell("base", 0.2, "float32", "heavy"),
    Cell("base", 0.2, "bfloat16", "untouched"),
    *(Cell("base", density, "float32") for density in (0.0005, 0.95)),
    *(Cell(model, 0.2, "float32") for model in ("encoder", "large")),
]
TINY = [Cell("tiny", 0.2, "float32"), Cell("tiny", 0.5, "bfloat16", "untouched")]
GRIDS = {"first": FIRST, "core": CORE, "full": FULL, "tiny": TINY}


class Problem:
    """Weights before and after tuning, on the device.

    flat: all of them before, and after; the tensors are views of these
    """

    def __init__(self, cell: Cell, device: Device) -> None:
        self.device = device.torch
        generator = torch.Generator(self.device).manual_seed(0)
        dtype, shapes = getattr(torch, cell.precision), xlmr_shapes(**SHAPES[cell.model])
        self.sizes = [shape.numel() for shape in shapes.values()]
        self.n, self.width = sum(self.sizes), dtype.itemsize
        self.k = int(cell.density * self.n)
        self.flat = [torch.empty(self.n, dtype=dtype, device=self.device) for _ in range(2)]
        self.initial, self.tuned = (
            {name: part.view(shapes[name]) for name, part in zip(shapes, flat.split(self.sizes), strict=True)}
            for flat in self.flat
        )
        for name, shape in shapes.items():
            self.initial[name].copy_(torch.randn(shape, generator=generator, device=self.device).mul_(0.02))
            delta = torch.randn(shape, generator=generator, device=self.device).mul_(1e-3)
            if cell.kind == "heavy":
                delta *= torch.randn(shape, generator=generator, device=self.device).exp_()
            if cell.kind == "untouched" and "embeddings" in name:
                delta[torch.rand(len(delta), generator=generator, device=self.device) < UNTOUCHED] = 0
            self.tuned[name].copy_(delta.add_(self.initial[name]))

    def each_delta(self, names: Iterable[str] = ()) -> Iterator[Tensor]:
        """float32, flat: the absolute deltas of every tensor, in the order of the names if they are given."""
        for name in names or self.initial:
            yield (self.tuned[name].float() - self.initial[name].float()).abs_().view(-1)

    def deltas(self) -> Tensor:
        """float32 [n]"""
        return torch.cat(list(self.each_delta()))

    @cached_property
    def threshold(self) -> float:
        """The k-th largest delta, by bisection of its bits: needs little memory and is unlike all providers."""
        low, high = 0, 0x7F800000
        while high - low > 1:
            middle = (low + high) // 2
            reached = sum((delta.view(torch.int32) >= middle).sum() for delta in self.each_delta())
            low, high = (middle, high) if int(reached) >= self.k else (low, middle)
        return torch.tensor(low, dtype=torch.int32).view(torch.float32).item()

    def check(self, sets: Mapping[str, IndexSet]) -> bool:
        """Whether these are all entries above the threshold and, of those at it, the earliest; zeros never."""
        above = sum((delta > self.threshold).sum() for delta in self.each_delta())
        ties = self.k - int(above) if self.threshold > 0 else 0
        for delta, index_set in zip(self.each_delta(sets), sets.values(), strict=True):
            expected = delta > self.threshold
            at = (delta == self.threshold).nonzero().view(-1)[:ties]
            expected[at] = True
            ties -= at.numel()
            if not torch.equal(index_set.mask().to(self.device), expected):
                return False
        return True

    def check_sets(self, sets: list[IndexSet]) -> bool:
        return self.check(dict(zip(self.initial, sets, strict=True)))

    def check_values(self, values: Tensor) -> bool:
        """Whether these are the k largest deltas, in any order: their number, the least, and the sum of their bits."""
        ties, expected = self.k, 0
        for delta in self.each_delta():
            above = delta[delta > self.threshold].view(torch.int32)
            ties, expected = ties - above.numel(), expected + int(above.sum(dtype=torch.int64))
        expected += ties * int(torch.tensor(self.threshold).view(torch.int32))
        found = int(values.view(torch.int32).sum(dtype=torch.int64))
        return (values.numel(), values.min().item(), found) == (self.k, self.threshold, expected)

    def check_kth(self, value: Tensor) -> bool:
        return value.item() == self.threshold

    def provider(self, name: str, run: Callable[[], Any], check: Callable[[Any], bool], per_entry: float) -> Provider:
        """per_entry: bytes of memory traffic"""

        def verify() -> None:
            if not check(made.run()):
                raise WrongResult(f"{name}: the result is not the exact one")

        made = Provider(name, run, verify, int(per_entry * self.n))
        return made


def topk_delta(problem: Problem, backend: str) -> Provider:
    initial, tuned = list(problem.initial.values()), list(problem.tuned.values())

    def run() -> list[IndexSet]:
        return ls.topk_delta(initial, tuned, problem.k)[0]

    return problem.provider(f"topk_delta ({backend})", run, problem.check_sets, 2 * problem.width + 1 / 8)


def by_histogram(problem: Problem, backend: str) -> Provider:
    """The route for selections that a sample cannot serve."""
    initial, tuned = list(problem.initial.values()), list(problem.tuned.values())

    def run() -> list[IndexSet]:
        source, groups = TensorSource(initial, tuned), [0] * len(problem.sizes)
        found = select_topk(backends.resolve(problem.device), source, groups, [problem.k], route="histogram")
        return index_sets(found, problem.sizes)

    name = f"topk_delta, histogram ({backend})"
    return problem.provider(name, run, problem.check_sets, 4 * problem.width + 1 / 8)


def select(problem: Problem, backend: str) -> Provider:
    """The call of users, with fingerprint and ticket; ties go by the ticket's order of names."""
    run = partial(ls.select, problem.initial, problem.tuned, k=problem.k)
    return problem.provider(
        f"select ({backend})", run, lambda ticket: problem.check(ticket.sets), 2 * problem.width + 1 / 8
    )


def recipe(problem: Problem, name: str) -> Provider:
    """bytes: the least there are. Subtraction, absolute value and concatenation, then what is counted for topk and
    kthvalue, or a sort by four 8-bit digits of keys with 64-bit indices."""
    k, share, place, deltas = problem.k, problem.k / problem.n, problem.n - problem.k + 1, 2 * problem.width + 20
    recipes: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], bool], float]] = {
        TOPK: (lambda: torch.topk(problem.deltas(), k, sorted=False).values, problem.check_values, 20 + 12 * share),
        TOPK_SORTED: (lambda: torch.topk(problem.deltas(), k).values, problem.check_values, 20 + 12 * share),
        SORT: (lambda: torch.sort(problem.deltas(), descending=True).values[:k], problem.check_values, 100),
        KTHVALUE: (lambda: torch.kthvalue(problem.deltas(), place).values, problem.check_kth, 64),
    }
    run, check, per_entry = recipes[name]
    return problem.provider(name, run, check, deltas + per_entry)


def cub(problem: Problem, name: str) -> Provider:
    """bytes: three readings of its keys."""
    largest, share = CubTopK.on(problem.device), problem.k / problem.n
    if name == CUB:
        run, per_entry = lambda: largest(problem.k, problem.deltas()), 2 * problem.width + 20 + 12 + 4 * share
    else:
        run, per_entry = lambda: largest(problem.k, *problem.flat), 6 * problem.width + 4 * share
    return problem.provider(name, run, problem.check_values, per_entry)


def baseline(problem: Problem) -> Provider:
    return recipe(problem, TOPK)


def contestants(cell: Cell, who: str) -> Iterator[Contestant]:
    eager = ("eager",)
    if who in ("triton", "compiled"):
        yield Contestant(f"topk_delta ({who})", eager, partial(topk_delta, backend=who))
        yield Contestant(f"select ({who})", eager, partial(select, backend=who))
        if who == "compiled":  # Triton has no histogram pass of its own
            yield Contestant(f"topk_delta, histogram ({who})", eager, partial(by_histogram, backend=who))
    elif who == "peers":
        for name in (TOPK, TOPK_SORTED, SORT):
            yield Contestant(name, eager, partial(recipe, name=name))
    elif who == "cub":
        for name in (CUB, CUB_FLAT):
            yield Contestant(name, eager, partial(cub, name=name))
    elif who == "kthvalue" and cell in (*FIRST[:1], *TINY[:1]):  # two seconds a run, on one processor of the device
        yield Contestant(KTHVALUE, eager, partial(recipe, name=KTHVALUE), rounds=1)
