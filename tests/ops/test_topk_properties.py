"""Thousands of small random selections against a stable sort: every CPU backend and instruction set, every route, and
shards on up to four ranks (contract 1)."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from helpers.backends import BACKENDS, instruction_sets, using
from helpers.selections import ROUTES, SMALL_ROUTES, naive, random_case, tune

from ltp_sparse import backends
from ltp_sparse.ops import index_sets
from ltp_sparse.ops.ranks import Ranks
from ltp_sparse.ops.routes import select_topk
from ltp_sparse.ops.sources import TensorSource

pytestmark = pytest.mark.slow

SEEDS = {"reference": range(1000, 2000), "generic": range(2000, 3000)}  # others for each: more cases in the same time
SEEDS |= {"avx2": range(3000, 4000), "avx512": range(4000, 5000)}
SHARDED = {"reference": range(5000, 5200), "compiled": range(5200, 5400)}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Every route, and the work in pieces, happens at a few hundred entries."""
    tune(monkeypatch.setattr, **SMALL_ROUTES)


def passes_of(backend):
    with using(backend):
        return backends.resolve(torch.device("cpu"))


def entries(selection, sizes) -> list[list[int]]:
    return [index_set.indices().tolist() for index_set in index_sets(selection, sizes)]


def check(passes, seed):
    initial, tuned, ks, groups = random_case(seed)
    source = TensorSource(initial, tuned)
    selection = select_topk(passes, source, groups, ks, route=ROUTES[seed % 2])
    assert entries(selection, source.sizes) == naive(initial, tuned, ks, groups), f"seed {seed}"


def test_reference_equals_a_stable_sort():
    for seed in SEEDS["reference"]:
        check(passes_of("reference"), seed)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_compiled_equals_a_stable_sort(isa, compiled):
    if isa not in instruction_sets(compiled):
        pytest.skip(f"this processor has no {isa}")
    compiled.set_isa(isa)
    for seed in SEEDS[isa]:
        check(passes_of("compiled"), seed)


class ThreadRanks(Ranks):
    """Ranks that are threads of this process and meet at a barrier."""

    def __init__(self, rank, starts, board, barrier):
        self.rank, self.board, self.barrier = rank, board, barrier
        self.order = starts.argsort(dim=1, stable=True)

    def everywhere(self, value):
        self.board[self.rank] = value
        self.barrier.wait()
        values = list(self.board)
        self.barrier.wait()
        return values

    def sum(self, counts):
        return torch.stack(self.everywhere(counts)).sum(0)

    def in_order(self, counts):
        return torch.stack(self.everywhere(counts), dim=1).gather(1, self.order)

    def places(self, tensors):
        return self.order.argsort(dim=1)[:, self.rank]


@pytest.mark.parametrize("backend", BACKENDS)
def test_shards_equal_a_stable_sort(backend):
    """Ranks hold consecutive ranges of every tensor, in an order of their own, some of them empty."""
    passes = passes_of(backend)
    for seed in SHARDED[backend]:
        initial, tuned, ks, groups = random_case(seed)
        g = torch.Generator().manual_seed(seed)
        size = int(torch.randint(1, 5, (1,), generator=g))
        ranges = []  # per tensor the range of every rank
        for t in tuned:
            cuts = [0, *torch.randint(t.numel() + 1, (size - 1,), generator=g).sort().values.tolist(), t.numel()]
            ranges.append([(cuts[i], cuts[i + 1]) for i in torch.randperm(size, generator=g).tolist()])
        starts = torch.tensor([[start for start, _ in of_tensor] for of_tensor in ranges])
        board, barrier = [None] * size, Barrier(size, timeout=60)

        def run(rank, sides=(initial, tuned), ks=ks, groups=groups, ranges=ranges, shared=(starts, board, barrier)):
            parts = [[t[slice(*of[rank])] for t, of in zip(side, ranges, strict=False)] for side in sides]
            source = TensorSource(*parts)
            ranks = ThreadRanks(rank, *shared)
            return entries(select_topk(passes, source, groups, ks, route="histogram", ranks=ranks), source.sizes)

        with ThreadPoolExecutor(size) as executor:
            found = list(executor.map(run, range(size)))
        merged = [
            sorted(ranges[i][rank][0] + at for rank in range(size) for at in found[rank][i]) for i in range(len(tuned))
        ]
        assert merged == naive(initial, tuned, ks, groups), f"seed {seed}"
