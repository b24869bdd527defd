// The storage types: their codes, conversion to float32, and rounding to them.
#pragma once

#include <cstring>
#include <type_traits>

#include "platform.h"

namespace ltp {

// The storage type of float32 is float.
struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

// Neighbours in memory, moved in one access.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
    T item[N];
};

// The codes of ltp_sparse/weights/tensors.py.
enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Calls body with a value of the storage type.
template <class Body>
auto with_storage_type(Dtype dtype, Body&& body) {
    switch (dtype) {
        case Dtype::kBFloat16:
            return body(BFloat16());
        case Dtype::kFloat16:
            return body(Float16());
        case Dtype::kFloat32:
            break;
    }
    return body(0.0f);
}

// Calls body with a value of the parameters' type, one of the gradients' type, and whether these are packed (a
// std::integral_constant). Packed gradients are float32; others are float32 or of the parameters' type.
template <class Body>
auto with_storage_types(Dtype param_dtype, Dtype grad_dtype, bool packed, Body&& body) {
    return with_storage_type(param_dtype, [&](auto param) {
        if (packed) return body(param, 0.0f, std::true_type());
        if constexpr (!std::is_same_v<decltype(param), float>) {
            if (grad_dtype != Dtype::kFloat32) return body(param, param, std::false_type());
        }
        return body(param, 0.0f, std::false_type());
    });
}

LTP_HD int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

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

// Exact for every value. Without branches, so that it vectorises, and without arithmetic on denormals, which is slow on
// some CPUs. A GPU has instructions for this and for the rounding below, except for its NaN.
LTP_HD float to_float32(Float16 value) {
#if defined(__CUDA_ARCH__)
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
#else
    const uint32_t magnitude = uint32_t(value.bits & 0x7FFF) << 13;
    const uint32_t rebias = uint32_t(127 - 15) << 23;
    const uint32_t smallest_normal = uint32_t(1) << 23;
    const uint32_t infinity = uint32_t(31) << 23;
    // These bits of a denormal read as 2^-14 + its value; the subtraction is exact and normalises it.
    const float denormal =
        float_from_bits(magnitude + rebias + smallest_normal) - float_from_bits(rebias + smallest_normal);
    const uint32_t normal = magnitude + rebias + (magnitude >= infinity ? rebias : 0);
    const uint32_t bits = magnitude < smallest_normal ? bits_of_float(denormal) : normal;
    return float_from_bits(bits | uint32_t(value.bits & 0x8000) << 16);
#endif
}

LTP_HD float to_float32(int8_t value) { return float(value); }

LTP_HD float to_float32(uint8_t value) { return float(value); }

// One of four neighbours. It is converted from their words, as taking it out first costs one instruction more.
template <class T>
LTP_HD float to_float32(const Vector<T, 4>& vector, int i) {
    return to_float32(vector.item[i]);
}

LTP_HD float to_float32(const Vector<BFloat16, 4>& vector, int i) {
    uint32_t words[2];
    memcpy(words, &vector, sizeof words);
    return float_from_bits(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xFFFF0000);
}

LTP_HD float to_float32(const Vector<int8_t, 4>& vector, int i) {
    uint32_t word;
    memcpy(&word, &vector, sizeof word);
    return float(int8_t(word >> 8 * i));
}

LTP_HD float to_float32(const Vector<uint8_t, 4>& vector, int i) {
    uint32_t word;
    memcpy(&word, &vector, sizeof word);
    return float(word >> 8 * i & 0xFF);
}

// Rounds to nearest, ties to even. NaN becomes the positive quiet NaN, and overflow infinity.
LTP_HD void round_to(float value, float& out) { out = value; }

LTP_HD void round_to(float value, BFloat16& out) {
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
    if (isnan(value)) out.bits = 0x7FC0;
#else
    const uint32_t bits = bits_of_float(value);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    out.bits = uint16_t((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
#endif
}

LTP_HD void round_to(float value, Float16& out) {
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
    if (isnan(value)) out.bits = 0x7E00;
#else
    const uint32_t bits = bits_of_float(value);
    const uint32_t magnitude = bits & 0x7FFFFFFF;
    // the last bit of 0.5 in float32 is worth as much as that of a float16 denormal, so that the addition rounds right
    const uint32_t denormal = bits_of_float(float_from_bits(magnitude) + 0.5f) - bits_of_float(0.5f);
    const uint32_t normal = (magnitude - (uint32_t(127 - 15) << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13;
    const uint32_t first_normal = 0x38800000, first_overflow = 0x477FF000, infinity = 0x7F800000;
    const uint32_t finite = magnitude < first_normal ? denormal : normal;
    const uint32_t large = magnitude > infinity ? 0x7E00 : 0x7C00;
    const uint32_t sign = magnitude > infinity ? 0 : bits >> 16 & 0x8000;
    out.bits = uint16_t(sign | (magnitude >= first_overflow ? large : finite));
#endif
}

}  // namespace ltp
