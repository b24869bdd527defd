// Moments in 8 bits. Blocks of 256 consecutive active entries of a tile have a float32 scale for each moment, the
// largest magnitude of the block. Code c of L stands for (c / L)^4 of the scale: steps are fine near the scale (4 / L),
// and values far below it still have a code (down to L^-4). Of the second moment the root is stored.
//
// A value is rounded at random to one of the two codes around it, with the probability that makes the mean exact.
// Rounded to nearest, a moment that changes by less than half a code per step, as with beta2 = 0.999, would never
// change. All is computed in float32, in exactly this order.
#pragma once

#include <math.h>

#include "dtypes.h"

namespace ltp {

constexpr int kStateBlock = 256;  // active entries of a tile that share scales

constexpr int kFirstLevels = 127, kSecondLevels = 255;  // the largest codes

LTP_HD float fourth_power(float code) {
    const float square = code * code;
    return square * square;
}

// The scale of a block whose largest magnitude is `largest`, compared as bits, where a NaN is above all numbers. Below
// 2^-90 the whole block becomes zero. With a NaN or an infinity in it, the whole block becomes NaN and stays so.
LTP_HD float block_scale(float largest) {
    const uint32_t bits = bits_of_float(largest) & 0x7FFFFFFF;
    if (bits >= 0x7F800000) return float_from_bits(0x7FC00000);
    return bits < uint32_t(127 - 90) << 23 ? 0.0f : largest;
}

// The factor of a value before it is encoded, after which code c stands for c^4.
template <int LEVELS>
LTP_HD float inverse_scale(float scale) {
    return scale > 0.0f ? fourth_power(float(LEVELS)) / scale : 0.0f;
}

// The whole part of sqrtf(sqrtf(x)), for 0 <= x <= 255^4, from an approximate square root with a relative error of at
// most 2^-23. Two approximate roots differ from two exact ones by less than 2^-13, which matters only near a whole
// number.
template <class Approximate>
LTP_HD float whole_fourth_root(float x, Approximate approximate) {
    const float root = approximate(approximate(x)), whole = truncf(root);
    const bool is_sure = fabsf(root - whole - 0.5f) < 0.5f - 1.0f / 4096.0f;
    return __builtin_expect(is_sure, 1) ? whole : float(int(sqrtf(sqrtf(x))));
}

LTP_HD float whole_fourth_root(float x) {
#if defined(__CUDA_ARCH__)
    return whole_fourth_root(x, [](float square) {
        float root;
        asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(square));
        return root;
    });
#else
    return float(int(sqrtf(sqrtf(x))));
#endif
}

// The code below or above x >= 0, chosen by 16 random bits so that the mean is x.
LTP_HD float encode_magnitude(float x, uint32_t random16) {
    const float code = whole_fourth_root(x);
    const float below = fourth_power(code), above = fourth_power(code + 1.0f);
    const float chance = (float(int(random16)) + 0.5f) * (1.0f / 65536.0f);
    return code + float(chance * (above - below) < x - below);
}

// |value| * inverse, at most LEVELS^4, which also stands for values that are not finite; their block is NaN anyway. It
// is a minimum of bits, since compilers turn a comparison of floats with a constant into a branch and do not vectorise.
template <int LEVELS>
LTP_HD float scaled_magnitude(float value, float inverse) {
    const int32_t bits = int32_t(bits_of_float(value * inverse) & 0x7FFFFFFF);
    const int32_t most = int32_t(bits_of_float(fourth_power(float(LEVELS))));
    return float_from_bits(uint32_t(bits < most ? bits : most));
}

// exp_avg -> -127 .. 127
LTP_HD int8_t encode_exp_avg(float value, float inverse, uint32_t random) {
    const float x = scaled_magnitude<kFirstLevels>(value, inverse);
    const float code = encode_magnitude(x, random >> 16);
    return int8_t(int(value < 0.0f ? -code : code));
}

LTP_HD float decode_exp_avg(int8_t code, float scale) {
    const float value = fourth_power(float(code)) * (scale / fourth_power(float(kFirstLevels)));
    return code < 0 ? -value : value;
}

// sqrt(exp_avg_sq) -> 0 .. 255. A root above zero gets a code above zero, or the next step would divide by eps alone.
LTP_HD uint8_t encode_exp_avg_sq(float root, float inverse, uint32_t random) {
    const float x = scaled_magnitude<kSecondLevels>(root, inverse);
    const int code = int(encode_magnitude(x, random & 0xFFFF)), least = int(x > 0.0f);
    return uint8_t(code > least ? code : least);
}

LTP_HD float decode_exp_avg_sq(uint8_t code, float scale) {
    const float root = fourth_power(float(code)) * (scale / fourth_power(float(kSecondLevels)));
    return root * root;
}

}  // namespace ltp
