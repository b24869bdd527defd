"""Moments in 8 bits, in torch. `csrc/common/quantization.h` is the same for compiled kernels and explains the codes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ltp_sparse.tickets.tile_table import STATE_BLOCK, state_blocks

_FIRST_TOP, _SECOND_TOP = 260144640.0, 4228250624.0
"""Fourth powers of the largest codes, 127 of the first moment and 255 of the root of the second, in float32."""


def _block_scale(values: Tensor) -> Tensor:
    """float32 [B]: the largest value of each block of non-negative values [a].

    The values are compared as bits, where a NaN is above all numbers. The scale is 0 below 2^-90, and NaN if the block
    has a NaN or an infinity.
    """
    bits = pad(values, (0, -values.numel() % STATE_BLOCK)).view(torch.int32).view(-1, STATE_BLOCK).amax(1)
    bits = torch.where(bits >= 0x7F800000, 0x7FC00000, bits)
    return torch.where(bits < (127 - 90) << 23, 0, bits).view(torch.float32)


def _spread(scale: Tensor, count: int) -> Tensor:
    """float32 [count]: the scale of every entry."""
    return scale.float().repeat_interleave(STATE_BLOCK)[:count]


def exact_sqrt(values: Tensor) -> Tensor:
    """The square root, rounded correctly; torch's own in float32 may be off in the last bit."""
    return values.double().sqrt().to(values.dtype)


def _fourth_power(codes: Tensor) -> Tensor:
    square = codes * codes
    return square * square


def _scaled(size: Tensor, scale: Tensor, top: float) -> Tensor:
    """Magnitudes on the scale of fourth powers of codes, at most `top`, which also stands for values not finite."""
    # a number divided by a tensor would be a product with 1 / tensor in torch, which rounds twice
    inverse = torch.where(scale > 0, torch.full_like(scale, top) / scale, 0.0)
    x = size * _spread(inverse, size.numel())
    return torch.where(x < top, x, top)


def _encode(x: Tensor, chance: Tensor | float) -> Tensor:
    """float32 codes: of the two codes around `x`, the upper one where `chance`, in [0, 1], is small enough."""
    code = exact_sqrt(exact_sqrt(x)).floor()
    below, above = _fourth_power(code), _fourth_power(code + 1)
    return torch.where(chance * (above - below) < x - below, code + 1, code)


def quantize(exp_avg: Tensor, exp_avg_sq: Tensor, random: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [a] moments of one tile -> int8 [a] and uint8 [a] codes, float32 [B, 2] scales.

    Args:
        exp_avg: first moments.
        exp_avg_sq: second moments.
        random: int64 [a], 32 random bits per entry (`rounding.moment_bits`). None rounds to nearest, which is right for
            one conversion but not for every step.
    """
    chances: tuple[Tensor | float, Tensor | float] = (0.5, 0.5)
    if random is not None:
        chances = ((random >> 16).float() + 0.5) / 65536, ((random & 0xFFFF).float() + 0.5) / 65536
    size, root = exp_avg.abs(), exact_sqrt(exp_avg_sq)
    scales = torch.stack([_block_scale(size), _block_scale(root)], dim=1)
    first = _encode(_scaled(size, scales[:, 0], _FIRST_TOP), chances[0])
    x = _scaled(root, scales[:, 1], _SECOND_TOP)
    second = _encode(x, chances[1])
    # a second moment above zero gets a code above zero, or the next step would divide by eps alone
    second = torch.where((x > 0) & (second < 1), 1.0, second)
    return torch.where(exp_avg < 0, -first, first).to(torch.int8), second.to(torch.uint8), scales


def quantize_tiles(exp_avg: Tensor, exp_avg_sq: Tensor, active: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize` to nearest over consecutive tiles with these numbers of active entries."""
    pieces = [quantize(m, v) for m, v in zip(exp_avg.split(active), exp_avg_sq.split(active), strict=True)]
    first, second, scales = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return first, second, scales


def dequantize_tiles(
    exp_avg: Tensor, exp_avg_sq: Tensor, scales: Tensor, active: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """`dequantize` over consecutive tiles.

    Args:
        exp_avg, exp_avg_sq: the codes of all tiles, int8 and uint8 [k].
        scales: float32 [blocks, 2]; bfloat16 in older states, whose codes were companded by softsign and square root.
        active: the number of active entries of each tile.

    Returns:
        exp_avg and exp_avg_sq, float32 [k].
    """
    decode = _dequantize_companded if scales.dtype == torch.bfloat16 else dequantize
    blocks = [state_blocks(count) for count in active]
    tiles = zip(exp_avg.split(active), exp_avg_sq.split(active), scales.split(blocks), strict=True)
    first, second = (torch.cat(parts) for parts in zip(*(decode(*tile) for tile in tiles), strict=True))
    return first, second


def dequantize(exp_avg: Tensor, exp_avg_sq: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [a] and uint8 [a] codes of one tile, float32 [B, 2] scales -> float32 [a] moments."""
    codes, count = exp_avg.float(), exp_avg.numel()
    first = _fourth_power(codes) * _spread(scales[:, 0] / _FIRST_TOP, count)
    root = _fourth_power(exp_avg_sq.float()) * _spread(scales[:, 1] / _SECOND_TOP, count)
    return torch.where(codes < 0, -first, first), root * root


def _dequantize_companded(exp_avg: Tensor, exp_avg_sq: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    y, count = exp_avg.float() / 127, exp_avg.numel()
    root = exp_avg_sq.float() / 255 * _spread(scales[:, 1], count)
    return y / (2 - y.abs()) * _spread(scales[:, 0], count), root * root
