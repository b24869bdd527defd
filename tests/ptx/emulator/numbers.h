// Numbers as bits: floating point with the one NaN that a GPU gives, and halves.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "ptx.h"

template <class To, class From>
To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

inline float f32(u64 bits) { return bits_as<float>(u32(bits)); }
inline double f64(u64 bits) { return bits_as<double>(bits); }
inline u64 raw(float x) { return x != x ? 0x7FFFFFFF : bits_as<u32>(x); }
inline u64 raw(double x) { return bits_as<u64>(x); }
inline u64 mask_of(int bytes) { return bytes == 8 ? ~0ull : (1ull << (8 * bytes)) - 1; }
inline s64 extended(u64 bits, int bytes) { return s64(bits << (64 - 8 * bytes)) >> (64 - 8 * bytes); }

inline float from_half(u16 h) {
    const u32 sign = u32(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    if (exponent == 31) return bits_as<float>(fraction ? 0x7FFFFFFFu : sign | 0x7F800000u);
    if (exponent) return bits_as<float>(sign | (exponent + 112) << 23 | fraction << 13);
    return bits_as<float>(sign | bits_as<u32>(std::ldexp(float(fraction), -24)));
}

inline u16 to_half(float x) {  // to nearest even, by double arithmetic on the grid of the result
    if (x != x) return 0x7FFF;
    const u16 sign = bits_as<u32>(x) >> 16 & 0x8000;
    const double size = std::fabs(double(x));
    if (size >= 65520.0) return sign | 0x7C00;
    int exponent;
    std::frexp(size, &exponent);
    const double unit = std::ldexp(1.0, std::max(exponent - 11, -24));
    const double rounded = std::nearbyint(size / unit) * unit;
    if (rounded < std::ldexp(1.0, -14)) return sign | u16(rounded / std::ldexp(1.0, -24));
    std::frexp(rounded, &exponent);
    return sign | u16((exponent + 14) << 10 | (u16(rounded / std::ldexp(1.0, exponent - 11)) - 1024));
}

inline float from_bfloat16(u16 b) { return bits_as<float>(u32(b) << 16); }

inline u16 to_bfloat16(float x) {
    if (x != x) return 0x7FFF;
    const u32 bits = bits_as<u32>(x), half = 0x7FFF + (bits >> 16 & 1);
    return u16((bits + half) >> 16);
}
