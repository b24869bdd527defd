// The work of one thread block in masked_adamw_, masked_sum_squares and masked_pack_. active_entries.cuh describes
// `Threads`.
#pragma once

#include "../common/adamw.h"
#include "../common/quantization.h"
#include "../common/rounding.h"
#include "active_entries.cuh"

namespace ltp {

constexpr int kBatch = 4;  // active entries of a thread in flight: more need more predicates than there are
constexpr int kCodedBatch = kStateBlock / kWarp;             // 8-bit moments: a warp has a block of them in flight
constexpr int kGradientVectors = 8;                          // of the passes over gradients, where there are vectors
constexpr int kCodedRound = kThreads / kWarp * kStateBlock;  // active entries of 8-bit moments in flight

static_assert(kWorkItem % kCodedRound == 0 && kWorkItem % (kThreads * kGradientVectors) == 0, "rounds are whole");

// The options that a kernel is compiled for. PACKED: gradients are float32 in slot order. MASTER: the exact values are
// given, also in slot order.
template <class PARAM, class GRAD, bool PACKED, bool MASTER, bool ANCHOR, bool STOCHASTIC>
struct Variant {
    using Param = PARAM;
    using Grad = GRAD;
    using Value = std::conditional_t<MASTER, float, PARAM>;
    static constexpr bool kPacked = PACKED, kMaster = MASTER, kAnchor = ANCHOR, kStochastic = STOCHASTIC;
};

template <class Body>
auto with_flag(bool flag, Body&& body) {
    return flag ? body(std::true_type()) : body(std::false_type());
}

// Calls body with the `Variant` of an update.
template <class Body>
void with_variant(const Update& update, Body&& body) {
    with_storage_types(update.param_dtype, update.grad_dtype, update.packed, [&](auto param, auto grad, auto packed) {
        with_flag(update.state.anchor != nullptr, [&](auto anchor) {
            using Param = decltype(param);
            using Grad = decltype(grad);
            constexpr bool kPacked = decltype(packed)::value, kAnchor = decltype(anchor)::value;
            if (update.state.master != nullptr) return body(Variant<Param, Grad, kPacked, true, kAnchor, false>());
            if constexpr (std::is_same_v<Param, BFloat16>) {
                if (update.stochastic) return body(Variant<Param, Grad, kPacked, false, kAnchor, true>());
            }
            return body(Variant<Param, Grad, kPacked, false, kAnchor, false>());
        });
    });
}

// The same for a norm. It reads values only for a pull.
template <class Body>
void with_norm_variant(const Update& update, Body&& body) {
    with_storage_types(update.param_dtype, update.grad_dtype, update.packed, [&](auto param, auto grad, auto packed) {
        using Param = decltype(param);
        using Grad = decltype(grad);
        constexpr bool kPacked = decltype(packed)::value;
        if (update.state.anchor == nullptr) return body(Variant<Grad, Grad, kPacked, false, false, false>());
        if (update.state.master != nullptr) return body(Variant<Grad, Grad, kPacked, true, true, false>());
        return body(Variant<Param, Grad, kPacked, false, true, false>());
    });
}

// A work item, its tile, and the tile's index.
struct Share {
    WorkItem item;
    TileRow tile;
    Index index;
    int count;  // active entries

    // Traps if it leads outside the memory of the call, and so does `ends_inside`.
    template <class Threads>
    LTP_HD bool resolve(const DeviceUpdate& update, int64_t number, Threads& threads) {
        item = threads.load(update.items + number);
        if (!lies_in(item.tile, 1, update.n_tiles)) return trapped(threads);
        tile = threads.load(update.tiles + item.tile);
        if (!lies_inside(tile, update.room, INT64_MAX) || !lies_inside(item, tile)) return trapped(threads);
        index = {};
        if (tile.encoding == Encoding::kBitmap) {
            index.words = update.words + tile.index;
            index.ranks = update.ranks + tile.index / 2;
        } else {
            index.positions = update.positions + tile.index;
        }
        count = least(kWorkItem, int(tile.active) - item.first);
        return true;
    }

    template <class Threads>
    LTP_HD bool ends_inside(Threads& threads) const {
        return ltp::ends_inside(tile, index, threads) || trapped(threads);
    }

    // Calls visit(thread, entries) for batches of its active entries: `Neighbours`, `VECTORS` of them, or `Scattered`.
    // With BY_RANK, nothing is read by entry, and entries are not known. vectors: whether all can be read in vectors.
    template <int VECTORS, bool BY_RANK, class Threads, class Visit>
    LTP_HD void for_each_batch(bool vectors, Listed& listed, Threads& threads, Visit visit) const {
        constexpr int kRound = VECTORS * kThreads;
        const bool is_consecutive = BY_RANK || tile.encoding == Encoding::kFull;
        const int whole = vectors && is_consecutive ? count / kRound * kRound : 0;
        threads.each([&](int thread) {
            LTP_KEEP_LOOP
            for (int at = 0; at < whole; at += kRound) {
                visit(thread, Neighbours<VECTORS, 4 * kThreads>(item.first + at + 4 * thread));
            }
        });
        if (whole == count) return;
        if constexpr (!BY_RANK) list_entries(tile, index, item, whole, count, listed, threads);
        threads.each([&](int thread) {
            LTP_KEEP_LOOP
            for (int at = whole + thread; at < count; at += kBatch * kThreads) {
                visit(thread, Scattered<kBatch, kThreads>(listed, at, count, item.first));
            }
        });
    }

  private:
    template <class Threads>
    static LTP_HD bool trapped(Threads& threads) {
        threads.trap();
        return false;
    }
};

// The share, with the addresses of its tile.
template <class V>
struct GradientShare : Share {
    using Param = typename V::Param;
    using Grad = typename V::Grad;

    AdamWCoefficients c;
    uint32_t rounding_key;
    Param* param;
    const Grad* grad;
    float* master;
    const float* anchor;

    // Whether there is something to do: an update does nothing for a parameter whose APPLY is 0.
    template <class Threads>
    LTP_HD bool resolve(const DeviceUpdate& update, int64_t number, bool is_update, Threads& threads) {
        if (!Share::resolve(update, number, threads)) return false;
        const Prepared prepared =
            update.prepared[tile.param];  // a plain load: uniform registers hold it for all threads
        if (!ends_inside(threads) || prepared.grad == 0 || (is_update && prepared.applies == 0)) return false;
        c = prepared.c;
        // as in all backends, the factors of gradients and pull are multiplied in float64 before they are rounded
        if (is_update && update.clip != nullptr)
            c = CoefficientRow(update.coefficients, tile.param).rounded(update.clip);
        rounding_key = prepared.rounding_key;
        param = reinterpret_cast<Param*>(prepared.param) + tile.start;
        grad = reinterpret_cast<const Grad*>(prepared.grad) + (V::kPacked ? tile.slot : tile.start);
        if constexpr (V::kMaster) master = update.state.master + tile.slot;
        if constexpr (V::kAnchor) anchor = update.state.anchor + tile.slot;
        return true;
    }

    LTP_HD bool can_read_vectors() const {
        using Four = Neighbours<4, 4>;
        bool can = Four::can_read(grad);
        if constexpr (!V::kMaster || V::kAnchor) can = can && Four::can_read(param);
        if constexpr (V::kMaster) can = can && Four::can_read(master);
        if constexpr (V::kAnchor) can = can && Four::can_read(anchor);
        return can;
    }
};

// Weights and gradients of a batch.
template <class V, class Entries>
struct Loaded {
    typename Entries::template Numbers<typename V::Value> value;
    typename Entries::template Numbers<typename V::Grad> grad;
    typename Entries::template Numbers<float> anchor;

    // values: whether they are needed
    template <class Threads>
    LTP_HD void load(const GradientShare<V>& share, const Entries& entries, bool values, Threads& threads) {
        if constexpr (V::kMaster) {
            if (values) entries.load_by_rank(threads, share.master, value);
        } else {
            if (values) entries.load_by_entry(threads, share.param, value);
        }
        if constexpr (V::kPacked) {
            entries.load_by_rank(threads, share.grad, grad);
        } else {
            entries.load_by_entry(threads, share.grad, grad);
        }
        if constexpr (V::kAnchor) entries.load_by_rank(threads, share.anchor, anchor);
    }

    LTP_HD float gradient(int j, float exact, const AdamWCoefficients& c) const {
        if constexpr (V::kAnchor) return effective_gradient<true>(grad[j], exact, anchor[j], c);
        return effective_gradient<false>(grad[j], 0.0f, 0.0f, c);
    }
};

// Where the random bits of a tile come from.
struct Rounding {
    uint32_t key;    // folded
    uint32_t start;  // the lower half of the flat index of its first entry
};

// Stores the values of N active entries.
template <class V, int N, class Entries, class Threads>
LTP_HD void store_values(const GradientShare<V>& share, const Entries& entries, const float (&value)[N],
                         const Rounding& rounding, Threads& threads) {
    typename V::Param rounded[N];
    if constexpr (V::kStochastic) {
        entries.for_each_index(threads, rounding.key, rounding.start, [&](int j, uint32_t index) {
            rounded[j] = round_stochastically(value[j], mix_folded(index) >> 16);
        });
    } else {
        for (int j = 0; j < N; ++j) round_to(value[j], rounded[j]);
    }
    entries.store_by_entry(threads, share.param, rounded);
    if constexpr (V::kMaster) entries.store_by_rank(threads, share.master, value);
}

template <class V, class Threads>
LTP_HD void update_block(const DeviceUpdate& update, int64_t number, Listed& listed, Threads& threads) {
    GradientShare<V> share;
    if (!share.resolve(update, number, true, threads)) return;
    const TileRow& tile = share.tile;
    float* const exp_avg = static_cast<float*>(update.state.exp_avg) + tile.slot;
    float* const exp_avg_sq = static_cast<float*>(update.state.exp_avg_sq) + tile.slot;
    const Rounding rounding = {folded(tile_key(share.rounding_key, tile.start)), uint32_t(tile.start)};
    using Four = Neighbours<4, 4>;
    const bool vectors = (!V::kStochastic || tile.start % 4 == 0) && share.can_read_vectors() &&
                         Four::can_read(share.param) && Four::can_read(exp_avg) && Four::can_read(exp_avg_sq);
    share.template for_each_batch<kBatch, false>(vectors, listed, threads, [&](int, const auto& entries) {
        constexpr int N = kBatch;
        using Entries = std::decay_t<decltype(entries)>;
        Loaded<V, Entries> loaded;
        typename Entries::template Numbers<float> old_m, old_v;
        loaded.load(share, entries, true, threads);
        entries.load_by_rank(threads, exp_avg, old_m);
        entries.load_by_rank(threads, exp_avg_sq, old_v);
        float value[N], m[N], v[N];
        for (int j = 0; j < N; ++j) {
            value[j] = loaded.value[j];
            m[j] = old_m[j];
            v[j] = old_v[j];
            adamw_update(value[j], loaded.gradient(j, value[j], share.c), m[j], v[j], share.c);
        }
        entries.store_by_rank(threads, exp_avg, m);
        entries.store_by_rank(threads, exp_avg_sq, v);
        store_values(share, entries, value, rounding, threads);
    });
}

// A warp processes a block of 8-bit moments at a time, so that no other warp waits for its scales.
template <class V, class Threads>
LTP_HD void update_coded_block(const DeviceUpdate& update, int64_t number, Listed& listed, Threads& threads) {
    constexpr int N = kCodedBatch;
    GradientShare<V> share;
    if (!share.resolve(update, number, true, threads)) return;
    const TileRow& tile = share.tile;
    const int first = share.item.first, count = share.count;
    int8_t* const exp_avg = static_cast<int8_t*>(update.state.exp_avg) + tile.slot;
    uint8_t* const exp_avg_sq = static_cast<uint8_t*>(update.state.exp_avg_sq) + tile.slot;
    Vector<float, 2>* const scales =
        reinterpret_cast<Vector<float, 2>*>(update.state.scales) + tile.block + first / kStateBlock;
    const uint32_t key = tile_key(share.rounding_key, tile.start), moments = threads.keep(folded(moment_key(key)));
    const Rounding rounding = {folded(key), uint32_t(tile.start)};
    using Four = Neighbours<4, 4>;
    const bool vectors = tile.encoding == Encoding::kFull && tile.start % 4 == 0 && share.can_read_vectors() &&
                         Four::can_read(share.param) && Four::can_read(exp_avg) && Four::can_read(exp_avg_sq);
    list_entries(tile, share.index, share.item, vectors ? count / kStateBlock * kStateBlock : 0, count, listed,
                 threads);

    // Calls visit(entries) for the thread's entries of the block that begins at a place of the list.
    const auto with_entries = [&](int begin, int thread, auto visit) {
        if (vectors && begin + kStateBlock <= count) {
            visit(Neighbours<N, 4 * kWarp>(first + begin + 4 * (thread % kWarp)));
        } else if (begin + thread % kWarp < count) {
            visit(Scattered<N, kWarp>(listed, begin + thread % kWarp, count, first));
        }
    };
    LTP_KEEP_LOOP
    for (int round = 0; round < count; round += kCodedRound) {
        typename Threads::template PerThread<float[N]> m, root;
        typename Threads::template PerThread<uint32_t> largest_m, largest_root;
        threads.each([&](int thread) {
            const int begin = round + thread / kWarp * kStateBlock;
            largest_m[thread] = largest_root[thread] = 0;
            if (begin + thread % kWarp >= count) return;
            const Vector<float, 2> scale = threads.load(scales + unsigned(begin) / kStateBlock);
            float value[N], gradient[N], first[N], second[N];
            with_entries(begin, thread, [&](const auto& entries) {
                using Entries = std::decay_t<decltype(entries)>;
                Loaded<V, Entries> loaded;
                typename Entries::template Numbers<int8_t> first_code;
                typename Entries::template Numbers<uint8_t> second_code;
                loaded.load(share, entries, true, threads);
                entries.load_by_rank(threads, exp_avg, first_code);
                entries.load_by_rank(threads, exp_avg_sq, second_code);
                for (int j = 0; j < N; ++j) {
                    value[j] = threads.keep(loaded.value[j]);
                    gradient[j] = threads.keep(loaded.gradient(j, value[j], share.c));
                    first[j] = threads.keep(first_code[j]);
                    second[j] = threads.keep(second_code[j]);
                }
            });
            for (int j = 0; j < N; ++j) {
                float square = decode_exp_avg_sq(second[j], scale.item[1]);
                m[thread][j] = decode_exp_avg(first[j], scale.item[0]);
                root[thread][j] = adamw_update(value[j], gradient[j], m[thread][j], square, share.c);
                const uint32_t m_bits = bits_of_float(m[thread][j]) & 0x7FFFFFFF;
                const uint32_t root_bits = bits_of_float(root[thread][j]);
                largest_m[thread] = m_bits > largest_m[thread] ? m_bits : largest_m[thread];
                largest_root[thread] = root_bits > largest_root[thread] ? root_bits : largest_root[thread];
            }
            with_entries(begin, thread,
                         [&](const auto& entries) { store_values(share, entries, value, rounding, threads); });
        });
        threads.largest_of_warp(largest_m);
        threads.largest_of_warp(largest_root);  // every thread of the warp has read the old scales
        threads.each([&](int thread) {
            const int begin = round + thread / kWarp * kStateBlock;
            if (begin + thread % kWarp >= count) return;
            Vector<float, 2> scale;
            scale.item[0] = block_scale(float_from_bits(largest_m[thread]));
            scale.item[1] = block_scale(float_from_bits(largest_root[thread]));
            if (thread % kWarp == 0) threads.store(scales + unsigned(begin) / kStateBlock, scale);
            const float first_inverse = inverse_scale<kFirstLevels>(scale.item[0]);
            const float second_inverse = inverse_scale<kSecondLevels>(scale.item[1]);
            int8_t first[N];
            uint8_t second[N];
            uint32_t random[N];
            with_entries(begin, thread, [&](const auto& entries) {
                entries.for_each_index(threads, moments, rounding.start,
                                       [&](int j, uint32_t index) { random[j] = mix_folded(index); });
            });
            encode_moments(m[thread], root[thread], first_inverse, second_inverse, random, first, second,
                           [&](float x) { return threads.square_root(x); });
            with_entries(begin, thread, [&](const auto& entries) {
                entries.store_by_rank(threads, exp_avg, first);
                entries.store_by_rank(threads, exp_avg_sq, second);
            });
        });
    }
}

// The sum, on thread 0, always in the same order.
template <class Threads>
LTP_HD double sum_of(const double* values, int64_t count, Threads& threads) {
    typename Threads::template PerThread<double> sums;
    threads.each([&](int thread) {
        sums[thread] = 0.0;
        for (int64_t i = thread; i < count; i += kThreads) sums[thread] += values[i];
    });
    return threads.sum(sums);
}

// The sum of squares of the effective gradients of a work item. Every thread adds its own ones in a fixed order.
template <class V, class Threads>
LTP_HD double sum_squares_of(const GradientShare<V>& share, Listed& listed, Threads& threads) {
    constexpr bool kByRank = V::kPacked && !V::kAnchor;
    constexpr int kVectors = V::kAnchor ? kBatch : kGradientVectors;
    const bool vectors = share.can_read_vectors();
    typename Threads::template PerThread<double> sums;
    threads.each([&](int thread) { sums[thread] = 0.0; });
    share.template for_each_batch<kVectors, kByRank>(vectors, listed, threads, [&](int thread, const auto& entries) {
        using Entries = std::decay_t<decltype(entries)>;
        Loaded<V, Entries> loaded;
        loaded.load(share, entries, V::kAnchor, threads);
        for (int j = 0; j < Entries::kCount; ++j) {
            float value = 0.0f;
            if constexpr (V::kAnchor) value = loaded.value[j];
            const double g = loaded.gradient(j, value, share.c);
            sums[thread] += entries.has(j) ? g * g : 0.0;
        }
    });
    return threads.sum(sums);
}

template <class V, class Threads>
LTP_HD void sum_squares_block(const DeviceUpdate& update, const Total& total, int64_t number, Listed& listed,
                              Threads& threads) {
    GradientShare<V> share = {};
    const bool has_gradient = share.resolve(update, number, false, threads);
    if (share.count == 0) return;  // the share has trapped
    const double own = has_gradient ? sum_squares_of(share, listed, threads) : 0.0;
    const int64_t tile = total.first + share.item.tile;
    double* const of_tile = total.sums + tile * kItemsPerTile;
    threads.each([&](int thread) {
        if (thread == 0) of_tile[share.item.first / kWorkItem] = own;
    });
    if (total.arrived == nullptr) return;
    const int64_t group = tile / kNormGroup, groups = (total.tiles + kNormGroup - 1) / kNormGroup;
    const int64_t left = total.tiles - group * kNormGroup, in_group = left < kNormGroup ? left : kNormGroup;
    double* const tile_sums = total.sums + total.tiles * kItemsPerTile;
    double* const group_sums = tile_sums + total.tiles;

    const int items = int((share.tile.active + kWorkItem - 1) / kWorkItem);
    if (!threads.last(total.arrived + 1 + groups + tile, items)) return;
    const double tile_sum = sum_of(of_tile, items, threads);
    threads.each([&](int thread) {
        if (thread == 0) tile_sums[tile] = tile_sum;
    });
    if (!threads.last(total.arrived + 1 + group, in_group)) return;
    const double group_sum = sum_of(tile_sums + group * kNormGroup, in_group, threads);
    threads.each([&](int thread) {
        if (thread == 0) group_sums[group] = group_sum;
    });
    if (!threads.last(total.arrived, groups)) return;
    const double squares = sum_of(group_sums, groups, threads);
    threads.each([&](int thread) {
        if (thread == 0) total.finish(squares);
    });
}

template <class Grad, bool ACCUMULATE, class Threads>
LTP_HD void pack_block(const DeviceUpdate& update, float* out, int64_t number, Listed& listed, Threads& threads) {
    Share share = {};
    if (!share.resolve(update, number, threads)) return;
    const int64_t param = share.tile.param;
    const uint64_t address = update.prepared == nullptr ? update.grad : threads.load(&update.prepared[param].grad);
    if (!share.ends_inside(threads) || address == 0) return;
    const Grad* const grad = reinterpret_cast<const Grad*>(address) + share.tile.start;
    float* const slots = out + share.tile.slot;
    using Four = Neighbours<4, 4>;
    const bool vectors = Four::can_read(grad) && Four::can_read(slots);
    share.template for_each_batch<kGradientVectors, false>(vectors, listed, threads, [&](int, const auto& entries) {
        using Entries = std::decay_t<decltype(entries)>;
        typename Entries::template Numbers<Grad> read;
        typename Entries::template Numbers<float> before;
        entries.load_by_entry(threads, grad, read);
        if constexpr (ACCUMULATE) entries.load_by_rank(threads, slots, before);
        float sum[Entries::kCount];
        for (int j = 0; j < Entries::kCount; ++j) sum[j] = ACCUMULATE ? before[j] + read[j] : read[j];
        entries.store_by_rank(threads, slots, sum);
    });
}

}  // namespace ltp
