"""`TicketShard`: one rank's part of a ticket."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor

from ltp_sparse.deltas.ranks import own_entries
from ltp_sparse.selection.team import Team
from ltp_sparse.tickets.bits import TILE, bitmap_words, shifted_words
from ltp_sparse.tickets.index_set import IndexSet
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.tickets.tile_table import STATE_BLOCK, state_blocks
from ltp_sparse.weights.digests import Hash
from ltp_sparse.weights.sharding import Cut

_PIECE = 1 << 18  # words of a bitmap sent at a time


class Shard(NamedTuple):
    """The entries start..stop, in row-major order, of a parameter with the given whole `shape`."""

    start: int
    stop: int
    shape: Sequence[int]


@dataclass(frozen=True)
class Part:
    """A rank's part of the active entries of a parameter, and its place among all of them.

    Attributes:
        index_set: the active entries of this rank's tensor.
        first: the number of active entries before them.
        k: the number of active entries of the whole parameter.
        blocks: (first state block, number of state blocks of the whole parameter); None if ranks share a block.
        start: the entry of the whole parameter with which this rank's tensor begins; None if it is no range of rows.
        digest: the digest of all active entries and, unless ranks hold ranges of rows, of the cut.
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
        own, slots = own_entries(whole, cut)
        assert isinstance(slots, slice)
        return cls(own, slots.start, whole.k, _blocks(whole, *cut.entries), cut.entries[0], whole.digest())


def _blocks(whole: IndexSet, start: int, stop: int) -> tuple[int, int] | None:
    of_tiles = state_blocks(whole.tile_counts)
    unit = STATE_BLOCK if whole.k == whole.n else TILE
    if start % unit or (stop % unit and stop < whole.n):
        return None
    before = start // STATE_BLOCK if whole.k == whole.n else int(of_tiles[: start // TILE].sum())
    return before, int(of_tiles.sum())


def _part_of_block(whole: IndexSet, cut: Cut) -> Part:
    """The part of a rank that holds some columns. The slots of each such block come after those of the one before."""
    first = mine = 0
    for number, pieces in zip(cut.own, cut.ranges, strict=True):
        mine = mine * len(pieces) + number
    for _, indices in whole.to("cpu").chunks():
        block = torch.zeros_like(indices)
        for coordinate, pieces in zip(torch.unravel_index(indices, cut.shape), cut.ranges, strict=True):
            ends = torch.tensor([end for _, end in pieces], dtype=torch.int64, device="cpu")
            block = block * len(pieces) + torch.searchsorted(ends, coordinate, right=True)
        first += int((block < mine).sum())
    digest = Hash().update(f"{whole.digest()} {cut.ranges}".encode()).digest()
    return Part(own_entries(whole, cut)[0], first, whole.k, None, None, digest)


@dataclass(frozen=True, eq=False)
class TicketShard:
    """One rank's part of a ticket. `MaskedAdamW` accepts it for a model that is sharded in the same way.

    Attributes:
        local: a ticket over this rank's tensors, with their names and shapes.
        shards: name -> this rank's shard, for every parameter of the pool; an empty range if it holds nothing of it.
        parts: name -> place of this rank's active entries among all, for the parameters of `local`.
        metadata: that of the whole ticket.
        fingerprint: that of the whole ticket.
    """

    local: Ticket
    shards: dict[str, Shard]
    parts: dict[str, Part]
    metadata: dict[str, Any]
    fingerprint: dict[str, str]
    _team: Team
    _gives: frozenset[str]  # parameters that this rank contributes for all ranks with the same shard
    _everywhere: frozenset[str]  # parameters that every rank holds whole

    def __repr__(self) -> str:
        return f"TicketShard(rank {self._team.rank} of {self._team.size}, {self.local!r})"

    def gather(self) -> Ticket:
        """Assembles the whole ticket, equal to that of `select`, on every rank. All ranks must call it."""
        sets = {}
        for name, shard in self.shards.items():
            if name in self._everywhere:
                sets[name] = self.local.sets[name]
                continue
            part = self.local.sets[name].bitmap() if name in self._gives else None
            sets[name] = assembled(self._team, part, shard)
        return Ticket(sets, {name: shard.shape for name, shard in self.shards.items()}, self.metadata, self.fingerprint)


def assembled(team: Team, words: Tensor | None, shard: Shard) -> IndexSet:
    """The index set of a whole parameter, from the bitmaps of disjoint shards.

    Args:
        team: the ranks.
        words: this rank's bitmap, or None if it contributes nothing.
        shard: the shard that the bitmap covers.
    """
    n = Size(shard.shape).numel()
    whole = torch.empty(bitmap_words(n), dtype=torch.int32, device="cpu" if words is None else words.device)
    for to, piece in zip(whole.split(_PIECE), whole_words(team, words, shard), strict=True):
        to.copy_(piece)
    return IndexSet.from_bitmap(whole, n)


def whole_digest(team: Team, words: Tensor | None, shard: Shard, k: int) -> str:
    """The digest of the index set of `assembled`, which has k entries, without holding all of it on any rank."""
    n = Size(shard.shape).numel()
    found = Hash().update(f"{n} ".encode())
    if k == n:
        return found.update(b"full").digest()
    for piece in whole_words(team, words, shard):
        found.update(piece)
    return found.digest()


def whole_words(team: Team, words: Tensor | None, shard: Shard) -> Iterator[Tensor]:
    """Yields the bitmap of a whole parameter piece by piece; arguments as for `assembled`."""
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
