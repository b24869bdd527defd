// Tile kernels of delta_histogram and delta_band, over the primitives of a lanes_*.h included before.
//
// Keys are computed a block at a time into a buffer in the L1 cache. All that follows does not depend on dtypes.
#pragma once

#include <cstring>

#include "../common/delta_key.h"
#include "kernels.h"

namespace ltp {
namespace {

constexpr int64_t kBlock = 1024;  // entries; a multiple of 64

template <class Initial, class Tuned>
void pair_keys(const void* initial, const void* tuned, int64_t begin, int64_t count, int32_t* __restrict keys) {
    const Initial* a = static_cast<const Initial*>(initial) + begin;
    const Tuned* b = static_cast<const Tuned*>(tuned) + begin;
    for (int64_t i = 0; i < count; ++i) keys[i] = delta_key(to_float32(b[i]) - to_float32(a[i]));
}

template <class Tuned>
void single_keys(const void*, const void* tuned, int64_t begin, int64_t count, int32_t* __restrict keys) {
    const Tuned* b = static_cast<const Tuned*>(tuned) + begin;
    for (int64_t i = 0; i < count; ++i) keys[i] = delta_key(to_float32(b[i]));
}

using KeyFunction = void (*)(const void* initial, const void* tuned, int64_t begin, int64_t count, int32_t* keys);

KeyFunction key_function(const DeltaTile& tile) {
    return with_storage_type(tile.tuned_dtype, [&](auto tuned) -> KeyFunction {
        using Tuned = decltype(tuned);
        if (tile.initial == nullptr) return single_keys<Tuned>;
        return with_storage_type(tile.initial_dtype,
                                 [](auto initial) -> KeyFunction { return pair_keys<decltype(initial), Tuned>; });
    });
}

// Computes the keys of a tile, block by block.
class TileKeys {
  public:
    explicit TileKeys(const DeltaTile& tile) : tile_(tile), function_(key_function(tile)) {}

    // The keys of entries begin .. min(begin + count, length) - 1, count <= kBlock; the rest of the last group of 64
    // is filled with zero keys.
    const int32_t* at(int64_t begin, int64_t count) {
        const int64_t left = tile_.length - begin;
        if (count > left) {
            count = left;
            memset(keys_ + count / 64 * 64, 0, 64 * sizeof(int32_t));
        }
        function_(tile_.initial, tile_.tuned, begin, count, keys_);
        return keys_;
    }

  private:
    const DeltaTile& tile_;
    KeyFunction function_;
    alignas(64) int32_t keys_[kBlock];
};

// Calls visit(keys of 64 entries, number of the group) for every group of the tile.
template <class Visit>
inline void for_each_group(const DeltaTile& tile, Visit visit) {
    TileKeys keys(tile);
    for (int64_t begin = 0; begin < tile.length; begin += kBlock) {
        const int32_t* block = keys.at(begin, kBlock);
        const int64_t end = begin + kBlock < tile.length ? begin + kBlock : tile.length;
        for (int64_t first = begin; first < end; first += 64) visit(block + (first - begin), first / 64);
    }
}

inline int32_t largest_key(const int32_t* keys, int32_t largest) {
    for (int j = 0; j < 64; ++j) largest = keys[j] > largest ? keys[j] : largest;
    return largest;
}

int32_t histogram_high(const DeltaTile& tile, uint32_t* bins) {
    int32_t largest = 0;
    uint32_t still = 0;
    for_each_group(tile, [&](const int32_t* keys, int64_t) {
        largest = largest_key(keys, largest);
        uint64_t moved = greater(keys, 0);
        const int64_t count = count_bits(moved);
        if (count >= 32) {  // no branches on single entries: zeros are counted too, and subtracted at the end
            for (int j = 0; j < 64; ++j) ++bins[keys[j] >> 16];
            still += uint32_t(64 - count);
        } else {
            for (; moved != 0; moved &= moved - 1) ++bins[keys[__builtin_ctzll(moved)] >> 16];
        }
    });
    bins[0] -= still;
    return largest;
}

int32_t histogram_low(const DeltaTile& tile, int32_t prefix, uint32_t* bins) {
    int32_t largest = 0;
    const int32_t lower = prefix == 0 ? 0 : (prefix << 16) - 1, upper = prefix << 16 | 0xFFFF;
    for_each_group(tile, [&](const int32_t* keys, int64_t) {
        largest = largest_key(keys, largest);
        for (uint64_t bits = greater(keys, lower) & ~greater(keys, upper); bits != 0; bits &= bits - 1) {
            ++bins[keys[__builtin_ctzll(bits)] & 0xFFFF];
        }
    });
    return largest;
}

BandCounts band(const DeltaTile& tile, int32_t lower, int32_t upper, int32_t* words, uint64_t* inside) {
    BandCounts counts = {0, 0, 0};
    for_each_group(tile, [&](const int32_t* keys, int64_t group) {
        counts.largest = largest_key(keys, counts.largest);
        const uint64_t above = greater(keys, upper);
        const uint64_t between = greater(keys, lower) & ~above;
        memcpy(words + 2 * group, &above, sizeof above);
        inside[group] = between;
        counts.above += count_bits(above);
        counts.inside += count_bits(between);
    });
    return counts;
}

void collect(const DeltaTile& tile, const uint64_t* selected, int32_t* keys, uint16_t* positions) {
    TileKeys tile_keys(tile);
    for (int64_t first = 0; first < tile.length; first += 64) {
        uint64_t bits = selected[first / 64];
        if (bits == 0) continue;
        const int32_t* group = tile_keys.at(first, 64);
        for (; bits != 0; bits &= bits - 1) {
            *keys++ = group[__builtin_ctzll(bits)];
            *positions++ = uint16_t(first + __builtin_ctzll(bits));
        }
    }
}

void all_keys(const DeltaTile& tile, int32_t* keys) {
    key_function(tile)(tile.initial, tile.tuned, 0, tile.length, keys);
}

}  // namespace
}  // namespace ltp
