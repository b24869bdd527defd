"""How often a selection reads from the device: the same whatever the number of tensors."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ltp_sparse as ls
from ltp_sparse import backends
from ltp_sparse.ops import index_sets
from ltp_sparse.ops.routes import Selection
from ltp_sparse.tickets.bits import bitmap_words, tiles_of


class Reads(TorchDispatchMode):
    """Counts the numbers that Python asks for one by one: on a GPU each of them waits."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.name()
        if name in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::item"):
            self.counts[name] += 1
        return function(*arguments, **(keywords or {}))


def weights(tensors: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    base = {f"layer.{i}.weight": torch.randn(40, 10, generator=generator) for i in range(tensors)}
    return base, {name: t + torch.randn(t.shape, generator=generator) for name, t in base.items()}


def reads_of(tensors: int, select) -> int:
    base, tuned = weights(tensors)
    with Reads() as reads:
        select(base, tuned)
    return reads.counts.total()


@pytest.mark.parametrize(
    "select",
    [
        lambda base, tuned: ls.select(base, tuned, density=0.2),
        lambda base, tuned: ls.select(base, tuned, density=0.2, budget="layer"),
        lambda base, tuned: repr(ls.select(base, tuned, density=0.2)),
        lambda base, tuned: ls.topk_delta(list(base.values()), list(tuned.values()), 100),
    ],
    ids=["select", "a budget per layer", "and shown", "topk_delta"],
)
def test_a_handful(select):
    if reason := backends.unavailable_reason("compiled", torch.device("cpu")):
        pytest.skip(reason)  # the reference reads as it likes
    few, many = reads_of(3, select), reads_of(147, select)
    assert few == many <= 4


def test_counts_of_index_sets_are_read_in_one_copy():
    sizes = [100, 0, 70_000, 64]
    words = torch.zeros(sum(map(bitmap_words, sizes)), dtype=torch.int32)
    counts = torch.zeros(sum(map(tiles_of, sizes)), dtype=torch.int64)
    words[0], counts[0] = 0b111, 3
    words[-2:], counts[-1] = -1, 64
    with Reads() as reads:
        sets = index_sets(Selection(words, counts, torch.zeros(1)), sizes)
        assert [s.k for s in sets] == [3, 0, 0, 64]
        assert sum(s.compact().k for s in sets) == 67
    assert reads.counts.total() == 0  # `tolist` is one copy
    assert [s.encoding.name for s in sets] == ["BITMAP", "FULL", "BITMAP", "FULL"]
