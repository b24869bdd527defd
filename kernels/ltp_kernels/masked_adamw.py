"""`masked_adamw_` and `masked_sum_squares`: AdamW on the active entries; `kernels/README.md` explains the design.

For every active entry, in float32, in this order and without fused multiply-add:

    g = grad * GRAD_FACTOR  (+ PULL * sign(p - anchor))
    p = p * DECAY
    m = m + ONE_MINUS_BETA1 * (g - m)
    v = v * BETA2 + ONE_MINUS_BETA2 * (g * g)
    p = p - STEP_SIZE * (m / (sqrt(v) * INV_SQRT_BC2 + EPS))

`tiles` is int64 [T, 7]: PARAM, START, LENGTH, ACTIVE, SLOT, INDEX, ENCODING. Parameters whose gradient is empty are
skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bits import popcount
from .launch import address_table, on_device_of

_PARTS = tl.constexpr(4)  # programs that share a tile, block by block
_BLOCK = 512  # entries of a program's block, where each is looked up
_NUM_WARPS = 4

_PARAM = tl.constexpr(0)
_START = tl.constexpr(1)
_LENGTH = tl.constexpr(2)
_ACTIVE = tl.constexpr(3)
_SLOT = tl.constexpr(4)
_INDEX = tl.constexpr(5)
_ENCODING = tl.constexpr(6)
_TILE_COLUMNS = tl.constexpr(7)

_FULL = tl.constexpr(0)
_BITMAP = tl.constexpr(1)
_LIST16 = tl.constexpr(2)

_COEFFICIENTS = tl.constexpr(10)


@triton.jit
def _coefficients(row):
    """The columns 1 to 9 of a parameter's coefficients, rounded to float32."""
    return (
        tl.load(row + 1).to(tl.float32),
        tl.load(row + 2).to(tl.float32),
        tl.load(row + 3).to(tl.float32),
        tl.load(row + 4).to(tl.float32),
        tl.load(row + 5).to(tl.float32),
        tl.load(row + 6).to(tl.float32),
        tl.load(row + 7).to(tl.float32),
        tl.load(row + 8).to(tl.float32),
        tl.load(row + 9).to(tl.float32),
    )


@triton.jit
def _pull(grad, param, anchor, pull):
    distance = param - anchor
    return grad + pull * ((distance > 0).to(tl.float32) - (distance < 0).to(tl.float32))


@triton.jit
def _update(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, anchor_ptr, mask, coefficients, HAS_ANCHOR: tl.constexpr
):  # fmt: skip
    """AdamW on the entries at the pointers, where `mask`."""
    grad_factor, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, inv_sqrt_bc2, eps, pull = coefficients
    # Lanes without an entry compute on ones: zeros or leftovers would take the slow paths of the division and the root.
    other: tl.constexpr = None if mask is None else 1.0
    p = tl.load(param_ptr, mask, other)
    g = tl.load(grad_ptr, mask, other) * grad_factor
    m = tl.load(exp_avg_ptr, mask, other)
    v = tl.load(exp_avg_sq_ptr, mask, other)
    if HAS_ANCHOR:
        g = _pull(g, p, tl.load(anchor_ptr, mask, other), pull)
    p = p * decay
    m = m + one_minus_beta1 * (g - m)
    v = v * beta2 + one_minus_beta2 * (g * g)
    p = p - step_size * tl.div_rn(m, tl.sqrt_rn(v) * inv_sqrt_bc2 + eps)
    tl.store(param_ptr, p, mask)
    tl.store(exp_avg_ptr, m, mask)
    tl.store(exp_avg_sq_ptr, v, mask)


@triton.jit
def _bitmap_block(group_ptr, rank_ptr, first, lane, length):
    """For the entries first + lane of a BITMAP tile: (number among the tile's active entries, whether active)."""
    # Bits past the end are zero, so only the index itself needs the bound.
    exists = first + lane < length
    group = tl.load(group_ptr + (first >> 6) + (lane >> 6), exists, 0).to(tl.uint64, bitcast=True)
    before = tl.load(rank_ptr + (first >> 6) + (lane >> 6), exists, 0).to(tl.uint16, bitcast=True).to(tl.int32)
    bit = tl.full([], 1, tl.uint64) << (lane & 63).to(tl.uint64)
    below = group & (bit - 1)
    # In 32-bit halves, or LLVM widens the sum and with it every address made of it to 64-bit arithmetic.
    rank = before + popcount(below.to(tl.uint32)) + popcount((below >> 32).to(tl.uint32))
    return rank, (group & bit) != 0


@triton.jit
def _list_block(position_ptr, rank, active, listed):
    """For the active entries number `rank` of a LIST16 or FULL (listed = 0) tile: (entry, whether there is one)."""
    position = tl.load(position_ptr + rank, rank < listed, 0).to(tl.uint16, bitcast=True).to(tl.int32)
    return tl.where(listed > 0, position, rank), rank < active


@triton.jit
def _masked_adamw_kernel(
    address_ptr, exp_avg_ptr, exp_avg_sq_ptr, tile_ptr, group_ptr, rank_ptr, position_ptr, coefficient_ptr, anchor_ptr,
    HAS_ANCHOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`_PARTS` programs a tile. group_ptr: the bitmaps as 64-bit groups; rank_ptr: active entries before each."""
    part = tl.program_id(0) % _PARTS
    tile_ptr += (tl.program_id(0) // _PARTS).to(tl.int64) * _TILE_COLUMNS
    param = tl.load(tile_ptr + _PARAM)
    param_address = tl.load(address_ptr + 2 * param)
    grad_address = tl.load(address_ptr + 2 * param + 1)
    coefficient_ptr += param * _COEFFICIENTS
    if (grad_address == 0) | (tl.load(coefficient_ptr) == 0):
        return
    coefficients = _coefficients(coefficient_ptr)
    start = tl.load(tile_ptr + _START)
    length = tl.load(tile_ptr + _LENGTH).to(tl.int32)
    active = tl.load(tile_ptr + _ACTIVE).to(tl.int32)
    slot = tl.load(tile_ptr + _SLOT)
    index = tl.load(tile_ptr + _INDEX)
    encoding = tl.load(tile_ptr + _ENCODING)
    param_address += 4 * start
    grad_address += 4 * start

    done = 0
    if (encoding == _FULL) & (((param_address | grad_address | 4 * slot) & 15) == 0):
        # Another block shape than below: blocks of equal shape get one layout, and vectors would spoil the gathers.
        VECTOR_BLOCK: tl.constexpr = 2 * BLOCK
        # Alignment by construction: a hint on an address would hold for all its uses, also below.
        param_ptr = tl.multiple_of((param_address // 16 * 16).to(tl.pointer_type(tl.float32)), 16)
        grad_ptr = tl.multiple_of((grad_address // 16 * 16).to(tl.pointer_type(tl.float32)), 16)
        done = active // VECTOR_BLOCK * VECTOR_BLOCK
        first = part * VECTOR_BLOCK
        while first < done:
            entry = tl.multiple_of(first, VECTOR_BLOCK) + tl.arange(0, VECTOR_BLOCK)
            packed = slot // 4 * 4 + entry
            _update(
                param_ptr + entry, grad_ptr + entry, exp_avg_ptr + packed, exp_avg_sq_ptr + packed,
                anchor_ptr + packed, None, coefficients, HAS_ANCHOR,
            )  # fmt: skip
            first += _PARTS * VECTOR_BLOCK

    param_ptr = param_address.to(tl.pointer_type(tl.float32))
    grad_ptr = grad_address.to(tl.pointer_type(tl.float32))
    exp_avg_ptr += slot
    exp_avg_sq_ptr += slot
    anchor_ptr += slot
    first = done + part * BLOCK
    if encoding == _BITMAP:
        group_ptr += index // 2
        rank_ptr += index // 2
        while first < length:
            lane = tl.arange(0, BLOCK)
            rank, mask = _bitmap_block(group_ptr, rank_ptr, first, lane, length)
            _update(
                param_ptr + first + lane, grad_ptr + first + lane, exp_avg_ptr + rank, exp_avg_sq_ptr + rank,
                anchor_ptr + rank, mask, coefficients, HAS_ANCHOR,
            )  # fmt: skip
            first += _PARTS * BLOCK
    else:
        position_ptr += index
        listed = tl.where(encoding == _LIST16, active, 0)
        while first < active:
            lane = tl.arange(0, BLOCK)
            entry, mask = _list_block(position_ptr, first + lane, active, listed)
            _update(
                param_ptr + entry, grad_ptr + entry, exp_avg_ptr + first + lane, exp_avg_sq_ptr + first + lane,
                anchor_ptr + first + lane, mask, coefficients, HAS_ANCHOR,
            )  # fmt: skip
            first += _PARTS * BLOCK


@triton.jit
def _square(grad_ptr, param_ptr, anchor_ptr, mask, grad_factor, pull, HAS_ANCHOR: tl.constexpr):
    """float64 squares of the gradients that the update would see; lanes outside `mask` read zeros and give 0."""
    g = tl.load(grad_ptr, mask, 0.0) * grad_factor
    if HAS_ANCHOR:
        g = _pull(g, tl.load(param_ptr, mask, 0.0), tl.load(anchor_ptr, mask, 0.0), pull)
    g = g.to(tl.float64)
    return g * g


@triton.jit
def _masked_sum_squares_kernel(
    address_ptr, tile_ptr, group_ptr, rank_ptr, position_ptr, coefficient_ptr, anchor_ptr, sum_ptr,
    HAS_ANCHOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the sum of every part of every tile: sum_ptr is float64 [T, _PARTS]."""
    tile_ptr += (tl.program_id(0) // _PARTS).to(tl.int64) * _TILE_COLUMNS
    param = tl.load(tile_ptr + _PARAM)
    param_address = tl.load(address_ptr + 2 * param)
    grad_address = tl.load(address_ptr + 2 * param + 1)
    coefficient_ptr += param * _COEFFICIENTS
    grad_factor = tl.load(coefficient_ptr + 1).to(tl.float32)
    pull = tl.load(coefficient_ptr + 9).to(tl.float32)
    start = tl.load(tile_ptr + _START)
    length = tl.load(tile_ptr + _LENGTH).to(tl.int32)
    active = tl.load(tile_ptr + _ACTIVE).to(tl.int32)
    index = tl.load(tile_ptr + _INDEX)
    encoding = tl.load(tile_ptr + _ENCODING)
    anchor_ptr += tl.load(tile_ptr + _SLOT)
    param_ptr = (param_address + 4 * start).to(tl.pointer_type(tl.float32))
    grad_ptr = (grad_address + 4 * start).to(tl.pointer_type(tl.float32))

    total = tl.zeros([BLOCK], tl.float64)
    if grad_address != 0:
        first = tl.program_id(0) % _PARTS * BLOCK
        if encoding == _BITMAP:
            group_ptr += index // 2
            rank_ptr += index // 2
            while first < length:
                lane = tl.arange(0, BLOCK)
                rank, mask = _bitmap_block(group_ptr, rank_ptr, first, lane, length)
                total += _square(
                    grad_ptr + first + lane, param_ptr + first + lane, anchor_ptr + rank,
                    mask, grad_factor, pull, HAS_ANCHOR,
                )  # fmt: skip
                first += _PARTS * BLOCK
        else:
            position_ptr += index
            listed = tl.where(encoding == _LIST16, active, 0)
            while first < active:
                lane = tl.arange(0, BLOCK)
                entry, mask = _list_block(position_ptr, first + lane, active, listed)
                total += _square(
                    grad_ptr + entry, param_ptr + entry, anchor_ptr + first + lane,
                    mask, grad_factor, pull, HAS_ANCHOR,
                )  # fmt: skip
                first += _PARTS * BLOCK
    tl.store(sum_ptr + tl.program_id(0), tl.sum(total))


def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    tiles: Tensor,
    words: Tensor,
    ranks: Tensor,
    positions: Tensor,
    coefficients: Tensor,
    anchor: Tensor,
) -> None:
    """One launch over all tiles. `ranks` must be there if any tile is a bitmap (`TileTable.with_ranks`)."""
    if not len(tiles):
        return
    with on_device_of(exp_avg):
        _masked_adamw_kernel[(len(tiles) * _PARTS.value,)](
            address_table(list(chain(*zip(params, grads, strict=True))), tiles.device),
            exp_avg,
            exp_avg_sq,
            tiles,
            words.view(torch.int64),
            ranks,
            positions,
            coefficients,
            anchor,
            HAS_ANCHOR=anchor.numel() > 0,
            BLOCK=_BLOCK,
            num_warps=_NUM_WARPS,
            enable_fp_fusion=False,
        )


def masked_sum_squares(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    tiles: Tensor,
    words: Tensor,
    ranks: Tensor,
    positions: Tensor,
    coefficients: Tensor,
    anchor: Tensor,
) -> Tensor:
    """float64 [T]; each sum is taken in an order that depends on the tile only."""
    sums = torch.empty(len(tiles), _PARTS.value, dtype=torch.float64, device=tiles.device)
    if len(tiles):
        with on_device_of(tiles):
            _masked_sum_squares_kernel[(len(tiles) * _PARTS.value,)](
                address_table(list(chain(*zip(params, grads, strict=True))), tiles.device),
                tiles,
                words.view(torch.int64),
                ranks,
                positions,
                coefficients,
                anchor,
                sums,
                HAS_ANCHOR=anchor.numel() > 0,
                BLOCK=_BLOCK,
                num_warps=_NUM_WARPS,
                enable_fp_fusion=False,
            )
    return sums.sum(1)
