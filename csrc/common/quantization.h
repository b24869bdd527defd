// Moments in 8 bits: codes in blocks of 256 consecutive active entries of a tile, with a float32 scale per block and
// moment, its largest magnitude. Codes are fourth roots: code c of L stands for (c / L)^4 of the scale, so that steps are
// fine near the scale (4 / L) and values far below it still have a code (down to L^-4). The second moment is kept by its
// root. A value is rounded to one of the two codes around it at random, with the probability that makes the mean exact:
// rounded to nearest, a moment that changes by less than half a code a step, as with beta2 = 0.999, would never change.
// All in float32, in exactly this order.
#pragma once

#include <math.h>

#include "dtypes.h"

namespace ltp {

constexpr int64_t kStateBlock = 256;  // active entries of a tile that share scales

// The scale of a block whose largest magnitude is `largest`. Below 2^-120 the block is zero; with a NaN or an infinity
// in it, all of it is NaN from then on. `largest` is compared as bits, where a NaN is above everything.
LTP_HD float block_scale(float largest) {
    const uint32_t bits = bits_of_float(largest) & 0x7FFFFFFF;
    if (bits >= 0x7F800000) return float_from_bits(0x7FC00000);
    return bits < uint32_t(127 - 120) << 23 ? 0.0f : largest;
}

LTP_HD float inverse_scale(float scale) { return scale > 0.0f ? 1.0f / scale : 0.0f; }

// What the code stands for, over the scale; code: 0 .. LEVELS
template <int LEVELS>
LTP_HD float fourth_power(float code) {
    const float y = code * (1.0f / LEVELS);
    const float square = y * y;
    return square * square;
}

// |value| -> 0 .. LEVELS; random16: 16 random bits
template <int LEVELS>
LTP_HD float encode_magnitude(float value, float inverse, uint32_t random16) {
    const float ratio = fabsf(value) * inverse;
    // Not finite (0 times the block's NaN): zero. By a mask and an integer minimum: compilers would make branches for the
    // constants of a conditional expression, and not vectorise.
    const float x = float_from_bits(bits_of_float(ratio) & (0u - uint32_t(ratio <= 2.0f)));
    const int found = int(sqrtf(sqrtf(x)) * float(LEVELS));
    const float code = float(found < LEVELS - 1 ? found : LEVELS - 1);
    const float below = fourth_power<LEVELS>(code), above = fourth_power<LEVELS>(code + 1.0f);
    const float chance = (float(int(random16)) + 0.5f) * (1.0f / 65536.0f);
    return code + float(chance * (above - below) < x - below);
}

// exp_avg -> -127 .. 127
LTP_HD int8_t encode_exp_avg(float value, float inverse, uint32_t random) {
    const float code = encode_magnitude<127>(value, inverse, random >> 16);
    return int8_t(int(value < 0.0f ? -code : code));
}

LTP_HD float decode_exp_avg(int8_t code, float scale) {
    const float value = fourth_power<127>(float(code)) * scale;
    return code < 0 ? -value : value;
}

// sqrt(exp_avg_sq) -> 0 .. 255. What is not zero stays above zero, or the next step would divide by eps alone.
LTP_HD uint8_t encode_exp_avg_sq(float root, float inverse, uint32_t random) {
    const float code = encode_magnitude<255>(root, inverse, random & 0xFFFF);
    return uint8_t(int(root * inverse > 0.0f && code < 1.0f ? 1.0f : code));
}

LTP_HD float decode_exp_avg_sq(uint8_t code, float scale) {
    const float root = fourth_power<255>(float(code)) * scale;
    return root * root;
}

}  // namespace ltp
