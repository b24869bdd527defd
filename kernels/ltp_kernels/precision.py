"""Stochastic rounding and 8-bit moments, as in `csrc/common/rounding.h` and `csrc/common/quantization.h`."""

import os

import torch
import triton
import triton.language as tl

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# The interpreter of Triton 3.6 truncates to bfloat16, where compiled code rounds to nearest.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def round_to(value, TYPE: tl.constexpr):
    """float32 -> TYPE, rounded to nearest, ties to even."""
    if _INTERPRETED and TYPE == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return tl.where(is_nan, 0x7FC0, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(TYPE)


@triton.jit
def _mix32(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def rounding_key(seed, step, number):
    """uint32 keys for one step of some parameters; all arguments are int64."""
    key = _mix32(tl.full(step.shape, 0, tl.uint32) + seed.to(tl.int64).to(tl.uint32))
    key = _mix32(key + (seed.to(tl.int64) >> 32).to(tl.uint32) * 0x9E3779B9)
    key = _mix32(key + step.to(tl.uint32) * 0x9E3779B9)
    return _mix32(key + number.to(tl.uint32) * 0x9E3779B9)


@triton.jit
def tile_key(rounding_key, start):
    """uint32 key of the tile that starts at int64 `start`, from the int32 key of the parameter's step."""
    upper = (start >> 32).to(tl.uint32)
    return _mix32(rounding_key.to(tl.uint32, bitcast=True) + upper * 0x9E3779B9)


@triton.jit
def round_stochastically(value, key, index):
    """float32 -> bfloat16 with the random bits of the entries `index`, the lower 32 bits of their flat indices."""
    bits = value.to(tl.uint32, bitcast=True)
    random = _mix32(key ^ index.to(tl.uint32)) >> 16
    rounded = tl.where(value != value, 0x7FC00000, bits + random) >> 16  # infinity stays: its lower bits are zeros
    return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def moment_bits(tile_key, index):
    """uint32 random bits for the 8-bit moments of the entries `index`, the lower 32 bits of their flat indices."""
    return _mix32(_mix32(tile_key + 0x9E3779B9) ^ index.to(tl.uint32))


@triton.jit
def block_scale(values):
    """float32 scalar: the scale of a block of values, its largest magnitude, compared as bits. See quantization.h."""
    largest = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
    scale = tl.where(largest >= 0x7F800000, 0x7FC00000, largest)
    return tl.where(largest < ((127 - 90) << 23), 0, scale).to(tl.float32, bitcast=True)


_FIRST_TOP = tl.constexpr(260144640.0)  # 127^4 in float32
_SECOND_TOP = tl.constexpr(4228250624.0)  # 255^4


@triton.jit
def _fourth_power(code):
    square = code * code
    return square * square


@triton.jit
def _scaled_magnitude(value, scale, TOP: tl.constexpr):
    """Magnitudes on the scale of fourth powers of codes, at most TOP, which also stands for values not finite."""
    x = tl.abs(value * tl.where(scale > 0.0, tl.div_rn(TOP, scale), 0.0))
    return tl.where(x < TOP, x, TOP)


@triton.jit
def _encode_magnitude(x, random):
    """The code below or above `x`, chosen by 16 random bits so that the mean is x."""
    code = tl.sqrt_rn(tl.sqrt_rn(x)).to(tl.int32).to(tl.float32)
    below = _fourth_power(code)
    chance = (random.to(tl.int32).to(tl.float32) + 0.5) * 0.0000152587890625  # 2^-16
    return tl.where(chance * (_fourth_power(code + 1.0) - below) < x - below, code + 1.0, code)


@triton.jit
def encode_exp_avg(value, scale, random):
    code = _encode_magnitude(_scaled_magnitude(value, scale, _FIRST_TOP), random >> 16)
    return tl.where(value < 0.0, -code, code).to(tl.int32).to(tl.int8)


@triton.jit
def decode_exp_avg(code, scale):
    value = _fourth_power(code.to(tl.float32)) * tl.div_rn(scale, _FIRST_TOP)
    return tl.where(code < 0, -value, value)


@triton.jit
def encode_exp_avg_sq(root, scale, random):
    x = _scaled_magnitude(root, scale, _SECOND_TOP)
    code = _encode_magnitude(x, random & 0xFFFF)
    return tl.where((x > 0.0) & (code < 1.0), 1.0, code).to(tl.int32).to(tl.uint8)


@triton.jit
def decode_exp_avg_sq(code, scale):
    root = _fourth_power(code.to(tl.float32)) * tl.div_rn(scale, _SECOND_TOP)
    return root * root
