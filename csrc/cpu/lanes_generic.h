// The few vector primitives that compilers do not find by themselves, in portable C++.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/digest.h"
#include "positions.h"

namespace ltp {
namespace {

// Without a vector instruction that packs lanes, bitmaps are always decoded to positions.
constexpr bool kPacksLanes = false;
constexpr bool kPacksHalf = false;  // 16-bit items are always gathered by position

inline int64_t count_bits(uint64_t bits) {
    bits -= (bits >> 1) & 0x5555555555555555u;
    bits = (bits & 0x3333333333333333u) + ((bits >> 2) & 0x3333333333333333u);
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0Fu;
    return int64_t((bits * 0x0101010101010101u) >> 56);
}

// Appends first + j for every set bit j, ascending, and returns how many. Writes up to 64 positions.
inline int64_t decode(uint64_t bits, uint16_t first, uint16_t* to) {
    // Running sums of the bits per byte: byte b of `ends` is the number of set bits in bytes 0 .. b.
    uint64_t ends = bits - ((bits >> 1) & 0x5555555555555555u);
    ends = (ends & 0x3333333333333333u) + ((ends >> 2) & 0x3333333333333333u);
    ends = ((ends + (ends >> 4)) & 0x0F0F0F0F0F0F0F0Fu) * 0x0101010101010101u;
    uint16_t* end = to;
    for (int byte = 0; byte < 8; ++byte) {
        const uint16_t* row = kBytePositions.row[bits >> (8 * byte) & 0xFF];
        const uint16_t base = uint16_t(first + 8 * byte);
        for (int i = 0; i < 8; ++i) end[i] = uint16_t(base + row[i]);
        end = to + (ends >> (8 * byte) & 0xFF);
    }
    return end - to;
}

// Bit j = keys[j] > bound, j = 0..63.
inline uint64_t greater(const int32_t* keys, int32_t bound) {
    uint8_t flags[64];
    for (int j = 0; j < 64; ++j) flags[j] = keys[j] > bound;
    uint64_t bits = 0;
    for (int byte = 0; byte < 8; ++byte) {
        uint64_t eight;
        memcpy(&eight, flags + 8 * byte, 8);
        // The product moves the flag of byte j to bit 56 + j.
        bits |= (eight * 0x0102040810204080u) >> 56 << (8 * byte);
    }
    return bits;
}

// The lanes of a digest.
struct DigestLanes {
    uint64_t lanes[8];

    explicit DigestLanes(const uint64_t* from) { memcpy(lanes, from, sizeof lanes); }
    void store(uint64_t* to) const { memcpy(to, lanes, sizeof lanes); }

    void add(const char* stripe, const uint64_t* secret) {
        uint64_t words[8];
        memcpy(words, stripe, sizeof words);
        for (int i = 0; i < 8; ++i) {
            const uint64_t keyed = words[i] ^ secret[i];
            lanes[i] += (keyed & 0xFFFFFFFF) * (keyed >> 32) + words[i ^ 1];
        }
    }

    void scramble(const uint64_t* secret) {
        for (int i = 0; i < 8; ++i) lanes[i] = (lanes[i] ^ lanes[i] >> 47 ^ secret[i]) * kPrime32_1;
    }
};

}  // namespace
}  // namespace ltp
