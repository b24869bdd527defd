"""Digests of tiles: the 128-bit XXH3 of their bytes, filled up with zeros to whole blocks of 1,024.

`ltp_sparse/weights/digests.py` says what digests are for. A block is 16 stripes of eight words of 64 bits. The sums
that its stripes add to the eight lanes do not depend on the lanes, so that a program reads several blocks together and
then mixes them in one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

TILE = 65_536

_BLOCK = tl.constexpr(1024)  # bytes
_WORDS = tl.constexpr(128)  # words of a block
_BLOCKS = 4  # blocks that a program reads together
_NUM_WARPS = 1  # a single warp exchanges lanes without barriers

_PRIME32_1 = tl.constexpr(0x9E3779B1)
_PRIME64_1 = tl.constexpr(0x9E3779B185EBCA87)
_PRIME64_2 = tl.constexpr(0xC2B2AE3D27D4EB4F)
_ONES = tl.constexpr(0xFFFFFFFFFFFFFFFF)
_AVALANCHE = tl.constexpr(0x165667919E3779F9)
_START = (
    *(0xC2B2AE3D, 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9),
    *(0x85EBCA77C2B2AE63, 0x85EBCA77, 0x27D4EB2F165667C5, 0x9E3779B1),
)
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)

# the table of words that `_words` makes
_OF_LAST = tl.constexpr(128)  # the keys of the stripes of the last block, after those of the others
_OF_SCRAMBLING = tl.constexpr(256)
_OF_START = tl.constexpr(264)
_OF_LOW = tl.constexpr(272)
_OF_HIGH = tl.constexpr(280)


@lru_cache
def _words(device: torch.device) -> Tensor:
    """int64 [288]: the words of the secret that the kernel needs, and the first values of the lanes."""
    keys = [8 * (stripe + lane) for stripe in range(16) for lane in range(8)]
    eight = [8 * lane for lane in range(8)]
    last = [*keys[:120], *(121 + at for at in eight)]
    places = ([*keys, *last, *(128 + at for at in eight)], [*(11 + at for at in eight), *(117 + at for at in eight)])
    before, after = ([int.from_bytes(_SECRET[at : at + 8], "little") for at in part] for part in places)
    words = [word - (word >> 63 << 64) for word in (*before, *_START, *after)]
    return torch.tensor(words, dtype=torch.int64, device="cpu").to(device)


@triton.jit
def _load(pointer, mask=None):
    other: tl.constexpr = None if mask is None else 0
    return tl.load(pointer, mask, other).to(tl.uint64, bitcast=True)


@triton.jit
def _swapped(lanes):
    """The lanes [8], with neighbours exchanged."""
    even, odd = tl.split(tl.reshape(lanes, [4, 2]))
    return tl.reshape(tl.join(odd, even), [8])


@triton.jit
def _products(words, keys):
    keyed = words ^ keys
    return (keyed & 0xFFFFFFFF) * (keyed >> 32)


@triton.jit
def _merged(lanes, secret_ptr, start):
    a, b = tl.split(tl.reshape(lanes ^ _load(secret_ptr + tl.arange(0, 8)), [4, 2]))
    mixed = tl.sum((a * b) ^ tl.umulhi(a, b)) + start
    mixed = (mixed ^ (mixed >> 37)) * _AVALANCHE
    return mixed ^ (mixed >> 32)


@triton.jit
def _tile_digests_kernel(row_ptr, secret_ptr, out_ptr, BLOCKS: tl.constexpr):
    """A program for each tile. Its row has the address and the number of bytes."""
    row = row_ptr + 2 * tl.program_id(0)
    address, nbytes = tl.load(row), tl.load(row + 1)
    words_ptr = address.to(tl.pointer_type(tl.int64))
    lane = tl.arange(0, 8)
    stripe = tl.arange(0, 16)[:, None] * 8 + lane[None, :]
    block = tl.arange(0, BLOCKS)
    keys = _load(secret_ptr + stripe)[None, :, :]
    scrambling = _load(secret_ptr + _OF_SCRAMBLING + lane)
    lanes = _load(secret_ptr + _OF_START + lane)

    last = (nbytes - 1) // _BLOCK
    first = tl.full([], 0, tl.int64)
    while first < last:
        place = (first + block)[:, None, None] * _WORDS + stripe[None, :, :]
        words = _load(words_ptr + place, (first + block < last)[:, None, None])
        sums, products = tl.sum(words, 1), tl.sum(_products(words, keys), 1)
        for b in tl.static_range(BLOCKS):
            mine = (block == b)[:, None]
            added = lanes + tl.sum(tl.where(mine, products, 0), 0) + _swapped(tl.sum(tl.where(mine, sums, 0), 0))
            mixed = (added ^ (added >> 47) ^ scrambling) * _PRIME32_1
            lanes = tl.where(first + b < last, mixed, lanes)
        first += BLOCKS

    place = last * _WORDS + stripe
    whole = nbytes // 8
    words = _load(words_ptr + place, place < whole)
    byte = tl.arange(0, 8)
    rest = tl.load(address.to(tl.pointer_type(tl.uint8)) + whole * 8 + byte, byte < nbytes % 8, 0)
    words = tl.where(place == whole, tl.sum(rest.to(tl.uint64) << (byte * 8).to(tl.uint64)), words)
    lanes += tl.sum(_products(words, _load(secret_ptr + _OF_LAST + stripe)), 0) + _swapped(tl.sum(words, 0))

    filled = ((last + 1) * _BLOCK).to(tl.uint64)
    low = _merged(lanes, secret_ptr + _OF_LOW, filled * _PRIME64_1)
    high = _merged(lanes, secret_ptr + _OF_HIGH, (filled * _PRIME64_2) ^ _ONES)
    tl.store(out_ptr + 2 * tl.program_id(0), low.to(tl.int64, bitcast=True))
    tl.store(out_ptr + 2 * tl.program_id(0) + 1, high.to(tl.int64, bitcast=True))


def tile_digests(tensors: Sequence[Tensor], out: Tensor) -> None:
    """The digests of the tiles of tensors, in order, in one launch. Does not wait for the device.

    Args:
        tensors: contiguous tensors of any dtypes, on the device of `out`.
        out: int64 [T, 2]; written, the lower word of each digest first.
    """
    aligned = [t if t.data_ptr() % 8 == 0 else t.clone() for t in tensors]
    rows = [
        [tensor.data_ptr() + start * tensor.itemsize, min(TILE, tensor.numel() - start) * tensor.itemsize]
        for tensor in aligned
        for start in range(0, tensor.numel(), TILE)
    ]
    if not rows:
        return
    table = torch.tensor(rows, dtype=torch.int64, device="cpu").to(out.device, non_blocking=True)
    launch(_tile_digests_kernel, len(rows), out, table, _words(out.device), out, BLOCKS=_BLOCKS, num_warps=_NUM_WARPS)
