// Tile kernels of masked_adamw_ and masked_sum_squares, over the primitives of a lanes_*.h included before.
//
// Active entries are handled in pieces, each in three phases: bring the piece's parameters and gradients into buffers
// in the L1 cache, work on these as on a dense array (the compiler vectorises it, and square roots and divisions are
// spent on active entries only), put the new parameters back. Working in place, one vector at a time, is slower: each
// masked load would wait for the masked store before it. Pieces are small, so that the processor reads the memory of
// the next one while it still works on this one.
#pragma once

#include <cstring>

#include "kernels.h"

namespace ltp {
namespace {

constexpr int64_t kPackedPiece = 192;  // active entries, at most
constexpr int64_t kListPiece = 16;
constexpr int64_t kListAhead = 32;  // entries from a piece to the one that is fetched meanwhile

// A bitmap with at least this many entries per active one is sparse: turned into a list, which leaves the cache lines
// without active entries alone. Up to there reading on through memory costs less than skipping lines.
constexpr int64_t kSparse = 24;

enum class Access { kUpdate, kReadGrads, kReadBoth };

struct Buffers {
    // The primitives touch up to 64 items past the piece.
    alignas(64) float params[kPackedPiece + 64];
    alignas(64) float grads[kPackedPiece + 64];
};

inline uint64_t load_group(const int32_t* words, int64_t group) {
    uint64_t bits;
    memcpy(&bits, words + 2 * group, sizeof bits);
    return bits;
}

template <Access ACCESS, class Body>
void for_each_listed_piece(const AdamWTile& tile, const uint16_t* positions, Body body) {
    Buffers buffers;
    for (int64_t rank = 0; rank < tile.active; rank += kListPiece) {
        const uint16_t* const piece = positions + rank;
        const int64_t left = tile.active - rank;
        const int64_t count = left < kListPiece ? left : kListPiece;
        // The lines of a piece to come: a gather alone keeps too few on the way. The hint "not needed again" keeps the
        // processor from fetching the neighbours of these lines too, which often hold nothing active.
        for (int64_t i = kListAhead; i < left && i < kListAhead + kListPiece; ++i) {
            if (ACCESS != Access::kReadGrads) __builtin_prefetch(tile.param + piece[i], 0, 0);
            __builtin_prefetch(tile.grad + piece[i], 0, 0);
        }
        if (ACCESS != Access::kReadGrads) gather(tile.param, piece, count, buffers.params);
        gather(tile.grad, piece, count, buffers.grads);
        body(buffers.params, buffers.grads, rank, count);
        if (ACCESS == Access::kUpdate) scatter(buffers.params, piece, count, tile.param);
    }
}

template <Access ACCESS, class Body>
void for_each_packed_piece(const AdamWTile& tile, Body body) {
    Buffers buffers;
    const int64_t full_groups = tile.length / 64;
    int64_t group = 0, rank = 0;
    while (group < full_groups) {
        const int64_t first = group;
        int64_t count = 0;
        for (; group < full_groups && count <= kPackedPiece - 64; ++group) {
            const uint64_t bits = load_group(tile.words, group);
            if (ACCESS != Access::kReadGrads) pack(tile.param + 64 * group, bits, buffers.params + count);
            pack(tile.grad + 64 * group, bits, buffers.grads + count);
            count += count_bits(bits);
        }
        body(buffers.params, buffers.grads, rank, count);
        rank += count;
        if (ACCESS == Access::kUpdate) {
            const float* from = buffers.params;
            for (int64_t done = first; done < group; ++done) {
                const uint64_t bits = load_group(tile.words, done);
                unpack(from, bits, tile.param + 64 * done);
                from += count_bits(bits);
            }
        }
    }
    // The last group, if it is not whole: vectors would reach past the end of the tensor.
    if (tile.length % 64 != 0) {
        uint16_t positions[64];
        const int64_t count = decode(load_group(tile.words, group), uint16_t(64 * group), positions);
        if (ACCESS != Access::kReadGrads) gather(tile.param, positions, count, buffers.params);
        gather(tile.grad, positions, count, buffers.grads);
        body(buffers.params, buffers.grads, rank, count);
        if (ACCESS == Access::kUpdate) scatter(buffers.params, positions, count, tile.param);
    }
}

// Writes the positions of all active entries of a bitmap.
inline void decode_tile(const AdamWTile& tile, uint16_t* positions) {
    for (int64_t group = 0; 64 * group < tile.length; ++group) {
        const uint64_t bits = load_group(tile.words, group);
        if (bits != 0) positions += decode(bits, uint16_t(64 * group), positions);
    }
}

// Calls body(params, grads, rank, count) for pieces of active entries in order: `count` of them from the tile's active
// entry `rank` on. With kUpdate, what body leaves in params becomes the parameters; with kReadGrads, params is not to
// be read.
template <Access ACCESS, class Body>
void for_each_piece(const AdamWTile& tile, Body body) {
    if (tile.encoding == Encoding::kFull) {
        body(tile.param, tile.grad, 0, tile.length);
    } else if (tile.encoding == Encoding::kList16) {
        for_each_listed_piece<ACCESS>(tile, tile.positions, body);
    } else if (kPacksLanes && kSparse * tile.active > tile.length) {
        for_each_packed_piece<ACCESS>(tile, body);
    } else {
        uint16_t positions[kTile + 64];
        decode_tile(tile, positions);
        for_each_listed_piece<ACCESS>(tile, positions, body);
    }
}

template <bool HAS_ANCHOR>
void update_piece(float* __restrict param, const float* __restrict grad, float* __restrict exp_avg,
                  float* __restrict exp_avg_sq, const float* __restrict anchor, int64_t count,
                  const AdamWCoefficients c) {
    for (int64_t i = 0; i < count; ++i) {
        const float g = effective_gradient<HAS_ANCHOR>(grad[i], param[i], HAS_ANCHOR ? anchor[i] : 0.0f, c);
        adamw_update(param[i], g, exp_avg[i], exp_avg_sq[i], c);
    }
}

template <bool HAS_ANCHOR>
void update_tile(const AdamWTile& tile) {
    for_each_piece<Access::kUpdate>(tile, [&](float* params, const float* grads, int64_t rank, int64_t count) {
        update_piece<HAS_ANCHOR>(params, grads, tile.exp_avg + rank, tile.exp_avg_sq + rank,
                                 HAS_ANCHOR ? tile.anchor + rank : nullptr, count, tile.coefficients);
    });
}

void adamw(const AdamWTile& tile) { tile.anchor != nullptr ? update_tile<true>(tile) : update_tile<false>(tile); }

// Entry number r of the tile goes to lane r % 16, whatever the pieces: the order of the sum is always the same.
constexpr int64_t kSumLanes = 16;

template <bool HAS_ANCHOR>
double sum_tile(const AdamWTile& tile) {
    const AdamWCoefficients c = tile.coefficients;
    double lanes[kSumLanes] = {};
    constexpr Access kAccess = HAS_ANCHOR ? Access::kReadBoth : Access::kReadGrads;
    for_each_piece<kAccess>(tile, [&](const float* params, const float* grads, int64_t rank, int64_t count) {
        const auto add = [&](int64_t lane, int64_t i) {
            const double g = effective_gradient<HAS_ANCHOR>(grads[i], HAS_ANCHOR ? params[i] : 0.0f,
                                                            HAS_ANCHOR ? tile.anchor[rank + i] : 0.0f, c);
            lanes[lane] += g * g;
        };
        int64_t i = 0;
        for (; i < count && (rank + i) % kSumLanes != 0; ++i) add((rank + i) % kSumLanes, i);
        for (; i + kSumLanes <= count; i += kSumLanes) {
            for (int64_t lane = 0; lane < kSumLanes; ++lane) add(lane, i + lane);
        }
        for (; i < count; ++i) add((rank + i) % kSumLanes, i);
    });
    double sum = 0.0;
    for (const double lane : lanes) sum += lane;
    return sum;
}

double sum_squares(const AdamWTile& tile) {
    return tile.anchor != nullptr ? sum_tile<true>(tile) : sum_tile<false>(tile);
}

}  // namespace
}  // namespace ltp
