// Tile kernels of masked_adamw_, masked_sum_squares and masked_pack_, over the primitives of a lanes_*.h and the walk
// of active_entries.h.
#pragma once

#include "../common/quantization.h"
#include "active_entries.h"

namespace ltp {
namespace {

// Inlined into the walk, like PieceUpdate, which is no lambda for that reason: a list has a piece per 16 entries, and a
// call with nine coefficients costs as much as such a piece. With ROOTS, the roots of the second moments take their
// place.
template <bool HAS_ANCHOR, bool ROOTS = false>
LTP_INLINE void update_piece(float* __restrict values, const float* __restrict grads, float* __restrict exp_avg,
                             float* __restrict exp_avg_sq, const float* __restrict anchor, int64_t count,
                             const AdamWCoefficients c) {
    for (int64_t i = 0; i < count; ++i) {
        const float g = effective_gradient<HAS_ANCHOR>(grads[i], values[i], HAS_ANCHOR ? anchor[i] : 0.0f, c);
        const float root = adamw_update(values[i], g, exp_avg[i], exp_avg_sq[i], c);
        if (ROOTS) exp_avg_sq[i] = root;
    }
}

// The decoded moments of one block of 256 active entries. When they are encoded, the roots of the second moments must
// be in their place.
class DecodedBlock {
  public:
    alignas(64) float exp_avg[kStateBlock];
    alignas(64) float exp_avg_sq[kStateBlock];

    DecodedBlock(const int8_t* first, const uint8_t* second, const float* scales, int64_t count) {
        const float first_scale = scales[0], second_scale = scales[1];
        for (int64_t i = 0; i < count; ++i) exp_avg[i] = decode_exp_avg(float(first[i]), first_scale);
        for (int64_t i = 0; i < count; ++i) exp_avg_sq[i] = decode_exp_avg_sq(float(second[i]), second_scale);
    }

    // random: `moment_bits` of every entry
    void encode(int8_t* first, uint8_t* second, float* scales, const uint32_t* random, int64_t count) {
        scales[0] = block_scale(largest(exp_avg, count));
        scales[1] = block_scale(largest(exp_avg_sq, count));
        const float first_inverse = inverse_scale<kFirstLevels>(scales[0]);
        const float second_inverse = inverse_scale<kSecondLevels>(scales[1]);
        for (int64_t i = 0; i < count; ++i) first[i] = encode_exp_avg(exp_avg[i], first_inverse, random[i]);
        for (int64_t i = 0; i < count; ++i) {
            second[i] = encode_exp_avg_sq(exp_avg_sq[i], second_inverse, random[i]);
        }
    }

  private:
    // The largest magnitude, compared as bits, where a NaN is above all numbers.
    static float largest(const float* values, int64_t count) {
        int32_t bits = 0;
        for (int64_t i = 0; i < count; ++i) {
            const int32_t magnitude = int32_t(bits_of_float(values[i]) & 0x7FFFFFFF);
            bits = magnitude > bits ? magnitude : bits;
        }
        return float_from_bits(uint32_t(bits));
    }
};

// A piece that is one block of 8-bit moments, at these positions in the tile; null stands for consecutive ones.
template <bool HAS_ANCHOR>
__attribute__((noinline)) void update_block(const AdamWTile& tile, float* values, const float* grads, int64_t rank,
                                            int64_t count, const uint16_t* positions) {
    int8_t* first = static_cast<int8_t*>(tile.exp_avg) + rank;
    uint8_t* second = static_cast<uint8_t*>(tile.exp_avg_sq) + rank;
    float* scales = tile.scales + 2 * (rank / kStateBlock);
    const float* anchor = HAS_ANCHOR ? tile.anchor + rank : nullptr;
    DecodedBlock block(first, second, scales, count);
    update_piece<HAS_ANCHOR, true>(values, grads, block.exp_avg, block.exp_avg_sq, anchor, count, tile.coefficients);
    alignas(64) uint32_t random[kStateBlock];
    const uint32_t key = moment_key(tile.key), start = uint32_t(tile.start);
    if (positions == nullptr) {
        for (int64_t i = 0; i < count; ++i) random[i] = moment_bits(key, start + uint32_t(rank + i));
    } else {
        for (int64_t i = 0; i < count; ++i) random[i] = moment_bits(key, start + positions[i]);
    }
    block.encode(first, second, scales, random, count);
}

template <bool HAS_ANCHOR>
struct PieceUpdate {
    const AdamWTile& tile;

    LTP_INLINE void operator()(float* values, const float* grads, int64_t rank, int64_t count,
                               const uint16_t* positions) const {
        if (tile.scales != nullptr) return update_block<HAS_ANCHOR>(tile, values, grads, rank, count, positions);
        update_piece<HAS_ANCHOR>(values, grads, static_cast<float*>(tile.exp_avg) + rank,
                                 static_cast<float*>(tile.exp_avg_sq) + rank, HAS_ANCHOR ? tile.anchor + rank : nullptr,
                                 count, tile.coefficients);
    }
};

void adamw(const AdamWTile& tile) {
    with_walk(tile, [&](auto walk) {
        if (tile.anchor != nullptr) {
            walk.template for_each_piece<Access::kUpdate>(tile, PieceUpdate<true>{tile});
        } else {
            walk.template for_each_piece<Access::kUpdate>(tile, PieceUpdate<false>{tile});
        }
    });
}

// Active entry number r of the tile is added to lane r % 16, so that the order of the sum does not depend on pieces.
constexpr int64_t kSumLanes = 16;

template <bool HAS_ANCHOR>
double sum_tile(const AdamWTile& tile) {
    const AdamWCoefficients c = tile.coefficients;
    double lanes[kSumLanes] = {};
    constexpr Access kAccess = HAS_ANCHOR ? Access::kReadBoth : Access::kReadGrads;
    with_walk(tile, [&](auto walk) {
        walk.template for_each_piece<kAccess>(
            tile, [&](const float* values, const float* grads, int64_t rank, int64_t count, const uint16_t*) {
                const auto add = [&](int64_t lane, int64_t i) {
                    const double g = effective_gradient<HAS_ANCHOR>(grads[i], HAS_ANCHOR ? values[i] : 0.0f,
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
    });
    double sum = 0.0;
    for (const double lane : lanes) sum += lane;
    return sum;
}

double sum_squares(const AdamWTile& tile) {
    return tile.anchor != nullptr ? sum_tile<true>(tile) : sum_tile<false>(tile);
}

void pack_gradients(const AdamWTile& tile, float* out, bool accumulate) {
    with_walk(tile, [&](auto walk) {
        walk.template for_each_piece<Access::kReadGrads>(
            tile, [&](const float*, const float* grads, int64_t rank, int64_t count, const uint16_t*) {
                if (accumulate) {
                    for (int64_t i = 0; i < count; ++i) out[rank + i] = out[rank + i] + grads[i];
                } else {
                    memcpy(out + rank, grads, size_t(count) * sizeof(float));
                }
            });
    });
}

}  // namespace
}  // namespace ltp
