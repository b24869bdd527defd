"""`TicketShard`: a rank's part of a ticket."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor

from ltp_sparse.selection.team import Team
from ltp_sparse.tickets.bits import TILE, bitmap_words, shifted_words
from ltp_sparse.tickets.index_set import IndexSet
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.tickets.tile_table import STATE_BLOCK, state_blocks
from ltp_sparse.weights.digests import Hash
from ltp_sparse.weights.sharding import Cut

_PIECE = 1 << 18  # words of a bitmap sent at a time


class Shard(NamedTuple):
    """A process's part of a parameter: entries start..stop of the row-major order of its whole `shape`."""

    start: int
    stop: int
    shape: Sequence[int]


@dataclass(frozen=True)
class Part:
    """A rank's part of the active entries of a parameter, and where it lies among all of them.

    Attributes:
        index_set: those of this rank's tensor
        first, k: the number of active entries before them, and in all
        blocks: (first, number in all) of the blocks of 8-bit moments; None where ranks would share a block
        start: the first entry of this rank's tensor in the row-major order; None: it is no range of it
        digest: of all active entries; where ranks hold no ranges, of how they are cut, too
    """

    index_set: IndexSet
    first: int
    k: int
    blocks: tuple[int, int] | None
    start: int | None
    digest: str

    @classmethod
    def of(cls, whole: IndexSet, cut: Cut) -> Part:
        """This rank's part of an index set of a whole parameter."""
        if not cut.by_rows:
            return _part_of_block(whole, cut)
        start, stop = cut.entries
        before = whole.entries(0, start).k if start else 0
        part = whole.entries(start, stop)
        return cls(
            part if part is whole else part.compact(), before, whole.k, _blocks(whole, start, stop), start,
            whole.digest(),
        )  # fmt: skip

    @property
    def slots(self) -> slice:
        """Where they lie in the packed state of the whole parameter."""
        return slice(self.first, self.first + self.index_set.k)


def _blocks(whole: IndexSet, start: int, stop: int) -> tuple[int, int] | None:
    of_tiles = state_blocks(whole.tile_counts)
    unit = STATE_BLOCK if whole.k == whole.n else TILE
    if start % unit or (stop % unit and stop < whole.n):
        return None
    before = start // STATE_BLOCK if whole.k == whole.n else int(of_tiles[: start // TILE].sum())
    return before, int(of_tiles.sum())


def _part_of_block(whole: IndexSet, cut: Cut) -> Part:
    """Of a block with columns: blocks have their slots one after the other, in the order of their first entries."""
    counts = torch.zeros(prod(map(len, cut.ranges)), dtype=torch.int64, device="cpu")
    mine, own = 0, []
    for number, pieces in zip(cut.own, cut.ranges, strict=True):
        mine = mine * len(pieces) + number
    for _, indices in whole.to("cpu").chunks():
        block, inside = torch.zeros_like(indices), torch.zeros_like(indices)
        coordinates = torch.unravel_index(indices, cut.shape)
        for coordinate, pieces, (start, stop) in zip(coordinates, cut.ranges, cut.block, strict=True):
            ends = torch.tensor([end for _, end in pieces], dtype=torch.int64, device="cpu")
            block = block * len(pieces) + torch.searchsorted(ends, coordinate, right=True)
            inside = inside * (stop - start) + coordinate - start
        counts += torch.bincount(block, minlength=len(counts))
        own.append(inside[block == mine])
    indices = torch.cat([torch.empty(0, dtype=torch.int64, device="cpu"), *own])
    part = IndexSet.from_indices(indices, prod(cut.sizes)).compact()
    digest = Hash().update(f"{whole.digest()} {cut.ranges}".encode()).digest()
    return Part(part, int(counts[:mine].sum()), whole.k, None, None, digest)


@dataclass(frozen=True, eq=False)
class TicketShard:
    """A process's part of a ticket, as `MaskedAdamW` takes it for a model sharded alike.

    Attributes:
        local: ticket over the tensors of this process, under their names and shapes
        shards: this process's shard of every parameter of the pool; an empty range where it holds nothing
        parts: name -> where its active entries lie among all, for the parameters of `local`
        metadata: of the whole ticket
        fingerprint: of the whole ticket
    """

    local: Ticket
    shards: dict[str, Shard]
    parts: dict[str, Part]
    metadata: dict[str, Any]
    fingerprint: dict[str, str]
    _team: Team
    _gives: frozenset[str]  # parameters that this process contributes, of all with an equal shard
    _everywhere: frozenset[str]  # parameters that every process holds whole

    def __repr__(self) -> str:
        return f"TicketShard(rank {self._team.rank} of {self._team.size}, {self.local!r})"

    def gather(self) -> Ticket:
        """The whole ticket, equal to that of `select`, on every process. All processes must call it."""
        sets = {}
        for name, shard in self.shards.items():
            if name in self._everywhere:
                sets[name] = self.local.sets[name]
                continue
            part = self.local.sets[name].bitmap() if name in self._gives else None
            sets[name] = assembled(self._team, part, shard)
        shapes = {name: shard.shape for name, shard in self.shards.items()}
        return Ticket(sets, shapes, self.metadata, self.fingerprint)


def assembled(team: Team, words: Tensor | None, shard: Shard) -> IndexSet:
    """The index set of a whole parameter from bitmaps of disjoint shards; None: none on this process."""
    n = Size(shard.shape).numel()
    whole = torch.empty(bitmap_words(n), dtype=torch.int32, device="cpu" if words is None else words.device)
    for to, piece in zip(whole.split(_PIECE), whole_words(team, words, shard), strict=True):
        to.copy_(piece)
    return IndexSet.from_bitmap(whole, n)


def whole_digest(team: Team, words: Tensor | None, shard: Shard, k: int) -> str:
    """The digest of that set, of k entries, which no process holds at once."""
    n = Size(shard.shape).numel()
    found = Hash().update(f"{n} ".encode())
    if k == n:
        return found.update(b"full").digest()
    for piece in whole_words(team, words, shard):
        found.update(piece)
    return found.digest()


def whole_words(team: Team, words: Tensor | None, shard: Shard) -> Iterator[Tensor]:
    """The bitmap of a whole parameter, some words at a time; arguments as of `assembled`."""
    first, shift = divmod(shard.start, 32)
    device = torch.device("cpu") if words is None else words.device
    count = bitmap_words(Size(shard.shape).numel())
    for at in range(0, max(count, 1), _PIECE):
        stop = min(at + _PIECE, count)
        piece = torch.zeros(stop - at, dtype=torch.int32, device=device)
        if words is not None:  # its words low..high have bits in the piece
            low, high = max(at - first - 1, 0), min(stop - first, words.numel())
            if low < high:
                moved, begin = shifted_words(words[low:high], shift), first + low - at
                moved = moved[max(-begin, 0) : stop - at - begin]
                piece[max(begin, 0) :][: moved.numel()] = moved
        yield team.sum(piece)  # no bit is set twice, so a sum is a bitwise or
