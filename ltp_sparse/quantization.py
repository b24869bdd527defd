"""Moments in 8 bits, in torch; `csrc/common/quantization.h` is the same for the compiled kernels.

Codes stand in blocks of 256 consecutive active entries of a tile, with a bfloat16 scale per block and moment. The maps
compand, as in FlashOptim (arXiv 2602.23349): softsign for the first moment, the square root for the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

STATE_BLOCK = 256
"""Active entries of a tile that share scales."""

_ONE_127TH = torch.tensor(1 / 127, dtype=torch.float32, device="cpu").item()  # float32 constants
_ONE_255TH = torch.tensor(1 / 255, dtype=torch.float32, device="cpu").item()


Count = TypeVar("Count", int, Tensor)


def state_blocks(active: Count) -> Count:
    """Blocks of a tile with `active` active entries, or of every tile of a tensor of counts."""
    return (active + STATE_BLOCK - 1) // STATE_BLOCK


def _block_scale(values: Tensor) -> Tensor:
    """bfloat16 [B] of the non-negative values [a]: the largest of each block, rounded up.

    As bits a NaN is above everything. Below 2^-120 the block is zero; with a NaN or an infinity in it, all is NaN.
    """
    bits = pad(values, (0, -values.numel() % STATE_BLOCK)).view(torch.int32).view(-1, STATE_BLOCK).amax(1)
    scale = (bits.to(torch.int64) + 0xFFFF) >> 16
    scale = torch.where(bits >= 0x7F800000, 0x7FC0, scale)
    return torch.where(bits < (127 - 120) << 23, 0, scale).to(torch.int16).view(torch.bfloat16)


def _spread(scale: Tensor, count: int) -> Tensor:
    """float32 [count]: the scale of every entry."""
    return scale.float().repeat_interleave(STATE_BLOCK)[:count]


def _ratio(values: Tensor, scale: Tensor) -> Tensor:
    scale = scale.float()
    inverse = torch.where(scale > 0, 1 / scale, 0.0).repeat_interleave(STATE_BLOCK)[: values.numel()]
    ratio = values * inverse
    return torch.where(ratio.abs() <= 2, ratio, 0.0)  # not finite: 0 times the block's NaN


def exact_sqrt(values: Tensor) -> Tensor:
    """The root rounded as IEEE 754 says; torch's own in float32 may be off by a bit."""
    return values.double().sqrt().to(values.dtype)


def quantize(exp_avg: Tensor, exp_avg_sq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [a] moments of one tile -> int8 [a] and uint8 [a] codes, bfloat16 [B, 2] scales."""
    root = exact_sqrt(exp_avg_sq)
    scales = torch.stack([_block_scale(exp_avg.abs()), _block_scale(root)], dim=1)
    x = _ratio(exp_avg, scales[:, 0])
    first = torch.round(127 * ((x + x) / (1 + x.abs())))
    x = _ratio(root, scales[:, 1])
    # what is not zero stays above zero, or the next step would divide by eps alone
    second = torch.where((x > 0) & (x * 255 < 1), 1.0, torch.round(255 * x))
    return first.to(torch.int8), second.to(torch.uint8), scales


def quantize_tiles(exp_avg: Tensor, exp_avg_sq: Tensor, active: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize` over consecutive tiles with these numbers of active entries."""
    pieces = [quantize(m, v) for m, v in zip(exp_avg.split(active), exp_avg_sq.split(active), strict=True)]
    first, second, scales = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return first, second, scales


def dequantize_tiles(
    exp_avg: Tensor, exp_avg_sq: Tensor, scales: Tensor, active: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """`dequantize` over consecutive tiles with these numbers of active entries."""
    blocks = [state_blocks(count) for count in active]
    tiles = zip(exp_avg.split(active), exp_avg_sq.split(active), scales.split(blocks), strict=True)
    first, second = (torch.cat(parts) for parts in zip(*(dequantize(*tile) for tile in tiles), strict=True))
    return first, second


def dequantize(exp_avg: Tensor, exp_avg_sq: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [a] and uint8 [a] codes of one tile, bfloat16 [B, 2] scales -> float32 [a] moments."""
    y = exp_avg.float() * _ONE_127TH
    first = y / (2 - y.abs()) * _spread(scales[:, 0], y.numel())
    root = exp_avg_sq.float() * _spread((scales[:, 1].float() * _ONE_255TH), y.numel())
    return first, root * root
