// What one thread block does of masked_adamw_, masked_sum_squares and masked_pack_; see active_entries.cuh for
// `Threads`.
#pragma once

#include "../common/adamw.h"
#include "../common/quantization.h"
#include "../common/rounding.h"
#include "active_entries.cuh"
#include "masked_adamw.h"

namespace ltp {

static_assert(kStateBlockSize == kStateBlock && kStateBlock == 2 * kThreads, "two entries of a block a thread");

struct alignas(16) Four {
    float item[kBatch];
};

// The share of a thread block: resolved addresses of one tile. PACKED: gradients are float32 in slot order.
template <class Param, class Grad, bool PACKED>
struct Share : PackedState {
    TileRow tile;
    Index index;
    Param* param;
    const Grad* grad;
    AdamWCoefficients c;
    uint32_t key;
    bool stochastic;
    int part;

    // moment_size: bytes of a moment
    LTP_HD Share(const DeviceUpdate& update, int64_t block, int64_t moment_size)
        : Share(update, block, update.tiles[block / update.parts], moment_size) {}

    LTP_HD Share(const DeviceUpdate& update, int64_t block, const TileRow& own, int64_t moment_size)
        : PackedState(update.state.of_tile(own, moment_size)), tile(own) {
        part = int(block % update.parts);
        const double* row = update.coefficients + AdamWCoefficients::kColumns * tile.param;
        index = index_of(update, tile);
        param = reinterpret_cast<Param*>(update.addresses[2 * tile.param]) + tile.start;
        grad = reinterpret_cast<const Grad*>(update.addresses[2 * tile.param + 1]) + (PACKED ? tile.slot : tile.start);
        c = AdamWCoefficients::from_row(row);
        key = tile_key(AdamWCoefficients::rounding_key(row), tile.start);
        stochastic = update.stochastic;
    }

    static LTP_HD Index index_of(const DeviceUpdate& update, const TileRow& tile) {
        Index index = {};
        if (tile.encoding == Encoding::kBitmap) {
            index.words = update.words + tile.index;
            index.ranks = update.ranks + tile.index / 2;
        } else {
            index.positions = update.positions + tile.index;
        }
        return index;
    }

    // Whether there is something to do; what leads out of the memory given traps.
    template <class Threads>
    static LTP_HD bool has_gradient(const DeviceUpdate& update, int64_t block, Threads& threads) {
        const TileRow tile = update.tiles[block / update.parts];
        if (!lies_inside(tile, update.room, INT64_MAX) || !ends_inside(tile, index_of(update, tile))) {
            threads.trap();
            return false;
        }
        return update.addresses[2 * tile.param + 1] != 0;
    }

    LTP_HD float value(int entry, int rank) const {
        return master != nullptr ? master[rank] : to_float32(param[entry]);
    }

    LTP_HD float raw_gradient(int entry, int rank) const { return to_float32(grad[PACKED ? rank : entry]); }

    LTP_HD float gradient(float raw, float value, int rank) const {
        return anchor == nullptr ? effective_gradient<false>(raw, 0.0f, 0.0f, c)
                                 : effective_gradient<true>(raw, value, anchor[rank], c);
    }

    LTP_HD void store(float value, int entry, int rank) const {
        if (master != nullptr) master[rank] = value;
        param[entry] = rounded(value, entry, Param());
    }

  private:
    LTP_HD float rounded(float value, int, float) const { return value; }

    LTP_HD BFloat16 rounded(float value, int entry, BFloat16 out) const {
        if (stochastic) return round_stochastically(value, random16(key, uint32_t(tile.start + entry)));
        round_to(value, out);
        return out;
    }

    LTP_HD Float16 rounded(float value, int, Float16 out) const {
        round_to(value, out);
        return out;
    }
};

LTP_HD bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % sizeof(Four) == 0; }

template <class Param, class Grad, bool PACKED, class Threads>
LTP_HD void update_block(const DeviceUpdate& update, int64_t block, uint16_t* listed, Threads& threads) {
    using OwnShare = Share<Param, Grad, PACKED>;
    if (!OwnShare::has_gradient(update, block, threads)) return;
    const int64_t param = update.tiles[block / update.parts].param;
    if (!AdamWCoefficients::applies(update.coefficients + AdamWCoefficients::kColumns * param)) return;
    OwnShare share(update, block, 4);
    float* const first = static_cast<float*>(share.exp_avg);
    float* const second = static_cast<float*>(share.exp_avg_sq);
    const bool plain = sizeof(Param) == 4 && sizeof(Grad) == 4 && share.master == nullptr && share.anchor == nullptr;
    const bool vectors =
        plain && is_aligned(share.param) && is_aligned(share.grad) && is_aligned(first) && is_aligned(second);
    for_each_batch(share.tile, share.index, share.part, update.parts, listed, threads, [&](int, const Batch& batch) {
        float value[kBatch], raw[kBatch], m[kBatch], v[kBatch];
        if (vectors && batch.consecutive) {
            const int at = batch.rank[0];
            Four p4 = *reinterpret_cast<const Four*>(reinterpret_cast<const char*>(share.param) + 4 * at);
            const Four g4 = *reinterpret_cast<const Four*>(reinterpret_cast<const char*>(share.grad) + 4 * at);
            Four m4 = *reinterpret_cast<const Four*>(first + at);
            Four v4 = *reinterpret_cast<const Four*>(second + at);
            for (int j = 0; j < kBatch; ++j) {
                const float g = effective_gradient<false>(g4.item[j], 0.0f, 0.0f, share.c);
                adamw_update(p4.item[j], g, m4.item[j], v4.item[j], share.c);
            }
            *reinterpret_cast<Four*>(reinterpret_cast<char*>(share.param) + 4 * at) = p4;
            *reinterpret_cast<Four*>(first + at) = m4;
            *reinterpret_cast<Four*>(second + at) = v4;
            return;
        }
        // All loads come before all stores: the memory of kBatch entries is waited for once.
        for (int j = 0; j < kBatch; ++j) {
            if (batch.rank[j] < 0) continue;
            value[j] = share.value(batch.entry[j], batch.rank[j]);
            raw[j] = share.raw_gradient(batch.entry[j], batch.rank[j]);
            m[j] = first[batch.rank[j]];
            v[j] = second[batch.rank[j]];
        }
        for (int j = 0; j < kBatch; ++j) {
            if (batch.rank[j] < 0) continue;
            adamw_update(value[j], share.gradient(raw[j], value[j], batch.rank[j]), m[j], v[j], share.c);
            first[batch.rank[j]] = m[j];
            second[batch.rank[j]] = v[j];
            share.store(value[j], batch.entry[j], batch.rank[j]);
        }
    });
}

template <class Param, class Grad, bool PACKED, class Threads>
LTP_HD void update_coded_block(const DeviceUpdate& update, int64_t block, Threads& threads) {
    using OwnShare = Share<Param, Grad, PACKED>;
    if (!OwnShare::has_gradient(update, block, threads)) return;
    const int64_t param = update.tiles[block / update.parts].param;
    if (!AdamWCoefficients::applies(update.coefficients + AdamWCoefficients::kColumns * param)) return;
    OwnShare share(update, block, 1);
    int8_t* const first = static_cast<int8_t*>(share.exp_avg);
    uint8_t* const second = static_cast<uint8_t*>(share.exp_avg_sq);
    float* const scales = share.scales;
    const int active = int(share.tile.active);
    const uint32_t key = moment_key(share.key);

    for_each_state_block(share.tile, share.part, update.parts, [&](int begin) {
        float* const own = scales + 2 * (begin / kStateBlockSize);
        typename Threads::template PerThread<float[2]> m, root;
        typename Threads::template PerThread<int[2]> entries;
        typename Threads::template PerThread<int> largest_m, largest_root;
        threads.each([&](int thread) {
            const float first_scale = own[0], second_scale = own[1];
            largest_m[thread] = largest_root[thread] = 0;
            for (int j = 0; j < 2; ++j) {
                const int rank = begin + j * kThreads + thread;
                if (rank >= active) continue;
                const int entry = entry_of(share.tile, share.index, rank);
                float value = share.value(entry, rank);
                float mean = decode_exp_avg(first[rank], first_scale);
                float square = decode_exp_avg_sq(second[rank], second_scale);
                const float g = share.gradient(share.raw_gradient(entry, rank), value, rank);
                root[thread][j] = adamw_update(value, g, mean, square, share.c);
                share.store(value, entry, rank);
                m[thread][j] = mean;
                entries[thread][j] = entry;
                const int mean_bits = int(bits_of_float(mean) & 0x7FFFFFFF);
                const int root_bits = int(bits_of_float(root[thread][j]) & 0x7FFFFFFF);
                largest_m[thread] = mean_bits > largest_m[thread] ? mean_bits : largest_m[thread];
                largest_root[thread] = root_bits > largest_root[thread] ? root_bits : largest_root[thread];
            }
        });
        // Both synchronise, so that every thread has read the old scales.
        const float first_scale = block_scale(float_from_bits(uint32_t(threads.largest(largest_m))));
        const float second_scale = block_scale(float_from_bits(uint32_t(threads.largest(largest_root))));
        threads.each([&](int thread) {
            const float first_inverse = inverse_scale<kFirstLevels>(first_scale);
            const float second_inverse = inverse_scale<kSecondLevels>(second_scale);
            for (int j = 0; j < 2; ++j) {
                const int rank = begin + j * kThreads + thread;
                if (rank >= active) continue;
                const uint32_t random = moment_bits(key, uint32_t(share.tile.start + entries[thread][j]));
                first[rank] = encode_exp_avg(m[thread][j], first_inverse, random);
                second[rank] = encode_exp_avg_sq(root[thread][j], second_inverse, random);
            }
            if (thread == 0) {
                own[0] = first_scale;
                own[1] = second_scale;
            }
        });
    });
}

// The sum of squares of the share's effective gradients; every thread adds its own in a fixed order.
template <class Param, class Grad, bool PACKED, class Threads>
LTP_HD double sum_squares_block(const DeviceUpdate& update, int64_t block, uint16_t* listed, Threads& threads) {
    using OwnShare = Share<Param, Grad, PACKED>;
    typename Threads::template PerThread<double> sums;
    threads.each([&](int thread) { sums[thread] = 0.0; });
    if (OwnShare::has_gradient(update, block, threads)) {
        const OwnShare share(update, block, 4);
        for_each_batch(share.tile, share.index, share.part, update.parts, listed, threads,
                       [&](int thread, const Batch& batch) {
                           for (int j = 0; j < kBatch; ++j) {
                               const int rank = batch.rank[j], entry = batch.entry[j];
                               if (rank < 0) continue;
                               const float value = share.anchor == nullptr ? 0.0f : share.value(entry, rank);
                               const double g = share.gradient(share.raw_gradient(entry, rank), value, rank);
                               sums[thread] += g * g;
                           }
                       });
    }
    return threads.sum(sums);
}

template <class Grad, class Threads>
LTP_HD void pack_block(const DeviceUpdate& update, float* out, bool accumulate, int64_t block, uint16_t* listed,
                       Threads& threads) {
    const TileRow tile = update.tiles[block / update.parts];
    if (!lies_inside(tile, update.room, INT64_MAX)) return threads.trap();
    const Index index = Share<Grad, Grad, false>::index_of(update, tile);
    if (!ends_inside(tile, index)) return threads.trap();
    if (update.addresses[tile.param] == 0) return;
    const Grad* const grad = reinterpret_cast<const Grad*>(update.addresses[tile.param]) + tile.start;
    float* const slots = out + tile.slot;
    for_each_batch(tile, index, int(block % update.parts), update.parts, listed, threads, [&](int, const Batch& batch) {
        for (int j = 0; j < kBatch; ++j) {
            if (batch.rank[j] < 0) continue;
            const float value = to_float32(grad[batch.entry[j]]);
            slots[batch.rank[j]] = accumulate ? slots[batch.rank[j]] + value : value;
        }
    });
}

}  // namespace ltp
