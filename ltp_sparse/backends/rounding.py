"""The random bits of stochastic rounding, in torch. `csrc/common/rounding.h` is the same for compiled kernels.

The random bits of an entry depend only on (seed, step, parameter, flat index), so that encoding, tiling, backend and
device do not change a result. Words of 32 bits are kept in int64 tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ltp_sparse.tickets.bits import TILE

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def mix32(x: Tensor) -> Tensor:
    """A bijection of 32-bit words: one changed bit flips every other one in half of all cases.

    It is `lowbias32` by C. Wellons (hash-prospector).
    """
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def rounding_keys(seed: int, steps: Tensor, numbers: Tensor) -> Tensor:
    """float64 [P]: a 32-bit key per parameter, for the `coefficients` of an update. Does not wait for the device.

    Args:
        seed: seed of the run, 0 <= seed < 2^63.
        steps: [P], steps taken, this one included.
        numbers: int64 [P], a different number for each parameter.
    """
    step = steps.to(torch.int64)
    key = mix32(torch.full_like(step, seed & _MASK))
    for word in (torch.full_like(step, seed >> 32), step & _MASK, numbers):
        key = mix32((key + word * _GOLDEN) & _MASK)
    return key.to(torch.float64)


def tiles_have_keys(start: int, n: int) -> bool:
    """Whether each tile of a shard has one key, as kernels expect: its indices have the same upper 32 bits.

    Args:
        start: flat index of the shard's first entry in the whole parameter.
        n: entries of the shard.
    """
    return start % TILE == 0 or start >> 32 == (start + n - 1) >> 32


def _tile_key(key: Tensor, indices: Tensor) -> Tensor:
    return mix32((key.to(torch.int64) + (indices >> 32) * _GOLDEN) & _MASK)


def random16(key: Tensor, indices: Tensor) -> Tensor:
    """int64: 16 random bits per flat index, for weights. The key is one of `rounding_keys`, with 0 dimensions."""
    return mix32(_tile_key(key, indices) ^ (indices & _MASK)) >> 16


def moment_bits(key: Tensor, indices: Tensor) -> Tensor:
    """int64: 32 random bits per flat index for 8-bit moments, independent of those for weights."""
    return mix32(mix32((_tile_key(key, indices) + _GOLDEN) & _MASK) ^ (indices & _MASK))


def round_stochastically(values: Tensor, random16: Tensor) -> Tensor:
    """float32 -> bfloat16, rounded up or down at random so that the mean is exact. Values not finite stay so."""
    bits = values.view(torch.int32).to(torch.int64) & _MASK
    rounded = ((bits + random16) & _MASK) >> 16
    rounded = torch.where(rounded >= 0x8000, rounded - 0x10000, rounded).to(torch.int16).view(torch.bfloat16)
    return torch.where(values.isfinite(), rounded, values.to(torch.bfloat16))
