// The ranking key of topk_delta: the 31 magnitude bits of float32(tuned) - float32(initial). As integers these order
// like the magnitudes, so the largest deltas are the largest keys; 0 is "did not move", >= kFirstNonfinite is NaN or
// inf.
#pragma once

#include <cstring>

#include "platform.h"

namespace ltp {

constexpr int32_t kFirstNonfinite = 0x7F800000;

// Storage types of the inputs; float32 is itself.
struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

LTP_HD float float_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

LTP_HD uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

LTP_HD float to_float32(float value) { return value; }

LTP_HD float to_float32(BFloat16 value) { return float_from_bits(uint32_t(value.bits) << 16); }

// Exact for every value. Branch-free, so that it vectorises, and free of denormal arithmetic, which is slow on some
// CPUs.
LTP_HD float to_float32(Float16 value) {
    const uint32_t magnitude = uint32_t(value.bits & 0x7FFF) << 13;
    const uint32_t rebias = uint32_t(127 - 15) << 23;
    const uint32_t smallest_normal = uint32_t(1) << 23;
    const uint32_t infinity = uint32_t(31) << 23;
    // A denormal reads as 2^-14 + its value; the subtraction is exact and normalises it.
    const float denormal =
        float_from_bits(magnitude + rebias + smallest_normal) - float_from_bits(rebias + smallest_normal);
    const uint32_t normal = magnitude + rebias + (magnitude >= infinity ? rebias : 0);
    const uint32_t bits = magnitude < smallest_normal ? bits_of_float(denormal) : normal;
    return float_from_bits(bits | uint32_t(value.bits & 0x8000) << 16);
}

LTP_HD int32_t delta_key(float delta) { return int32_t(bits_of_float(delta) & 0x7FFFFFFF); }

}  // namespace ltp
