// The vector primitives of lanes_generic.h for AVX-512 F, BW, VL, DQ, VBMI, VBMI2 and VPOPCNTDQ.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../common/digest.h"
#include "positions.h"

namespace ltp {
namespace {

constexpr bool kPacksLanes = true;

inline int64_t count_bits(uint64_t bits) { return __builtin_popcountll(bits); }

inline __mmask16 quarter(uint64_t bits, int number) { return __mmask16(bits >> (16 * number)); }

inline int64_t count_before(uint64_t bits, int number) { return __builtin_popcountll(_bzhi_u64(bits, 16 * number)); }

// Packs from[j] of every set bit j to `to`, in order. Reads 64 floats, writes up to 64.
// Only the register forms of compress and expand are used: their memory forms are slow microcode on some CPUs.
inline void pack(const float* from, uint64_t bits, float* to) {
    for (int i = 0; i < 4; ++i) {
        // merges into the source, since on some CPUs the zeroing form waits for the last use of its output register
        const __m512 values = _mm512_loadu_ps(from + 16 * i);
        _mm512_storeu_ps(to + count_before(bits, i), _mm512_mask_compress_ps(values, quarter(bits, i), values));
    }
}

// The inverse: copies consecutive floats to to[j] of every set bit j. The other floats are written back unchanged,
// which is faster than a masked store. Reads up to 64 floats.
inline void unpack(const float* from, uint64_t bits, float* to) {
    for (int i = 0; i < 4; ++i) {
        const __m512 packed = _mm512_loadu_ps(from + count_before(bits, i));
        const __m512 old = _mm512_loadu_ps(to + 16 * i);
        _mm512_storeu_ps(to + 16 * i, _mm512_mask_expand_ps(old, quarter(bits, i), packed));
    }
}

// The same for 16-bit items, 32 at a time.
constexpr bool kPacksHalf = true;

template <class Half>
inline void pack(const Half* from, uint64_t bits, Half* to) {
    for (int i = 0; i < 2; ++i) {
        const __m512i values = _mm512_loadu_si512(from + 32 * i);
        const __m512i packed = _mm512_mask_compress_epi16(values, __mmask32(bits >> (32 * i)), values);
        _mm512_storeu_si512(to + count_before(bits, 2 * i), packed);
    }
}

template <class Half>
inline void unpack(const Half* from, uint64_t bits, Half* to) {
    for (int i = 0; i < 2; ++i) {
        const __m512i packed = _mm512_loadu_si512(from + count_before(bits, 2 * i));
        const __m512i old = _mm512_loadu_si512(to + 32 * i);
        _mm512_storeu_si512(to + 32 * i, _mm512_mask_expand_epi16(old, __mmask32(bits >> (32 * i)), packed));
    }
}

inline int64_t decode(uint64_t bits, uint16_t first, uint16_t* to) {
    alignas(64) static constexpr uint8_t kIota[64] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                      16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
                                                      32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47,
                                                      48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
    const __m512i iota = _mm512_load_si512(kIota);
    const __m512i bytes = _mm512_mask_compress_epi8(iota, bits, iota);
    const __m512i base = _mm512_set1_epi16(int16_t(first));
    for (int half = 0; half < 2; ++half) {
        const __m256i part = half == 0 ? _mm512_castsi512_si256(bytes) : _mm512_extracti64x4_epi64(bytes, 1);
        _mm512_storeu_si512(to + 32 * half, _mm512_add_epi16(base, _mm512_cvtepu8_epi16(part)));
    }
    return count_bits(bits);
}

inline uint64_t greater(const int32_t* keys, int32_t bound) {
    const __m512i bounds = _mm512_set1_epi32(bound);
    uint64_t bits = 0;
    for (int i = 0; i < 4; ++i) {
        bits |= uint64_t(_mm512_cmpgt_epi32_mask(_mm512_loadu_si512(keys + 16 * i), bounds)) << (16 * i);
    }
    return bits;
}

// The lanes of a digest.
struct DigestLanes {
    __m512i lanes;

    explicit DigestLanes(const uint64_t* from) : lanes(_mm512_loadu_si512(from)) {}
    void store(uint64_t* to) const { _mm512_storeu_si512(to, lanes); }

    void add(const char* stripe, const uint64_t* secret) {
        const __m512i words = _mm512_loadu_si512(stripe), keyed = _mm512_xor_si512(words, _mm512_loadu_si512(secret));
        const __m512i product = _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32));
        lanes = _mm512_add_epi64(_mm512_add_epi64(lanes, product), _mm512_permutex_epi64(words, 0xB1));
    }

    void scramble(const uint64_t* secret) {
        const __m512i mixed = _mm512_xor_si512(lanes, _mm512_srli_epi64(lanes, 47));
        const __m512i keyed = _mm512_xor_si512(mixed, _mm512_loadu_si512(secret));
        lanes = _mm512_mullo_epi64(keyed, _mm512_set1_epi64(kPrime32_1));
    }
};

}  // namespace
}  // namespace ltp
