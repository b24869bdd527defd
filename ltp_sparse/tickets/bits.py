"""Bitmaps in int32 words and positions in 16 bits: the packing of index sets, in plain torch on any device.

int16 tensors hold uint16 bits, since torch supports few operations in uint16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ltp_sparse.weights.tensors import TILE

WORDS_PER_TILE = TILE // 32

position_listers: dict[str, Callable[[Tensor, Tensor], bool]] = {}
"""Type of a device -> function (bitmap, int16 [k]) that writes the positions of the k set bits of the bitmap.

It returns False if it wrote nothing, and torch does the work, which takes a byte per bit. `ltp_sparse.backends` adds
its functions.
"""


def bitmap_words(n: int) -> int:
    """int32 words of a bitmap of `n` entries: an even number, so that no 64-bit group spans two parameters."""
    return 2 * -(-n // 64)


def tiles_of(n: int) -> int:
    """Tiles of a tensor of `n` entries."""
    return -(-n // TILE)


def popcount(words: Tensor) -> Tensor:
    """Number of set bits of every int32 word, as int32."""
    x = words - ((words >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@cache
def _bits_of_bytes(device: torch.device) -> Tensor:
    """int64 [256]: the 8 bits of every byte as 8 bytes of 0 or 1, lowest bit first."""
    value = torch.arange(256, dtype=torch.uint8, device="cpu")
    bits = (value[:, None] >> torch.arange(8, dtype=torch.uint8, device="cpu")) & 1
    return bits.contiguous().view(torch.int64).view(256).to(device)


def pack_bits(mask: Tensor) -> Tensor:
    """bool [m] -> int32 [bitmap_words(m)], lowest entry in the lowest bit."""
    padded = torch.zeros(32 * bitmap_words(mask.numel()), dtype=torch.bool, device=mask.device)
    padded[: mask.numel()] = mask
    # eight bytes of 0 or 1 at a time: the product moves byte i to bit 56 + i
    packed = (padded.view(torch.int64) * 0x0102040810204080) >> 56
    return packed.to(torch.uint8).view(torch.int32)


def unpack_bits(words: Tensor) -> Tensor:
    """int32 [w] -> bool [32 w]."""
    return _bits_of_bytes(words.device)[words.view(torch.uint8).to(torch.int64)].view(torch.bool)


def shifted_words(words: Tensor, by: int) -> Tensor:
    """int32 [w] -> int32 [w + 1], all bits shifted up by `by` positions, 0 <= by < 32."""
    shifted = torch.cat([words << by, words.new_zeros(1)])
    if by:
        shifted[1:] |= (words >> (32 - by)) & ((1 << by) - 1)
    return shifted


def to_uint16_bits(numbers: Tensor) -> Tensor:
    """The lowest 16 bits of int64 numbers. For entries of a parameter, these are the positions in their tiles."""
    return numbers.contiguous().view(torch.int16)[::4].contiguous()  # little-endian, as bitmaps are


def from_uint16_bits(positions: Tensor) -> Tensor:
    """int16 tensors with uint16 bits -> int64, 0 to 65,535."""
    return positions.to(torch.int64) & 0xFFFF
