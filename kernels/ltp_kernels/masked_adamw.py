"""`masked_adamw_`, `masked_sum_squares` and `masked_pack_`: AdamW on the active entries, the norm of their gradients,
and packing these. `kernels/README.md` explains the design.

For every active entry, in float32, in this order and without fused multiply-add:

    g = grad * GRAD_FACTOR  (+ PULL * sign(p - anchor))
    m = m + ONE_MINUS_BETA1 * (g - m)
    v = v * BETA2 + ONE_MINUS_BETA2 * (g * g)
    p = p - (DECAY_STEP * p + STEP_SIZE * (m / (sqrt(v) * INV_SQRT_BC2 + EPS)))

`tiles` is int64 [T, 8]: PARAM, START, LENGTH, ACTIVE, SLOT, INDEX, ENCODING, BLOCK. The launchers take the records of
`ltp_sparse/backends/arguments.py` and the addresses of parameters and gradients. Parameters without a gradient are
skipped.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bits import bit_of_rank, popcount
from .launch import launch
from .precision import (
    TYPES,
    block_scale,
    decode_exp_avg,
    decode_exp_avg_sq,
    encode_exp_avg,
    encode_exp_avg_sq,
    moment_bits,
    round_stochastically,
    round_to,
    rounding_key,
    tile_key,
)

_PARTS = tl.constexpr(4)  # programs that share a tile, block by block
_BLOCK = 512  # entries of a block
_NUM_WARPS = 4
_STATE_BLOCK = tl.constexpr(256)  # active entries that share the scales of 8-bit moments

_PARAM = tl.constexpr(0)
_START = tl.constexpr(1)
_LENGTH = tl.constexpr(2)
_ACTIVE = tl.constexpr(3)
_SLOT = tl.constexpr(4)
_INDEX = tl.constexpr(5)
_ENCODING = tl.constexpr(6)
_FIRST_BLOCK = tl.constexpr(7)
_TILE_COLUMNS = tl.constexpr(8)

_FULL = tl.constexpr(0)
_BITMAP = tl.constexpr(1)
_LIST16 = tl.constexpr(2)

_COEFFICIENTS = tl.constexpr(11)
_HYPER = tl.constexpr(7)

_NORM_GROUP = tl.constexpr(64)  # tiles whose sums are added to one

_PREPARED = tl.constexpr(8)  # words of a row `Prepared` of csrc/common/adamw.h
_PARAM_ADDRESS = tl.constexpr(5)
_GRAD_ADDRESS = tl.constexpr(6)
_ROUNDING_KEY = tl.constexpr(9)  # counted in halves of a word, as the next one
_APPLIES = tl.constexpr(14)
_PREPARED_AT_ONCE = 128


@triton.jit
def read_tile(tile_ptr):
    """The columns of a row from START to ENCODING; LENGTH and ACTIVE in 32 bits."""
    return (
        tl.load(tile_ptr + _START),
        tl.load(tile_ptr + _LENGTH).to(tl.int32),
        tl.load(tile_ptr + _ACTIVE).to(tl.int32),
        tl.load(tile_ptr + _SLOT),
        tl.load(tile_ptr + _INDEX),
        tl.load(tile_ptr + _ENCODING),
    )


@triton.jit
def _power(base, exponent):
    """base ** exponent in float64, by squaring, for an int64 exponent below 2^53."""
    power = tl.full(base.shape, 1.0, tl.float64)
    for _ in range(53):
        power = tl.where((exponent & 1) != 0, power * base, power)
        base = base * base
        exponent = exponent >> 1
    return power


@triton.jit
def _write_coefficients(
    row_ptr, param, mask, hyper_ptr, param_group_ptr, number_ptr, has_grad_ptr, step_ptr, found_inf_ptr, grad_scale_ptr,
    pull_factor_ptr, seed,
    COUNTS: tl.constexpr, HAS_FOUND_INF: tl.constexpr, HAS_GRAD_SCALE: tl.constexpr, HAS_PULL_FACTOR: tl.constexpr,
):  # fmt: skip
    """Counts the step of some parameters, and computes their rows of coefficients, as in csrc/common/adamw.h."""
    hyper_ptr += tl.load(param_group_ptr + param, mask, 0) * _HYPER
    lr = tl.load(hyper_ptr, mask, 1.0)
    beta1 = tl.load(hyper_ptr + 1, mask, 0.5)
    beta2 = tl.load(hyper_ptr + 2, mask, 0.5)
    grad_factor = tl.load(hyper_ptr + 5, mask, 1.0)
    pull = tl.load(hyper_ptr + 6, mask, 0.0)
    if HAS_GRAD_SCALE:
        grad_factor = grad_factor / tl.load(grad_scale_ptr).to(tl.float64)
    if HAS_PULL_FACTOR:
        pull = pull * tl.load(pull_factor_ptr)
    apply = tl.load(has_grad_ptr + param, mask, 0.0)
    if HAS_FOUND_INF:
        apply = tl.where(tl.load(found_inf_ptr) == 0.0, apply, 0.0)
    steps = tl.load(step_ptr + param, mask, 1.0)
    if COUNTS:
        steps += apply
        tl.store(step_ptr + param, steps, mask)
    # a parameter without an update yet would divide by 0; its row is not applied
    exponent = tl.maximum(steps, 1.0).to(tl.int64)
    key = rounding_key(seed, steps.to(tl.int64), tl.load(number_ptr + param, mask, 0))
    tl.store(row_ptr, apply, mask)
    tl.store(row_ptr + 1, grad_factor, mask)
    tl.store(row_ptr + 2, lr * tl.load(hyper_ptr + 4, mask, 0.0), mask)
    tl.store(row_ptr + 3, 1.0 - beta1, mask)
    tl.store(row_ptr + 4, beta2, mask)
    tl.store(row_ptr + 5, 1.0 - beta2, mask)
    tl.store(row_ptr + 6, lr / (1.0 - _power(beta1, exponent)), mask)
    tl.store(row_ptr + 7, 1.0 / tl.sqrt(1.0 - _power(beta2, exponent)), mask)
    tl.store(row_ptr + 8, tl.load(hyper_ptr + 3, mask, 0.0), mask)
    tl.store(row_ptr + 9, apply * pull, mask)  # a norm counts the pull of parameters with a gradient only
    tl.store(row_ptr + 10, key.to(tl.float64), mask)


@triton.jit(do_not_specialize=["n_params", "seed"])
def _prepare_kernel(
    address_ptr, coefficient_ptr, prepared_ptr, n_params, hyper_ptr, param_group_ptr, number_ptr, has_grad_ptr,
    step_ptr, found_inf_ptr, grad_scale_ptr, pull_factor_ptr, seed,
    IS_STEP: tl.constexpr, COUNTS: tl.constexpr, HAS_FOUND_INF: tl.constexpr, HAS_GRAD_SCALE: tl.constexpr,
    HAS_PULL_FACTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the rows that other kernels read. With IS_STEP, the coefficients are computed before."""
    param = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = param < n_params
    row_ptr = coefficient_ptr + param * _COEFFICIENTS
    if IS_STEP:
        _write_coefficients(
            row_ptr, param, mask, hyper_ptr, param_group_ptr, number_ptr, has_grad_ptr, step_ptr, found_inf_ptr,
            grad_scale_ptr, pull_factor_ptr, seed, COUNTS, HAS_FOUND_INF, HAS_GRAD_SCALE, HAS_PULL_FACTOR,
        )  # fmt: skip
        tl.debug_barrier()  # a thread reads only its own writes, but the compiler does not know that
    prepared_ptr += param * _PREPARED
    value_ptr = prepared_ptr.to(tl.pointer_type(tl.float32), bitcast=True)
    number_ptr = prepared_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    for column in tl.static_range(1, 10):
        tl.store(value_ptr + (column - 1), tl.load(row_ptr + column, mask, 0.0).to(tl.float32), mask)
    tl.store(number_ptr + _ROUNDING_KEY, tl.load(row_ptr + 10, mask, 0.0).to(tl.int64).to(tl.int32), mask)
    tl.store(number_ptr + _APPLIES, (tl.load(row_ptr, mask, 0.0) != 0).to(tl.int32), mask)
    tl.store(prepared_ptr + _PARAM_ADDRESS, tl.load(address_ptr + 2 * param, mask, 0), mask)
    tl.store(prepared_ptr + _GRAD_ADDRESS, tl.load(address_ptr + 2 * param + 1, mask, 0), mask)


@triton.jit
def _coefficients(prepared_ptr, row_ptr, clip_ptr, HAS_CLIP: tl.constexpr):
    """A parameter's coefficients in float32. The clip multiplies GRAD_FACTOR and PULL in float64."""
    value_ptr = prepared_ptr.to(tl.pointer_type(tl.float32), bitcast=True)
    grad_factor = tl.load(value_ptr)
    pull = tl.load(value_ptr + 8)
    if HAS_CLIP:
        clip = tl.load(clip_ptr)
        grad_factor = (tl.load(row_ptr + 1) * clip).to(tl.float32)
        pull = (tl.load(row_ptr + 9) * clip).to(tl.float32)
    return (
        grad_factor,
        tl.load(value_ptr + 1),
        tl.load(value_ptr + 2),
        tl.load(value_ptr + 3),
        tl.load(value_ptr + 4),
        tl.load(value_ptr + 5),
        tl.load(value_ptr + 6),
        tl.load(value_ptr + 7),
        pull,
    )


@triton.jit
def _pull(grad, param, anchor, pull):
    distance = param - anchor
    return grad + pull * ((distance > 0).to(tl.float32) - (distance < 0).to(tl.float32))


@triton.jit
def adamw_update(p, g, m, v, coefficients):
    """The new (p, m, v) of some entries, and the root of v. `g` is the effective gradient."""
    _, decay_step, one_minus_beta1, beta2, one_minus_beta2, step_size, inv_sqrt_bc2, eps, _ = coefficients
    m = m + one_minus_beta1 * (g - m)
    v = v * beta2 + one_minus_beta2 * (g * g)
    root = tl.sqrt_rn(v)
    p = p - (decay_step * p + step_size * tl.div_rn(m, root * inv_sqrt_bc2 + eps))
    return p, m, v, root


@triton.jit
def _value_and_gradient(
    param_ptr, grad_ptr, master_ptr, anchor_ptr, mask, coefficients,
    HAS_MASTER: tl.constexpr, HAS_ANCHOR: tl.constexpr,
):  # fmt: skip
    # Lanes without an entry compute with ones, since zeros or garbage would take slow paths of division and root.
    other: tl.constexpr = None if mask is None else 1.0
    grad_factor, _, _, _, _, _, _, _, pull = coefficients
    p = tl.load(master_ptr, mask, other) if HAS_MASTER else tl.load(param_ptr, mask, other).to(tl.float32)
    g = tl.load(grad_ptr, mask, other).to(tl.float32) * grad_factor
    if HAS_ANCHOR:
        g = _pull(g, p, tl.load(anchor_ptr, mask, other), pull)
    return p, g


@triton.jit
def _store_value(
    param_ptr, master_ptr, p, mask, key, index, HAS_MASTER: tl.constexpr, STOCHASTIC: tl.constexpr
):  # fmt: skip
    if HAS_MASTER:
        tl.store(master_ptr, p, mask)
    if STOCHASTIC:
        tl.store(param_ptr, round_stochastically(p, key, index), mask)
    else:
        tl.store(param_ptr, round_to(p, param_ptr.dtype.element_ty), mask)


@triton.jit
def _update(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, master_ptr, anchor_ptr, mask, key, index, coefficients,
    HAS_MASTER: tl.constexpr, HAS_ANCHOR: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """AdamW on the entries at the pointers where `mask` is True; `index` are their flat indices."""
    other: tl.constexpr = None if mask is None else 1.0
    p, g = _value_and_gradient(
        param_ptr, grad_ptr, master_ptr, anchor_ptr, mask, coefficients, HAS_MASTER, HAS_ANCHOR
    )  # fmt: skip
    m = tl.load(exp_avg_ptr, mask, other)
    v = tl.load(exp_avg_sq_ptr, mask, other)
    p, m, v, _ = adamw_update(p, g, m, v, coefficients)
    _store_value(param_ptr, master_ptr, p, mask, key, index, HAS_MASTER, STOCHASTIC)
    tl.store(exp_avg_ptr, m, mask)
    tl.store(exp_avg_sq_ptr, v, mask)


@triton.jit
def _update_coded(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, scale_ptr, master_ptr, anchor_ptr, mask, key, index, coefficients,
    HAS_MASTER: tl.constexpr, HAS_ANCHOR: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """The same for one block of 8-bit moments, with its two scales at `scale_ptr`."""
    p, g = _value_and_gradient(
        param_ptr, grad_ptr, master_ptr, anchor_ptr, mask, coefficients, HAS_MASTER, HAS_ANCHOR
    )  # fmt: skip
    m = decode_exp_avg(tl.load(exp_avg_ptr, mask, 0), tl.load(scale_ptr))
    v = decode_exp_avg_sq(tl.load(exp_avg_sq_ptr, mask, 0), tl.load(scale_ptr + 1))
    p, m, v, root = adamw_update(p, g, m, v, coefficients)
    _store_value(param_ptr, master_ptr, p, mask, key, index, HAS_MASTER, STOCHASTIC)
    scale = block_scale(tl.where(mask, m, 0.0))
    root_scale = block_scale(tl.where(mask, root, 0.0))
    random = moment_bits(key, index)
    tl.store(exp_avg_ptr, encode_exp_avg(m, scale, random), mask)
    tl.store(exp_avg_sq_ptr, encode_exp_avg_sq(root, root_scale, random), mask)
    tl.debug_barrier()  # after it, every thread has read the old scales
    tl.store(scale_ptr, scale)
    tl.store(scale_ptr + 1, root_scale)


@triton.jit
def _bitmap_block(group_ptr, rank_ptr, first, lane, length):
    """(number among the tile's active entries, whether active) of the entries first + lane of a BITMAP tile."""
    # bits past the end are zero, so that only the index needs the bound
    exists = first + lane < length
    group = tl.load(group_ptr + (first >> 6) + (lane >> 6), exists, 0).to(tl.uint64, bitcast=True)
    before = tl.load(rank_ptr + (first >> 6) + (lane >> 6), exists, 0).to(tl.uint16, bitcast=True).to(tl.int32)
    bit = tl.full([], 1, tl.uint64) << (lane & 63).to(tl.uint64)
    below = group & (bit - 1)
    # in 32-bit halves; otherwise LLVM computes the sum, and every address made of it, in 64 bits
    rank = before + popcount(below.to(tl.uint32)) + popcount((below >> 32).to(tl.uint32))
    return rank, (group & bit) != 0


@triton.jit
def _list_block(position_ptr, rank, active, listed):
    """(entry, whether it exists) of the active entries number `rank` of a LIST16 tile, or a FULL one (listed = 0)."""
    position = tl.load(position_ptr + rank, rank < listed, 0).to(tl.uint16, bitcast=True).to(tl.int32)
    return tl.where(listed > 0, position, rank), rank < active


@triton.jit
def _entry_of_rank(group_ptr, rank_ptr, rank, groups):
    """The positions of the active entries number `rank` in a BITMAP tile with that many 64-entry groups."""
    at = tl.zeros_like(rank)
    for log_step in tl.static_range(9, -1, -1):  # the last group with at most `rank` active entries before it
        probe = at + (1 << log_step)
        before = tl.load(rank_ptr + probe, probe < groups, -1).to(tl.uint16, bitcast=True).to(tl.int32)
        at = tl.where((probe < groups) & (before <= rank), probe, at)
    rank -= tl.load(rank_ptr + at).to(tl.uint16, bitcast=True).to(tl.int32)
    group = tl.load(group_ptr + at).to(tl.uint64, bitcast=True)
    lower = popcount(group.to(tl.uint32))
    in_upper = rank >= lower
    word = tl.where(in_upper, (group >> 32).to(tl.uint32), group.to(tl.uint32))
    return 64 * at + tl.where(in_upper, 32, 0) + bit_of_rank(word, tl.where(in_upper, rank - lower, rank))


@triton.jit
def _masked_adamw_kernel(
    prepared_ptr, exp_avg_ptr, exp_avg_sq_ptr, scale_ptr, master_ptr, tile_ptr, group_ptr, rank_ptr, position_ptr,
    coefficient_ptr, clip_ptr, anchor_ptr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, PACKED: tl.constexpr, CODED: tl.constexpr, HAS_MASTER: tl.constexpr,
    HAS_ANCHOR: tl.constexpr, HAS_CLIP: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`_PARTS` programs per tile. group_ptr: bitmaps in groups of 64 bits; rank_ptr: active entries before each."""
    PARAM_SIZE: tl.constexpr = PARAM.primitive_bitwidth // 8
    GRAD_SIZE: tl.constexpr = GRAD.primitive_bitwidth // 8
    part = tl.program_id(0) % _PARTS
    tile_ptr += (tl.program_id(0) // _PARTS).to(tl.int64) * _TILE_COLUMNS
    param = tl.load(tile_ptr + _PARAM)
    prepared_ptr += param * _PREPARED
    number_ptr = prepared_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    param_address = tl.load(prepared_ptr + _PARAM_ADDRESS)
    grad_address = tl.load(prepared_ptr + _GRAD_ADDRESS)
    if (grad_address == 0) | (tl.load(number_ptr + _APPLIES) == 0):
        return
    coefficients = _coefficients(prepared_ptr, coefficient_ptr + param * _COEFFICIENTS, clip_ptr, HAS_CLIP)
    start, length, active, slot, index, encoding = read_tile(tile_ptr)
    param_address += PARAM_SIZE * start
    grad_address += GRAD_SIZE * (slot if PACKED else start)
    key = tile_key(tl.load(number_ptr + _ROUNDING_KEY), start) if STOCHASTIC or CODED else 0
    low = start.to(tl.uint32)  # the lower half of the flat index of the tile's first entry

    done = 0
    if (encoding == _FULL) & (((param_address | grad_address | 4 * slot) & 15) == 0) & (not CODED):
        # Blocks of equal shape get one layout. With another shape, that of vectors does not slow the gathers below.
        VECTOR_BLOCK: tl.constexpr = 2 * BLOCK
        # The division shows the alignment. A hint on the address itself would also hold for its uses below.
        param_ptr = tl.multiple_of((param_address // 16 * 16).to(tl.pointer_type(PARAM)), 16)
        grad_ptr = tl.multiple_of((grad_address // 16 * 16).to(tl.pointer_type(GRAD)), 16)
        done = active // VECTOR_BLOCK * VECTOR_BLOCK
        first = part * VECTOR_BLOCK
        while first < done:
            entry = tl.multiple_of(first, VECTOR_BLOCK) + tl.arange(0, VECTOR_BLOCK)
            packed = slot // 4 * 4 + entry
            _update(
                param_ptr + entry, grad_ptr + entry, exp_avg_ptr + packed, exp_avg_sq_ptr + packed, master_ptr + packed,
                anchor_ptr + packed, None, key, low + entry.to(tl.uint32), coefficients,
                HAS_MASTER, HAS_ANCHOR, STOCHASTIC,
            )  # fmt: skip
            first += _PARTS * VECTOR_BLOCK

    param_ptr = param_address.to(tl.pointer_type(PARAM))
    grad_ptr = grad_address.to(tl.pointer_type(GRAD))
    exp_avg_ptr += slot
    exp_avg_sq_ptr += slot
    master_ptr += slot
    anchor_ptr += slot
    first = done + part * BLOCK
    if CODED:
        # a program takes whole blocks of active entries, for every encoding
        scale_ptr += 2 * tl.load(tile_ptr + _FIRST_BLOCK)
        listed = tl.where(encoding == _LIST16, active, 0)
        group_ptr += tl.where(encoding == _BITMAP, index // 2, 0)
        rank_ptr += tl.where(encoding == _BITMAP, index // 2, 0)
        first = part * _STATE_BLOCK
        while first < active:
            rank = first + tl.arange(0, _STATE_BLOCK)
            if encoding == _BITMAP:
                entry = _entry_of_rank(group_ptr, rank_ptr, tl.minimum(rank, active - 1), (length + 63) // 64)
            else:
                entry, _ = _list_block(position_ptr + index, rank, active, listed)
            _update_coded(
                param_ptr + entry, grad_ptr + (rank if PACKED else entry), exp_avg_ptr + rank, exp_avg_sq_ptr + rank,
                scale_ptr + 2 * (first // _STATE_BLOCK), master_ptr + rank, anchor_ptr + rank, rank < active,
                key, low + entry.to(tl.uint32), coefficients, HAS_MASTER, HAS_ANCHOR, STOCHASTIC,
            )  # fmt: skip
            first += _PARTS * _STATE_BLOCK
    elif encoding == _BITMAP:
        group_ptr += index // 2
        rank_ptr += index // 2
        while first < length:
            entry = first + tl.arange(0, BLOCK)
            rank, mask = _bitmap_block(group_ptr, rank_ptr, first, tl.arange(0, BLOCK), length)
            _update(
                param_ptr + entry, grad_ptr + (rank if PACKED else entry), exp_avg_ptr + rank, exp_avg_sq_ptr + rank,
                master_ptr + rank, anchor_ptr + rank, mask, key, low + entry.to(tl.uint32), coefficients,
                HAS_MASTER, HAS_ANCHOR, STOCHASTIC,
            )  # fmt: skip
            first += _PARTS * BLOCK
    else:
        position_ptr += index
        listed = tl.where(encoding == _LIST16, active, 0)
        while first < active:
            rank = first + tl.arange(0, BLOCK)
            entry, mask = _list_block(position_ptr, rank, active, listed)
            _update(
                param_ptr + entry, grad_ptr + (rank if PACKED else entry), exp_avg_ptr + rank, exp_avg_sq_ptr + rank,
                master_ptr + rank, anchor_ptr + rank, mask, key, low + entry.to(tl.uint32), coefficients,
                HAS_MASTER, HAS_ANCHOR, STOCHASTIC,
            )  # fmt: skip
            first += _PARTS * BLOCK


@triton.jit
def _square(
    grad_ptr, param_ptr, master_ptr, anchor_ptr, mask, grad_factor, pull,
    HAS_MASTER: tl.constexpr, HAS_ANCHOR: tl.constexpr,
):  # fmt: skip
    """float64 squares of the effective gradients. Lanes outside `mask` read zeros and give 0."""
    g = tl.load(grad_ptr, mask, 0.0).to(tl.float32) * grad_factor
    if HAS_ANCHOR:
        p = tl.load(master_ptr, mask, 0.0) if HAS_MASTER else tl.load(param_ptr, mask, 0.0).to(tl.float32)
        g = _pull(g, p, tl.load(anchor_ptr, mask, 0.0), pull)
    g = g.to(tl.float64)
    return g * g


@triton.jit
def _sum_of(values_ptr, count):
    """The sum of float64 values, always in the same order."""
    LANES: tl.constexpr = 256
    sums = tl.zeros([LANES], tl.float64)
    first = 0
    while first < count:
        lane = first + tl.arange(0, LANES)
        sums += tl.load(values_ptr + lane, lane < count, 0.0, cache_modifier=".cg")
        first += LANES
    return tl.sum(sums)


@triton.jit
def _add_total(sum_ptr, first_tile, tiles, max_norm_bits, arrived_ptr, grad_norm_ptr, clip_ptr):
    """The last program of a group of tiles adds up its sums, and the last program of all adds up the groups."""
    group = (first_tile + tl.program_id(0) // _PARTS) // _NORM_GROUP
    in_group = _PARTS * tl.minimum(tiles - group * _NORM_GROUP, _NORM_GROUP)
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr + 1 + group, 1) == in_group - 1:
        tl.store(arrived_ptr + 1 + group, 0)
        tl.store(sum_ptr + tiles * _PARTS + group, _sum_of(sum_ptr + group * _NORM_GROUP * _PARTS, in_group))
        tl.debug_barrier()
        groups = tl.cdiv(tiles, _NORM_GROUP)
        if tl.atomic_add(arrived_ptr, 1) == groups - 1:
            tl.store(arrived_ptr, 0)
            norm = tl.sqrt(_sum_of(sum_ptr + tiles * _PARTS, groups))
            tl.store(grad_norm_ptr, norm)
            clip = max_norm_bits.to(tl.int64).to(tl.float64, bitcast=True) / (norm + 1e-6)
            tl.store(clip_ptr, tl.where(clip > 1.0, 1.0, clip))  # NaN stays


@triton.jit(do_not_specialize=["first_tile", "tiles", "max_norm_bits"])
def _masked_sum_squares_kernel(
    prepared_ptr, master_ptr, tile_ptr, group_ptr, rank_ptr, position_ptr, anchor_ptr, sum_ptr,
    first_tile, tiles, max_norm_bits, arrived_ptr, grad_norm_ptr, clip_ptr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, PACKED: tl.constexpr, HAS_MASTER: tl.constexpr, HAS_ANCHOR: tl.constexpr,
    TOTAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the sum of every part of every tile, float64 [T, _PARTS]. With TOTAL, the last programs add these up."""
    PARAM_SIZE: tl.constexpr = PARAM.primitive_bitwidth // 8
    GRAD_SIZE: tl.constexpr = GRAD.primitive_bitwidth // 8
    tile_ptr += (tl.program_id(0) // _PARTS).to(tl.int64) * _TILE_COLUMNS
    param = tl.load(tile_ptr + _PARAM)
    prepared_ptr += param * _PREPARED
    param_address = tl.load(prepared_ptr + _PARAM_ADDRESS)
    grad_address = tl.load(prepared_ptr + _GRAD_ADDRESS)
    value_ptr = prepared_ptr.to(tl.pointer_type(tl.float32), bitcast=True)
    grad_factor = tl.load(value_ptr)
    pull = tl.load(value_ptr + 8)
    start, length, active, slot, index, encoding = read_tile(tile_ptr)
    anchor_ptr += slot
    master_ptr += slot
    param_ptr = (param_address + PARAM_SIZE * start).to(tl.pointer_type(PARAM))
    grad_ptr = (grad_address + GRAD_SIZE * (slot if PACKED else start)).to(tl.pointer_type(GRAD))

    total = tl.zeros([BLOCK], tl.float64)
    if grad_address != 0:
        first = tl.program_id(0) % _PARTS * BLOCK
        if encoding == _BITMAP:
            group_ptr += index // 2
            rank_ptr += index // 2
            while first < length:
                entry = first + tl.arange(0, BLOCK)
                rank, mask = _bitmap_block(group_ptr, rank_ptr, first, tl.arange(0, BLOCK), length)
                total += _square(
                    grad_ptr + (rank if PACKED else entry), param_ptr + entry, master_ptr + rank, anchor_ptr + rank,
                    mask, grad_factor, pull, HAS_MASTER, HAS_ANCHOR,
                )  # fmt: skip
                first += _PARTS * BLOCK
        else:
            position_ptr += index
            listed = tl.where(encoding == _LIST16, active, 0)
            while first < active:
                rank = first + tl.arange(0, BLOCK)
                entry, mask = _list_block(position_ptr, rank, active, listed)
                total += _square(
                    grad_ptr + (rank if PACKED else entry), param_ptr + entry, master_ptr + rank, anchor_ptr + rank,
                    mask, grad_factor, pull, HAS_MASTER, HAS_ANCHOR,
                )  # fmt: skip
                first += _PARTS * BLOCK
    tl.store(sum_ptr + first_tile * _PARTS + tl.program_id(0), tl.sum(total))
    if TOTAL:
        _add_total(sum_ptr, first_tile, tiles, max_norm_bits, arrived_ptr, grad_norm_ptr, clip_ptr)


@triton.jit(do_not_specialize=["single_address"])
def _masked_pack_kernel(
    address_ptr, single_address, out_ptr, tile_ptr, group_ptr, rank_ptr, position_ptr,
    GRAD: tl.constexpr, SINGLE: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    GRAD_SIZE: tl.constexpr = GRAD.primitive_bitwidth // 8
    tile_ptr += (tl.program_id(0) // _PARTS).to(tl.int64) * _TILE_COLUMNS
    grad_address = single_address if SINGLE else tl.load(address_ptr + tl.load(tile_ptr + _PARAM))
    if grad_address == 0:
        return
    start, length, active, slot, index, encoding = read_tile(tile_ptr)
    out_ptr += slot
    grad_ptr = (grad_address + GRAD_SIZE * start).to(tl.pointer_type(GRAD))
    first = tl.program_id(0) % _PARTS * BLOCK
    if encoding == _BITMAP:
        while first < length:
            rank, mask = _bitmap_block(
                group_ptr + index // 2, rank_ptr + index // 2, first, tl.arange(0, BLOCK), length
            )  # fmt: skip
            values = tl.load(grad_ptr + first + tl.arange(0, BLOCK), mask, 0.0).to(tl.float32)
            if ACCUMULATE:
                values += tl.load(out_ptr + rank, mask, 0.0)
            tl.store(out_ptr + rank, values, mask)
            first += _PARTS * BLOCK
    else:
        listed = tl.where(encoding == _LIST16, active, 0)
        while first < active:
            rank = first + tl.arange(0, BLOCK)
            entry, mask = _list_block(position_ptr + index, rank, active, listed)
            values = tl.load(grad_ptr + entry, mask, 0.0).to(tl.float32)
            if ACCUMULATE:
                values += tl.load(out_ptr + rank, mask, 0.0)
            tl.store(out_ptr + rank, values, mask)
            first += _PARTS * BLOCK


def _type_of(tensors: Any) -> tl.dtype:
    """The Triton type of the tensors that are not None."""
    return next((TYPES[dtype] for dtype in tensors.dtypes), tl.float32)


def prepare_step(step: Any, addresses: Tensor) -> None:
    """Counts a step, computes its coefficients, and writes the rows that the other kernels read."""
    _prepare(step.coefficients, step.prepared, addresses, step)


def prepared_of(norm: Any, addresses: Tensor) -> Tensor:
    """The rows for coefficients that are computed already."""
    prepared = torch.empty(len(norm.params), _PREPARED.value, dtype=torch.int64, device=norm.tiles.device)
    _prepare(norm.coefficients, prepared, addresses, None)
    return prepared


def _prepare(coefficients: Tensor, prepared: Tensor, addresses: Tensor, step: Any) -> None:
    nothing = coefficients.new_empty(0)
    tensors = [nothing] * 8
    if step is not None:
        tensors = [step.hyper, step.group, step.numbers, step.has_grad, step.steps]
        scalars = (step.found_inf, step.grad_scale, step.pull_factor)
        tensors += [nothing if scalar is None else scalar for scalar in scalars]
    launch(
        _prepare_kernel,
        triton.cdiv(len(prepared), _PREPARED_AT_ONCE),
        coefficients,
        addresses,
        coefficients,
        prepared,
        len(prepared),
        *tensors,
        0 if step is None else step.seed,
        IS_STEP=step is not None,
        COUNTS=step is not None and step.counts,
        HAS_FOUND_INF=step is not None and step.found_inf is not None,
        HAS_GRAD_SCALE=step is not None and step.grad_scale is not None,
        HAS_PULL_FACTOR=step is not None and step.pull_factor is not None,
        BLOCK=_PREPARED_AT_ONCE,
        num_warps=_PREPARED_AT_ONCE // 32,
    )


def launch_per_tile(kernel: Any, table: Any, **arguments: Any) -> None:
    """Launches `_PARTS` programs for each tile. A table with a bitmap needs its directory (`TileTable.with_ranks`)."""
    launch(
        kernel,
        len(table.tiles) * _PARTS.value,
        table.tiles,
        tile_ptr=table.tiles,
        group_ptr=table.words.view(torch.int64),
        rank_ptr=table.ranks,
        position_ptr=table.positions,
        **arguments,
        BLOCK=_BLOCK,
        num_warps=_NUM_WARPS,
    )


def _of_entries(norm: Any) -> dict[str, Any]:
    """Arguments that an update and a norm share. An absent tensor is an empty one, whose pointer no kernel follows."""
    nothing = norm.coefficients.new_empty(0, dtype=torch.float32)
    return {
        "master_ptr": nothing if norm.master is None else norm.master,
        "anchor_ptr": nothing if norm.anchor is None else norm.anchor,
        "PARAM": _type_of(norm.params),
        "GRAD": _type_of(norm.grads),
        "PACKED": norm.packed,
        "HAS_MASTER": norm.master is not None,
        "HAS_ANCHOR": norm.anchor is not None,
    }


def masked_adamw_(update: Any, prepared: Tensor) -> None:
    """One launch over all tiles."""
    launch_per_tile(
        _masked_adamw_kernel,
        update,
        **_of_entries(update),
        prepared_ptr=prepared,
        exp_avg_ptr=update.exp_avg,
        exp_avg_sq_ptr=update.exp_avg_sq,
        scale_ptr=update.exp_avg if update.scales is None else update.scales,
        coefficient_ptr=update.coefficients,
        clip_ptr=update.coefficients if update.clip is None else update.clip,
        CODED=update.scales is not None,
        HAS_CLIP=update.clip is not None,
        STOCHASTIC=update.stochastic,
    )


def masked_sum_squares(norm: Any, prepared: Tensor) -> Tensor:
    """float64 [T]: the sum of squares of each tile. Its order depends only on the tile."""
    sums = torch.empty(len(norm.tiles), _PARTS.value, dtype=torch.float64, device=norm.tiles.device)
    _sum_squares(norm, prepared, sums, 0, 0, 0, sums, sums, sums, TOTAL=False)
    return sums.sum(1)


def gradient_norm(norm: Any, prepared: Tensor, total: Any) -> None:
    """After the last launch of a step: the norm of the gradients, and the factor that clips them."""
    (bits,) = struct.unpack("q", struct.pack("d", total.max_norm))  # Triton would turn a number into a float32
    numbers = total.first, total.tiles, bits
    _sum_squares(norm, prepared, total.sums, *numbers, total.arrived, total.grad_norm, total.clip, TOTAL=True)


def _sum_squares(norm: Any, prepared: Tensor, *sums: Any, TOTAL: bool) -> None:
    names = ("sum_ptr", "first_tile", "tiles", "max_norm_bits", "arrived_ptr", "grad_norm_ptr", "clip_ptr")
    arguments = {**_of_entries(norm), **dict(zip(names, sums, strict=True))}
    launch_per_tile(_masked_sum_squares_kernel, norm, prepared_ptr=prepared, **arguments, TOTAL=TOTAL)


def masked_pack_(pack: Any, addresses: Tensor | int) -> None:
    """One launch over the tiles of all gradients, by a table of addresses or the address of a single one."""
    single = isinstance(addresses, int)
    launch_per_tile(
        _masked_pack_kernel,
        pack,
        address_ptr=pack.tiles if single else addresses,
        single_address=addresses if single else 0,
        out_ptr=pack.out,
        GRAD=_type_of(pack.grads),
        SINGLE=single,
        ACCUMULATE=pack.accumulate,
    )
