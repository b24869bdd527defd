"""How a launch is divided among thread blocks: the rows `WorkItem` of csrc/cuda, made once for each tile table."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ltp_sparse.backends.arguments import Tiles
from ltp_sparse.tickets.bits import popcount
from ltp_sparse.tickets.index_set import Encoding
from ltp_sparse.tickets.tile_table import Column

WORK_ITEM = 2048
"""The most active entries of a thread block. Larger items save prologues, smaller ones spread better over a GPU. At 1 %
active a tile is one item; at 20 % of 278 million entries there are 25 items for every block that runs at a time."""

_known = WeakTensorKeyDictionary()
"""Tiles -> (address and version of what they were made from, work items)."""


def work_items(table: Tiles) -> Tensor:
    """int32 [I, 4]: the tile of each item, the number of its first active entry there, and its groups of a bitmap.

    A group has 64 entries; given are the first group of the item and the one after its last. The items of a tile stand
    together. Waits for the device when the table is new or has changed.
    """
    stamp = tuple((tensor.data_ptr(), _version(tensor)) for tensor in (table.tiles, table.words))
    known: tuple[object, Tensor] | None = _known.get(table.tiles)
    if known is None or known[0] != stamp:
        known = _known[table.tiles] = stamp, _made(table.tiles, table.words)
    return known[1]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _made(tiles: Tensor, words: Tensor) -> Tensor:
    active = tiles[:, Column.ACTIVE]
    per_tile = (active + WORK_ITEM - 1) // WORK_ITEM
    tile = torch.repeat_interleave(per_tile)
    earlier = per_tile.cumsum(0) - per_tile
    first = WORK_ITEM * (torch.arange(len(tile), dtype=torch.int64, device=tile.device) - earlier[tile])
    last = torch.minimum(first + WORK_ITEM, active[tile]) - 1
    is_bitmap = tiles[tile, Column.ENCODING] == Encoding.BITMAP
    groups = torch.zeros(2, len(tile), dtype=torch.int64, device=tile.device)
    if words.numel():
        counts = popcount(words).view(-1, 2).sum(1, dtype=torch.int64)
        before = counts.cumsum(0) - counts
        start = torch.where(is_bitmap, tiles[tile, Column.INDEX] // 2, 0)
        # the last group with at most that many active entries before it; empty groups have as many as the next one
        places = torch.stack([first, last]) + before[start]
        groups = torch.searchsorted(before, places, right=True) - 1 - start
        groups[1] += 1
    return torch.stack([tile, first, *torch.where(is_bitmap, groups, 0)], 1).to(torch.int32)
