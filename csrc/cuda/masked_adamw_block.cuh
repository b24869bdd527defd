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

LTP_HD Index index_of(const DeviceUpdate& update, const TileRow& tile) {
    Index index = {};
    if (tile.encoding == Encoding::kBitmap) {
        index.words = update.words + tile.index;
        index.ranks = update.ranks + tile.index / 2;
    } else {
        index.positions = update.positions + tile.index;
    }
    return index;
}

// Where a thread block works: its tile, and its part of the `parts` that share it.
struct Place {
    int64_t tile;
    int part;
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

    // own: the row of `place`; prepared: that of its parameter; moment_size: bytes of a moment
    LTP_HD Share(const DeviceUpdate& update, const Place& place, const TileRow& own, const Prepared& prepared,
                 int64_t moment_size)
        : PackedState(update.state.of_tile(own, moment_size)), tile(own) {
        part = place.part;
        index = index_of(update, tile);
        param = reinterpret_cast<Param*>(prepared.param) + tile.start;
        grad = reinterpret_cast<const Grad*>(prepared.grad) + (PACKED ? tile.slot : tile.start);
        c = prepared.c;
        key = tile_key(prepared.rounding_key, tile.start);
        stochastic = update.stochastic;
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

// Whether a tile leads to memory that was given; else it traps.
template <class Threads>
LTP_HD bool leads_inside(const DeviceUpdate& update, const TileRow& tile, Threads& threads) {
    if (lies_inside(tile, update.room, INT64_MAX) && ends_inside(tile, index_of(update, tile))) return true;
    threads.trap();
    return false;
}

// The coefficients are those of `prepared`, unless they are clipped: then gradients and pull are scaled in float64, as
// everywhere, before they are rounded.
LTP_HD void clip_coefficients(const DeviceUpdate& update, int64_t param, Prepared& prepared) {
    if (update.clip == nullptr) return;
    prepared.c = CoefficientRow(update.coefficients, param).rounded(update.clip);
}

LTP_HD bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % sizeof(Four) == 0; }

template <class Param, class Grad, bool PACKED, class Threads>
LTP_HD void update_block(const DeviceUpdate& update, const Place& place, uint16_t* listed, Threads& threads) {
    const TileRow tile = update.tiles[place.tile];
    if (!leads_inside(update, tile, threads)) return;
    Prepared prepared = update.prepared[tile.param];
    if (prepared.grad == 0 || prepared.applies == 0) return;
    clip_coefficients(update, tile.param, prepared);
    const Share<Param, Grad, PACKED> share(update, place, tile, prepared, 4);
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
LTP_HD void update_coded_block(const DeviceUpdate& update, const Place& place, Threads& threads) {
    const TileRow tile = update.tiles[place.tile];
    if (!leads_inside(update, tile, threads)) return;
    Prepared prepared = update.prepared[tile.param];
    if (prepared.grad == 0 || prepared.applies == 0) return;
    clip_coefficients(update, tile.param, prepared);
    const Share<Param, Grad, PACKED> share(update, place, tile, prepared, 1);
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
LTP_HD double sum_squares_of_share(const DeviceUpdate& update, const Place& place, uint16_t* listed, Threads& threads) {
    typename Threads::template PerThread<double> sums;
    threads.each([&](int thread) { sums[thread] = 0.0; });
    const TileRow tile = update.tiles[place.tile];
    if (!leads_inside(update, tile, threads)) return threads.sum(sums);
    const Prepared prepared = update.prepared[tile.param];
    if (prepared.grad == 0) return threads.sum(sums);
    const Share<Param, Grad, PACKED> share(update, place, tile, prepared, 4);
    for_each_batch(tile, share.index, share.part, update.parts, listed, threads, [&](int thread, const Batch& batch) {
        for (int j = 0; j < kBatch; ++j) {
            const int rank = batch.rank[j], entry = batch.entry[j];
            if (rank < 0) continue;
            const float value = share.anchor == nullptr ? 0.0f : share.value(entry, rank);
            const double g = share.gradient(share.raw_gradient(entry, rank), value, rank);
            sums[thread] += g * g;
        }
    });
    return threads.sum(sums);
}

// On thread 0, always in the same order.
template <class Threads>
LTP_HD double sum_of(const double* values, int64_t count, Threads& threads) {
    typename Threads::template PerThread<double> sums;
    threads.each([&](int thread) {
        sums[thread] = 0.0;
        for (int64_t i = thread; i < count; i += kThreads) sums[thread] += values[i];
    });
    return threads.sum(sums);
}

template <class Param, class Grad, bool PACKED, class Threads>
LTP_HD void sum_squares_block(const DeviceUpdate& update, const Total& total, const Place& place, uint16_t* listed,
                              Threads& threads) {
    const int64_t parts = update.parts, tile = total.first + place.tile;
    const double own = sum_squares_of_share<Param, Grad, PACKED>(update, place, listed, threads);
    threads.each([&](int thread) {
        if (thread == 0) total.sums[tile * parts + place.part] = own;
    });
    if (total.arrived == nullptr) return;
    const int64_t group = tile / kNormGroup, groups = (total.tiles + kNormGroup - 1) / kNormGroup;
    const int64_t left = total.tiles - group * kNormGroup;
    const int64_t in_group = parts * (left < kNormGroup ? left : kNormGroup);
    if (!threads.last(total.arrived + 1 + group, in_group)) return;
    double* const group_sums = total.sums + total.tiles * parts;
    const double of_group = sum_of(total.sums + group * kNormGroup * parts, in_group, threads);
    threads.each([&](int thread) {
        if (thread == 0) group_sums[group] = of_group;
    });
    if (!threads.last(total.arrived, groups)) return;
    const double squares = sum_of(group_sums, groups, threads);
    threads.each([&](int thread) {
        if (thread == 0) total.finish(squares);
    });
}

template <class Grad, class Threads>
LTP_HD void pack_block(const DeviceUpdate& update, float* out, bool accumulate, const Place& place, uint16_t* listed,
                       Threads& threads) {
    const TileRow tile = update.tiles[place.tile];
    if (!leads_inside(update, tile, threads)) return;
    const uint64_t address = update.prepared == nullptr ? update.grad : update.prepared[tile.param].grad;
    if (address == 0) return;
    const Index index = index_of(update, tile);
    const Grad* const grad = reinterpret_cast<const Grad*>(address) + tile.start;
    float* const slots = out + tile.slot;
    for_each_batch(tile, index, place.part, update.parts, listed, threads, [&](int, const Batch& batch) {
        for (int j = 0; j < kBatch; ++j) {
            if (batch.rank[j] < 0) continue;
            const float value = to_float32(grad[batch.entry[j]]);
            slots[batch.rank[j]] = accumulate ? slots[batch.rank[j]] + value : value;
        }
    });
}

}  // namespace ltp
