"""`TileTable`: the index sets of many parameters in one table, for one launch."""

from __future__ import annotations

from collections.abc import Sequence
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

    PARAM = 0
    START = 1
    LENGTH = 2
    ACTIVE = 3
    SLOT = 4
    INDEX = 5
    ENCODING = 6
    BLOCK = 7


@dataclass(frozen=True, eq=False)
class TileTable:
    """The index sets of a list of parameters, as a kernel launch reads them.

    Attributes:
        tiles: int64 [T, 8], ordered by (parameter, start), with the columns of `Column`. Tiles without active entries
            are left out. INDEX is an offset into `words` (BITMAP) or `positions` (LIST16); SLOT is the tile's first
            slot in the packed buffers, which are ordered by (parameter, flat index); BLOCK is its first state block
        words: int32 [W], the bitmaps
        ranks: int16 [W / 2] with uint16 bits, the directory: active entries of the tile before each 64-entry group;
            empty if not built
        positions: int16 [L] with uint16 bits, the lists
        blocks: state blocks in all
        counts: active entries of every parameter
        sizes: entries of every parameter
        density: active share of all entries; of the whole table if this one is a part
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
        """Builds the table of `sets`, one per parameter, each in its smallest encoding."""
        tiles, words, positions = [], [], []
        slot = n_words = n_positions = 0
        for param, index_set in enumerate(sets):
            index_set = index_set.compact()
            counts = index_set.tile_counts.cpu()
            rows = torch.empty(counts.numel(), len(Column), dtype=torch.int64, device="cpu")
            rows[:, Column.PARAM] = param
            rows[:, Column.START] = TILE * torch.arange(counts.numel(), dtype=torch.int64, device="cpu")
            rows[:, Column.LENGTH] = (index_set.n - rows[:, Column.START]).clamp(max=TILE)
            rows[:, Column.ACTIVE] = counts
            rows[:, Column.SLOT] = slot + counts.cumsum(0) - counts
            rows[:, Column.ENCODING] = index_set.encoding
            if index_set.encoding is Encoding.FULL:
                rows[:, Column.INDEX] = 0
            elif index_set.encoding is Encoding.BITMAP:
                occupied = [w for w, c in zip(index_set.data.split(WORDS_PER_TILE), counts.tolist(), strict=True) if c]
                lengths = (rows[:, Column.LENGTH] + 63) // 64 * 2 * (counts > 0)
                rows[:, Column.INDEX] = n_words + lengths.cumsum(0) - lengths
                words += [w.to(device) for w in occupied]
                n_words += int(lengths.sum())
            else:
                rows[:, Column.INDEX] = n_positions + counts.cumsum(0) - counts
                positions.append(index_set.data.to(device))
                n_positions += index_set.data.numel()
            slot += int(counts.sum())
            tiles.append(rows[counts > 0])
        rows = torch.cat([torch.empty(0, len(Column), dtype=torch.int64, device="cpu"), *tiles])
        blocks = state_blocks(rows[:, Column.ACTIVE])
        rows[:, Column.BLOCK] = blocks.cumsum(0) - blocks
        table = cls(
            tiles=rows.to(device),
            words=torch.cat([torch.empty(0, dtype=torch.int32, device=device), *words]),
            ranks=torch.empty(0, dtype=torch.int16, device=device),
            positions=torch.cat([torch.empty(0, dtype=torch.int16, device=device), *positions]),
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


def tile_indices(tile: Sequence[int], words: Tensor, positions: Tensor) -> Tensor:
    """int64 [ACTIVE]: flat indices of the active entries of one row of `TileTable.tiles` (as Python integers)."""
    _, start, length, active, _, index, encoding, _ = tile
    if encoding == Encoding.FULL:
        return torch.arange(start, start + length, device=words.device, dtype=torch.int64)
    if encoding == Encoding.BITMAP:
        return start + unpack_bits(words[index : index + bitmap_words(length)]).nonzero().view(-1)
    return start + from_uint16_bits(positions[index : index + active])
