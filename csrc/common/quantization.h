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

// (random16 + 1/2) / 65536: bits behind the point of a number from 128 on, without a conversion.
LTP_HD float chance_of(uint32_t random16) { return float_from_bits(0x43000000 | random16) - (128.0f - 0x1p-17f); }

// A magnitude x to encode: 0 <= x <= 255^4.
struct Magnitude {
    float x, chance;

    // |value| * inverse, at most LEVELS^4, which also stands for values that are not finite; their block is NaN anyway.
    // It is a minimum of bits, since compilers turn a comparison of floats with a constant into a branch and do not
    // vectorise.
    template <int LEVELS>
    static LTP_HD Magnitude of(float value, float inverse, uint32_t random16) {
        const uint32_t bits = bits_of_float(fabsf(value) * inverse);
        const uint32_t most = bits_of_float(fourth_power(float(LEVELS)));
        return {float_from_bits(bits < most ? bits : most), chance_of(random16)};
    }

    // The code below or above x, chosen so that the mean is x. whole: the whole part of the fourth root of x.
    LTP_HD float code(float whole) const {
        const float below = fourth_power(whole), above = fourth_power(whole + 1.0f);
        return whole + float(chance * (above - below) < x - below);
    }

    LTP_HD float whole_root() const { return float(int(sqrtf(sqrtf(x)))); }

    // Whether a whole part that is one too small or too large, since two roots with a relative error of 2^-23 are on
    // the other side of a whole number n, gives the same code. Then x differs from n^4 by less than 2^-14 of the way to
    // the next code, and the code is n but for the first and last chances.
    LTP_HD bool forgives() const { return fabsf(chance - 0.5f) < 0.5f - 0x1p-14f; }
};

// exp_avg -> -127 .. 127
LTP_HD int8_t first_code(float exp_avg, float code) { return int8_t(int(exp_avg < 0.0f ? -code : code)); }

LTP_HD int8_t encode_exp_avg(float value, float inverse, uint32_t random) {
    const Magnitude size = Magnitude::of<kFirstLevels>(value, inverse, random >> 16);
    return first_code(value, size.code(size.whole_root()));
}

LTP_HD float decode_exp_avg(float code, float scale) {
    const float square = code * fabsf(code);
    return square * fabsf(square) * (scale / fourth_power(float(kFirstLevels)));
}

// sqrt(exp_avg_sq) -> 0 .. 255. A root above zero gets a code above zero, or the next step would divide by eps alone.
LTP_HD uint8_t second_code(const Magnitude& root, float code) {
    const uint32_t bits = bits_of_float(code), least = bits_of_float(float(root.x > 0.0f));
    return uint8_t(int(float_from_bits(bits > least ? bits : least)));
}

LTP_HD uint8_t encode_exp_avg_sq(float root, float inverse, uint32_t random) {
    const Magnitude size = Magnitude::of<kSecondLevels>(root, inverse, random & 0xFFFF);
    return second_code(size, size.code(size.whole_root()));
}

LTP_HD float decode_exp_avg_sq(float code, float scale) {
    const float root = fourth_power(code) * (scale / fourth_power(float(kSecondLevels)));
    return root * root;
}

// The codes of N entries, from a square root with a relative error of at most 2^-23.
template <int N, class Approximate>
LTP_HD void encode_moments(const float (&exp_avg)[N], const float (&root)[N], float first_inverse, float second_inverse,
                           const uint32_t (&random)[N], int8_t (&first)[N], uint8_t (&second)[N],
                           Approximate approximate) {
    Magnitude a[N], b[N];
    float of_a[N], of_b[N];
    bool is_forgiven = true;
    for (int j = 0; j < N; ++j) {
        a[j] = Magnitude::of<kFirstLevels>(exp_avg[j], first_inverse, random[j] >> 16);
        b[j] = Magnitude::of<kSecondLevels>(root[j], second_inverse, random[j] & 0xFFFF);
        of_a[j] = truncf(approximate(approximate(a[j].x)));
        of_b[j] = truncf(approximate(approximate(b[j].x)));
        is_forgiven = is_forgiven & a[j].forgives() & b[j].forgives();
    }
    if (__builtin_expect(!is_forgiven, 0)) {
        for (int j = 0; j < N; ++j) {
            of_a[j] = a[j].whole_root();
            of_b[j] = b[j].whole_root();
        }
    }
    for (int j = 0; j < N; ++j) {
        first[j] = first_code(exp_avg[j], a[j].code(of_a[j]));
        second[j] = second_code(b[j], b[j].code(of_b[j]));
    }
}

}  // namespace ltp
