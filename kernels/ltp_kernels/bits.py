"""Bit arithmetic that the kernels share."""

import triton
import triton.language as tl


@triton.jit
def popcount(word):
    """int32 number of set bits of uint32 words; compiles to POPC."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)
