// The vector primitives of lanes_generic.h for AVX2, BMI2 and POPCNT.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../common/digest.h"
#include "positions.h"

namespace ltp {
namespace {

constexpr bool kPacksLanes = true;
constexpr bool kPacksHalf = false;  // 16-bit items are always gathered by position

inline int64_t count_bits(uint64_t bits) { return __builtin_popcountll(bits); }

// For every byte and lane, the number of set bits below the lane: where the lane's value stands in a packed vector.
struct ByteRanks {
    uint8_t row[256][8];

    constexpr ByteRanks() : row() {
        for (int byte = 0; byte < 256; ++byte) {
            int rank = 0;
            for (int bit = 0; bit < 8; ++bit) {
                row[byte][bit] = uint8_t(rank);
                rank += byte >> bit & 1;
            }
        }
    }
};
constexpr ByteRanks kByteRanks;

inline uint32_t eighth(uint64_t bits, int number) { return uint32_t(bits >> (8 * number)) & 0xFF; }

inline int64_t count_before(uint64_t bits, int number) { return __builtin_popcountll(_bzhi_u64(bits, 8 * number)); }

inline __m128i positions_of(uint32_t byte) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(kBytePositions.row[byte]));
}

inline void pack(const float* from, uint64_t bits, float* to) {
    for (int i = 0; i < 8; ++i) {
        const __m256i order = _mm256_cvtepu16_epi32(positions_of(eighth(bits, i)));
        _mm256_storeu_ps(to + count_before(bits, i), _mm256_permutevar8x32_ps(_mm256_loadu_ps(from + 8 * i), order));
    }
}

// Inactive lanes are written back as they were: maskmov stores are slow on some CPUs.
inline void unpack(const float* from, uint64_t bits, float* to) {
    const __m256i lane_bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    for (int i = 0; i < 8; ++i) {
        const uint32_t byte = eighth(bits, i);
        const __m128i ranks = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kByteRanks.row[byte]));
        const __m256 packed = _mm256_loadu_ps(from + count_before(bits, i));
        const __m256 values = _mm256_permutevar8x32_ps(packed, _mm256_cvtepu8_epi32(ranks));
        const __m256i chosen = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(byte)), lane_bits), lane_bits);
        const __m256 old = _mm256_loadu_ps(to + 8 * i);
        _mm256_storeu_ps(to + 8 * i, _mm256_blendv_ps(old, values, _mm256_castsi256_ps(chosen)));
    }
}

inline int64_t decode(uint64_t bits, uint16_t first, uint16_t* to) {
    for (int i = 0; i < 8; ++i) {
        const __m128i base = _mm_set1_epi16(int16_t(first + 8 * i));
        const __m128i positions = _mm_add_epi16(base, positions_of(eighth(bits, i)));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + count_before(bits, i)), positions);
    }
    return count_bits(bits);
}

inline uint64_t greater(const int32_t* keys, int32_t bound) {
    const __m256i bounds = _mm256_set1_epi32(bound);
    uint64_t bits = 0;
    for (int i = 0; i < 8; ++i) {
        const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + 8 * i));
        const int mask = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(values, bounds)));
        bits |= uint64_t(uint32_t(mask)) << (8 * i);
    }
    return bits;
}

// The lanes of a digest.
struct DigestLanes {
    __m256i lanes[2];

    static __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

    explicit DigestLanes(const uint64_t* from) : lanes{load(from), load(from + 4)} {}
    void store(uint64_t* to) const {
        for (int i = 0; i < 2; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 4 * i), lanes[i]);
    }

    void add(const char* stripe, const uint64_t* secret) {
        for (int i = 0; i < 2; ++i) {
            const __m256i words = load(stripe + 32 * i), keyed = _mm256_xor_si256(words, load(secret + 4 * i));
            const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
            lanes[i] = _mm256_add_epi64(_mm256_add_epi64(lanes[i], product), _mm256_permute4x64_epi64(words, 0xB1));
        }
    }

    void scramble(const uint64_t* secret) {
        const __m256i prime = _mm256_set1_epi64x(kPrime32_1);
        for (int i = 0; i < 2; ++i) {
            const __m256i mixed = _mm256_xor_si256(lanes[i], _mm256_srli_epi64(lanes[i], 47));
            const __m256i keyed = _mm256_xor_si256(mixed, load(secret + 4 * i));
            const __m256i upper = _mm256_mul_epu32(_mm256_srli_epi64(keyed, 32), prime);
            lanes[i] = _mm256_add_epi64(_mm256_mul_epu32(keyed, prime), _mm256_slli_epi64(upper, 32));
        }
    }
};

}  // namespace
}  // namespace ltp
