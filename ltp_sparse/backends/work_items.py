"""The shares of the thread blocks of a launch, made once for a tile table: the rows `WorkItem` of csrc/cuda."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ltp_sparse.backends.arguments import Tiles
from ltp_sparse.tickets.bits import popcount
from ltp_sparse.tickets.index_set import Encoding
from ltp_sparse.tickets.tile_table import Column

WORK_ITEM = 2048
"""Active entries of a thread block, at most. More spare prologues, fewer spread better: at 1 % a tile is one item, and
at 20 % of 278 million entries there are still 25 for every block that a GPU runs at once."""

_known = WeakTensorKeyDictionary()
"""Tiles -> (what they were made from, `work_items`)."""


def work_items(table: Tiles) -> Tensor:
    """int32 [I, 4]: tile, number of the first active entry, and the 64-entry groups of a bitmap that hold the item.

    Tile by tile; of the groups the first one, and the one after the last. Waits for the device when a table is seen
    first, or was changed.
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
        # the last group with at most as many active entries before it: empty ones come after the one before them
        places = torch.stack([first, last]) + before[start]
        groups = torch.searchsorted(before, places, right=True) - 1 - start
        groups[1] += 1
    rows = torch.stack([tile, first, *torch.where(is_bitmap, groups, 0)], 1)
    return rows.to(torch.int32)
