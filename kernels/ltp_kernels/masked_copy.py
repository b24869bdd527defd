"""`masked_gather_`, `masked_scatter_`, `masked_swap_`: active entries to their slots, back, or exchanged, bit by bit.

Items are told apart by their size alone. The launchers take the records of `ltp_sparse/backends/arguments.py` and the
addresses of the tensors.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .masked_adamw import (
    _BITMAP,
    _LIST16,
    _PARAM,
    _PARTS,
    _TILE_COLUMNS,
    _bitmap_block,
    _list_block,
    launch_per_tile,
    read_tile,
)

ITEMS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an item -> the integers that it is copied as."""


@triton.jit
def _move(item_ptr, slot_ptr, mask, READS: tl.constexpr, WRITES: tl.constexpr):
    item = tl.load(item_ptr, mask) if READS else 0
    slot = tl.load(slot_ptr, mask) if WRITES else 0
    if READS:
        tl.store(slot_ptr, item, mask)
    if WRITES:
        tl.store(item_ptr, slot, mask)


@triton.jit
def _masked_copy_kernel(
    address_ptr, slot_ptr, tile_ptr, group_ptr, rank_ptr, position_ptr,
    READS: tl.constexpr, WRITES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`_PARTS` programs per tile. READS: slots take the entries; WRITES: entries take the slots."""
    SIZE: tl.constexpr = slot_ptr.dtype.element_ty.primitive_bitwidth // 8
    tile_ptr += (tl.program_id(0) // _PARTS).to(tl.int64) * _TILE_COLUMNS
    start, length, active, slot, index, encoding = read_tile(tile_ptr)
    slot_ptr += slot
    item_ptr = (tl.load(address_ptr + tl.load(tile_ptr + _PARAM)) + SIZE * start).to(slot_ptr.dtype)
    first = tl.program_id(0) % _PARTS * BLOCK
    if encoding == _BITMAP:
        while first < length:
            rank, mask = _bitmap_block(
                group_ptr + index // 2, rank_ptr + index // 2, first, tl.arange(0, BLOCK), length
            )  # fmt: skip
            _move(item_ptr + first + tl.arange(0, BLOCK), slot_ptr + rank, mask, READS, WRITES)
            first += _PARTS * BLOCK
    else:
        listed = tl.where(encoding == _LIST16, active, 0)
        while first < active:
            rank = first + tl.arange(0, BLOCK)
            entry, mask = _list_block(position_ptr + index, rank, active, listed)
            _move(item_ptr + entry, slot_ptr + rank, mask, READS, WRITES)
            first += _PARTS * BLOCK


def _copy(copy: Any, addresses: Tensor, *, reads: bool, writes: bool) -> None:
    """One launch over all tiles."""
    slots = copy.slots.view(ITEMS[copy.slots.element_size()])
    launch_per_tile(_masked_copy_kernel, copy, address_ptr=addresses, slot_ptr=slots, READS=reads, WRITES=writes)


masked_gather_ = partial(_copy, reads=True, writes=False)
masked_scatter_ = partial(_copy, reads=False, writes=True)
masked_swap_ = partial(_copy, reads=True, writes=True)
