"""Random tickets: exactly k entries, as the top k of random scores; the selection machinery does the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Size, Tensor

from ltp_sparse import backends
from ltp_sparse.encoding import IndexSet, pack_bits
from ltp_sparse.ops import index_sets
from ltp_sparse.topk import Chunk, Layout, entries_for, piecewise, select_topk

_PIECE = 1 << 19


class RandomScores:
    """A source of uniform scores, integers below 2^24, made piece by piece from (seed, name, start): nothing of size n
    is ever stored.
    """

    def __init__(self, shapes: Mapping[str, Size], seed: int) -> None:
        self.names, self.seed = list(shapes), seed
        self.sizes = [shape.numel() for shape in shapes.values()]
        self.device = torch.device("cpu")
        self.layout = Layout(self.sizes)

    def piece(self, tensor: int, start: int, stop: int) -> Tensor:
        key = hashlib.sha256(f"{self.seed} {self.names[tensor]} {start}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
        # at least one unit, since an entry with a score of zero could not be selected
        return torch.randint(1, 1 << 24, (stop - start,), generator=generator, dtype=torch.int32).float()

    def chunks(self, tensors: Sequence[int]) -> Iterator[Chunk]:
        for tensor in tensors:
            yield from piecewise(self.layout, tensor, _PIECE, None, partial(self.piece, tensor))

    def sample(self, tensor: int, indices: Tensor) -> Tensor:
        raise RuntimeError("random scores are selected by the histogram route, which takes no sample")


def random_sets(
    shapes: Mapping[str, Size],
    *,
    density: float | None,
    k: int | None,
    seed: int,
    per_parameter: Mapping[str, int] | None = None,
    bernoulli: bool = False,
) -> dict[str, IndexSet]:
    """Random index sets over parameters of the given shapes; see `Ticket.random`."""
    source = RandomScores(shapes, seed)
    if bernoulli:
        if density is None or not 0 <= density <= 1:
            raise ValueError(
                f"Ticket.random: bernoulli=True takes density=, the probability of every entry in [0, 1], got {density}"
            )
        threshold = density * ((1 << 24) - 1)
        sets = {}
        for tensor, name in enumerate(shapes):
            words = [pack_bits(chunk.tuned[0] <= threshold) for chunk in _pieces(source, tensor)]
            empty = torch.empty(0, dtype=torch.int32)
            sets[name] = IndexSet.from_bitmap(torch.cat([empty, *words]), source.sizes[tensor]).compact()
        return sets
    if per_parameter is not None:
        groups, ks = list(range(len(shapes))), [per_parameter[name] for name in shapes]
    else:
        groups, ks = [0] * len(shapes), [entries_for(sum(source.sizes), density=density, k=k)]
    selection = select_topk(backends.resolve(source.device), source, groups, ks, route="histogram")
    sets = dict(zip(shapes, index_sets(selection, source.sizes), strict=True))
    return {name: index_set.compact() for name, index_set in sets.items()}


def _pieces(source: RandomScores, tensor: int) -> Iterator[Chunk]:
    return piecewise(source.layout, tensor, _PIECE, None, partial(source.piece, tensor))
