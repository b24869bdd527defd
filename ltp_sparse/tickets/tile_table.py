"""`TileTable`: the index sets of many parameters in one table, for one launch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TypeVar

import torch
from torch import Tensor

from ltp_sparse.tickets.bits import (
    TILE,
    WORDS_PER_TILE,
    bitmap_words,
    from_uint16_bits,
    popcount,
    to_uint16_bits,
    unpack_bits,
)
from ltp_sparse.tickets.index_set import Encoding, IndexSet

STATE_BLOCK = 256
"""Active entries of a tile that share the scales of their 8-bit moments."""

Count = TypeVar("Count", int, Tensor)


def state_blocks(active: Count) -> Count:
    """State blocks of a tile with `active` active entries; elementwise for a tensor of counts."""
    return (active + STATE_BLOCK - 1) // STATE_BLOCK


class Column(IntEnum):
    """Columns of `TileTable.tiles`."""

    PARAM = 0  # number of the parameter
    START = 1  # its entry that the tile begins with
    LENGTH = 2  # entries of the tile
    ACTIVE = 3  # active ones of these
    SLOT = 4  # slot of the first active entry in the packed buffers, ordered by (parameter, flat index)
    INDEX = 5  # offset into `words` (BITMAP) or `positions` (LIST16)
    ENCODING = 6  # an `Encoding`
    BLOCK = 7  # the first state block


@dataclass(frozen=True, eq=False)
class TileTable:
    """The index sets of a list of parameters, in the form that a kernel launch reads.

    Attributes:
        tiles: int64 [T, 8], ordered by (parameter, start), with the columns of `Column`. Tiles without active entries
            are left out.
        words: int32 [W], the bitmaps.
        ranks: int16 [W / 2] with uint16 bits, the directory: active entries of the tile before each 64-entry group. It
            is empty until `with_ranks` builds it.
        positions: int16 [L] with uint16 bits, the lists.
        blocks: number of state blocks.
        counts: active entries of every parameter.
        sizes: entries of every parameter.
        density: active share of all entries; in a part of a table, that of the whole.
    """

    tiles: Tensor
    words: Tensor
    ranks: Tensor
    positions: Tensor
    blocks: int
    counts: tuple[int, ...]
    sizes: tuple[int, ...]
    density: float = -1.0

    def __post_init__(self) -> None:
        if self.density < 0:
            object.__setattr__(self, "density", self.k / max(1, sum(self.sizes)))

    @classmethod
    def build(cls, sets: Sequence[IndexSet], *, device: torch.device | str = "cpu", ranks: bool = False) -> TileTable:
        """Builds the table of some index sets, each in its smallest encoding.

        Args:
            sets: one per parameter.
            device: the device of the table.
            ranks: whether to build the directory, which kernels on a GPU read.
        """
        sets = [index_set.compact() for index_set in sets]
        tiles_of_set = torch.tensor(
            [index_set.tile_counts.numel() for index_set in sets], dtype=torch.int64, device="cpu"
        )

        def of_tiles(numbers: Iterable[int]) -> Tensor:
            """A number per set, as a number per tile."""
            return torch.tensor(list(numbers), dtype=torch.int64, device="cpu").repeat_interleave(tiles_of_set)

        counts = _joined([index_set.tile_counts for index_set in sets], torch.int64, "cpu")
        rows = torch.zeros(counts.numel(), len(Column), dtype=torch.int64, device="cpu")
        encoding = of_tiles(index_set.encoding for index_set in sets)
        first = (tiles_of_set.cumsum(0) - tiles_of_set).repeat_interleave(tiles_of_set)
        rows[:, Column.PARAM] = of_tiles(range(len(sets)))
        rows[:, Column.START] = TILE * (torch.arange(counts.numel(), dtype=torch.int64, device="cpu") - first)
        rows[:, Column.LENGTH] = (of_tiles(s.n for s in sets) - rows[:, Column.START]).clamp(max=TILE)
        rows[:, Column.ACTIVE] = counts
        rows[:, Column.SLOT] = counts.cumsum(0) - counts
        rows[:, Column.ENCODING] = encoding
        lengths = (rows[:, Column.LENGTH] + 63) // 64 * 2 * (counts > 0)
        for each, taken in ((Encoding.BITMAP, lengths), (Encoding.LIST16, counts)):
            taken = taken * (encoding == each)
            rows[:, Column.INDEX] += (taken.cumsum(0) - taken) * (encoding == each)
        rows = rows[counts > 0]
        words = [words for index_set in sets if index_set.encoding is Encoding.BITMAP for words in _occupied(index_set)]
        positions = [index_set.data for index_set in sets if index_set.encoding is Encoding.LIST16]
        blocks = state_blocks(rows[:, Column.ACTIVE])
        rows[:, Column.BLOCK] = blocks.cumsum(0) - blocks
        table = cls(
            tiles=rows.to(device),
            words=_joined(words, torch.int32, device),
            ranks=torch.empty(0, dtype=torch.int16, device=device),
            positions=_joined(positions, torch.int16, device),
            blocks=int(blocks.sum()),
            counts=tuple(index_set.k for index_set in sets),
            sizes=tuple(index_set.n for index_set in sets),
        )
        return table.with_ranks() if ranks else table

    def with_ranks(self) -> TileTable:
        """The same table with the directory that GPU kernels read."""
        if self.ranks.numel() == self.words.numel() // 2:
            return self
        counts = popcount(self.words).view(-1, 2).sum(1, dtype=torch.int64)
        before = counts.cumsum(0) - counts
        bitmap = self.tiles[self.tiles[:, Column.ENCODING] == Encoding.BITMAP]
        groups = (bitmap[:, Column.LENGTH] + 63) // 64
        ranks = before - torch.repeat_interleave(before[bitmap[:, Column.INDEX] // 2], groups)
        return replace(self, ranks=to_uint16_bits(ranks))

    @property
    def k(self) -> int:
        """Slots of the packed buffers: active entries of all parameters."""
        return sum(self.counts)

    @property
    def nbytes(self) -> int:
        """Bytes of the index."""
        return sum(t.nbytes for t in (self.tiles, self.words, self.ranks, self.positions))

    def __repr__(self) -> str:
        where = f"{len(self.counts)} parameters, {len(self.tiles):,} tiles"
        return f"TileTable({self.k:,} active entries of {where}, {self.nbytes:,} bytes)"


def _joined(parts: Iterable[Tensor], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The parts in one new tensor on a device."""
    return torch.cat([torch.empty(0, dtype=dtype, device=device), *(part.to(device) for part in parts)])


def _occupied(index_set: IndexSet) -> Sequence[Tensor]:
    """The words of the tiles of a bitmap that have active entries."""
    has_some = index_set.tile_counts.cpu() > 0
    if bool(has_some.all()):
        return [index_set.data]
    words = index_set.data.split(WORDS_PER_TILE)
    return [piece for piece, some in zip(words, has_some.tolist(), strict=True) if some]


def tile_indices(tile: Sequence[int], words: Tensor, positions: Tensor) -> Tensor:
    """int64 [ACTIVE]: flat indices of the active entries of one row of `TileTable.tiles` (as Python integers)."""
    _, start, length, active, _, index, encoding, _ = tile
    if encoding == Encoding.FULL:
        return torch.arange(start, start + length, device=words.device, dtype=torch.int64)
    if encoding == Encoding.BITMAP:
        return start + unpack_bits(words[index : index + bitmap_words(length)]).nonzero().view(-1)
    return start + from_uint16_bits(positions[index : index + active])
