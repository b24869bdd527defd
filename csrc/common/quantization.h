// Moments in 8 bits: codes in blocks of 256 consecutive active entries of a tile, with a bfloat16 scale per block and
// moment. The maps compand, as in FlashOptim (arXiv 2602.23349): softsign for the first moment, the square root for the
// second, which spends the codes where the values are and needs no table. All in float32, in exactly this order.
#pragma once

#include <math.h>

#include "dtypes.h"

namespace ltp {

constexpr int64_t kStateBlock = 256;  // active entries of a tile that share scales

// The scale of a block whose largest magnitude is `largest`: rounded up, so that no code overflows. Below 2^-120 the
// block is zero; with a NaN or an infinity in it, all of it is NaN from then on. `largest` is compared as bits, where a
// NaN is above everything.
LTP_HD BFloat16 block_scale(float largest) {
    const uint32_t bits = bits_of_float(largest) & 0x7FFFFFFF;
    BFloat16 scale;
    scale.bits = uint16_t((bits + 0xFFFF) >> 16);
    if (bits >= 0x7F800000) scale.bits = 0x7FC0;
    if (bits < uint32_t(127 - 120) << 23) scale.bits = 0;
    return scale;
}

LTP_HD float inverse_scale(float scale) { return scale > 0.0f ? 1.0f / scale : 0.0f; }

// To the nearest integer, ties to even, for |x| < 2^22.
LTP_HD float nearest_integer(float x) { return (x + 12582912.0f) - 12582912.0f; }

// exp_avg -> -127 .. 127
LTP_HD int8_t encode_exp_avg(float value, float inverse) {
    const float ratio = value * inverse;
    const float x = fabsf(ratio) <= 2.0f ? ratio : 0.0f;  // not finite: 0 times the block's NaN
    return int8_t(int(nearest_integer(127.0f * ((x + x) / (1.0f + fabsf(x))))));
}

LTP_HD float decode_exp_avg(int8_t code, float scale) {
    const float y = float(code) * (1.0f / 127.0f);
    return y / (2.0f - fabsf(y)) * scale;
}

// sqrt(exp_avg_sq) -> 0 .. 255. What is not zero stays above zero, or the next step would divide by eps alone.
LTP_HD uint8_t encode_exp_avg_sq(float root, float inverse) {
    const float ratio = root * inverse;
    const float x = fabsf(ratio) <= 2.0f ? ratio : 0.0f;
    const float code = nearest_integer(255.0f * x);
    return uint8_t(int(x > 0.0f && code < 1.0f ? 1.0f : code));
}

LTP_HD float decode_exp_avg_sq(uint8_t code, float scale) {
    const float root = float(code) * (scale * (1.0f / 255.0f));
    return root * root;
}

}  // namespace ltp
