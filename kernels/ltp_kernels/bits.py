"""Bit arithmetic for several kernels."""

import triton
import triton.language as tl


@triton.jit
def popcount(word):
    """int32: the number of set bits of uint32 words. It compiles to POPC."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def bit_of_rank(word, rank):
    """The position, 0 to 31, of the set bit of a uint32 word with `rank` set bits below it; rank < popcount(word)."""
    position = tl.zeros_like(rank)
    for log_width in tl.static_range(4, -1, -1):
        width = 1 << log_width
        lower = popcount(word & ((1 << width) - 1))
        skip = rank >= lower
        rank = tl.where(skip, rank - lower, rank)
        position = tl.where(skip, position + width, position)
        word = tl.where(skip, word >> width, word)
    return position
