// The work of one thread block in the passes of topk_delta. active_entries.cuh describes `Threads`.
#pragma once

#include <type_traits>

#include "../common/delta_key.h"
#include "active_entries.cuh"
#include "topk_delta.h"

namespace ltp {

// Before a loop: how often nvcc unrolls it, as a constant expression.
#if defined(__CUDACC__)
#define LTP_PRAGMA(text) _Pragma(#text)
#define LTP_UNROLL(times) LTP_PRAGMA(unroll(times))
#else
#define LTP_UNROLL(times)
#endif

constexpr int kHistogramThreads = 1024;
constexpr int kBandThreads = 256;
constexpr int kCandidateThreads = 1024;  // a warp for each tile
constexpr int kTieThreads = 128;         // a block for each tile
constexpr int kWordsPerTile = int(kTile / 32);
constexpr int kShare = 32;  // entries of a thread between two exchanges with its warp: one word
constexpr int kWarpShare = 32 * kShare;
constexpr int kCollected = 2048;  // candidates whose positions are listed in shared memory at a time

// The storage type of an absent `initial`.
struct Zeros {};

// Calls body(initial, tuned) with values of the storage types.
template <class Body>
void with_pair_types(const DevicePairs& pairs, Body&& body) {
    with_storage_type(Dtype(pairs.tuned_dtype), [&](auto tuned) {
        if (pairs.initial_dtype == -1) return body(Zeros(), tuned);
        with_storage_type(Dtype(pairs.initial_dtype), [&](auto initial) { body(initial, tuned); });
    });
}

LTP_HD float delta_of(Zeros, float tuned) { return tuned; }

template <class Initial>
LTP_HD float delta_of(Initial initial, float tuned) {
    return tuned - to_float32(initial);
}

template <class T, int N>
LTP_HD Vector<T, N> load_vector(const T* from) {
#if defined(__CUDA_ARCH__)
    // Tells the compiler that this is global memory that is never written.
    constexpr size_t kBytes = sizeof(T) * N;
    using Single = std::conditional_t<kBytes == 4, int, short>;
    using Raw = std::conditional_t<kBytes == 16, int4, std::conditional_t<kBytes == 8, int2, Single>>;
    const Raw raw = __ldg(reinterpret_cast<const Raw*>(from));
    Vector<T, N> vector;
    memcpy(&vector, &raw, sizeof vector);
    return vector;
#else
    return *reinterpret_cast<const Vector<T, N>*>(from);
#endif
}

template <class T>
LTP_HD float load_float32(const T* from) {
    return to_float32(load_vector<T, 1>(from).item[0]);
}

LTP_HD bool is_served(const DevicePairs& pairs, const DeltaPair& pair) {
    return pair.initial_dtype == pairs.initial_dtype && pair.tuned_dtype == pairs.tuned_dtype;
}

// The entries of one tile of a pair.
template <class Initial, class Tuned>
struct PairTile {
    static constexpr bool kHasInitial = !std::is_same_v<Initial, Zeros>;
    static constexpr int kVector = sizeof(Initial) == 4 || sizeof(Tuned) == 4 ? 4 : 8;  // entries of 16 bytes

    const Initial* initial;
    const Tuned* tuned;
    int length;
    bool aligned;

    LTP_HD PairTile(const DeltaPair& pair, int64_t number) {
        const int64_t start = (number - pair.tile) * kTile;
        initial = kHasInitial ? reinterpret_cast<const Initial*>(pair.initial) + start : nullptr;
        tuned = reinterpret_cast<const Tuned*>(pair.tuned) + start;
        length = int(pair.size - start < kTile ? pair.size - start : kTile);
        aligned = (pair.initial | pair.tuned) % 16 == 0;
    }

    LTP_HD int32_t key(int entry) const {
        float delta = load_float32(tuned + entry);
        if constexpr (kHasInitial) delta -= load_float32(initial + entry);
        return delta_key(delta);
    }

    // The keys of kVector entries from `entry` on, a multiple of kVector; 0 beyond the end. With WHOLE, none is beyond
    // the end, and they are loaded as a vector.
    template <bool WHOLE>
    LTP_HD void keys(int entry, int32_t* out) const {
        if constexpr (WHOLE) {
            Vector<Initial, kVector> before = {};
            if constexpr (kHasInitial) before = load_vector<Initial, kVector>(initial + entry);
            const auto after = load_vector<Tuned, kVector>(tuned + entry);
            for (int j = 0; j < kVector; ++j) out[j] = delta_key(delta_of(before.item[j], to_float32(after.item[j])));
        } else {
            for (int j = 0; j < kVector; ++j) out[j] = entry + j < length ? key(entry + j) : 0;
        }
    }

    // Calls visit(std::true_type or std::false_type), the argument of keys(), for entries first .. end - 1.
    template <class Visit>
    LTP_HD void with_loads(int first, int end, Visit visit) const {
        if (aligned && end <= length) {
            visit(std::true_type());
        } else if (first < length) {
            visit(std::false_type());
        }
    }
};

// The part of the bins that a launch counts, in shared memory: `count` of them from `first` on.
struct BinRange {
    int row;           // bins of a group
    int first, count;  // the range
    int shift;         // low bits of a key that its bin ignores
};

template <int N, class Threads>
LTP_HD void empty(uint32_t* bins, int count, Threads& threads) {
    threads.each([&](int thread) {
        for (int bin = thread; bin < count; bin += N) bins[bin] = 0;
    });
    threads.sync();
}

// Adds the bins that are not empty to `to`, and empties them.
template <int N, class Count, class Threads>
LTP_HD void merge_into(Count* to, uint32_t* bins, int count, Threads& threads) {
    threads.sync();
    threads.each([&](int thread) {
        for (int bin = thread; bin < count; bin += N) {
            if (bins[bin] != 0) threads.add(to + bin, Count(bins[bin]));
            bins[bin] = 0;
        }
    });
    threads.sync();
}

// Counts the keys of part `block` of `blocks` of the tiles. bins: [range.count] in shared memory, of 32 bits, since no
// thread block can have 2^32 entries.
template <class Initial, class Tuned, class Threads>
LTP_HD void histogram_block(const DevicePairs& pairs, const Histogram& histogram, const BinRange& range, int64_t block,
                            int64_t blocks, uint32_t* bins, Threads& threads) {
    using Tile = PairTile<Initial, Tuned>;
    constexpr int kLoads = 16 / Tile::kVector, kStep = 16 * kHistogramThreads;
    const int64_t begin = pairs.n_tiles * block / blocks, end = pairs.n_tiles * (block + 1) / blocks;
    if (begin == end) return;
    const auto merge = [&](int64_t group) {
        int64_t* const row = histogram.bins + group * range.row + range.first;
        merge_into<kHistogramThreads>(row, bins, range.count, threads);
    };
    empty<kHistogramThreads>(bins, range.count, threads);
    typename Threads::template PerThread<int32_t> largest;
    threads.each([&](int thread) { largest[thread] = 0; });
    int64_t group = pairs.rows[pairs.of_tile[begin]].group;
    for (int64_t number = begin; number < end; ++number) {
        const DeltaPair pair = pairs.rows[pairs.of_tile[number]];
        if (!is_served(pairs, pair)) continue;
        if (pair.group != group) {
            merge(group);
            group = pair.group;
        }
        const Tile tile(pair, number);
        const int32_t prefix = histogram.prefixes == nullptr ? 0 : int32_t(histogram.prefixes[group]) << 16;
        const uint32_t base = uint32_t(prefix + (range.first << range.shift));
        threads.each([&](int thread) {
            const auto count = [&](int32_t key) {
                const uint32_t bin =
                    (uint32_t(key) - base) >> range.shift;  // keys below the range wrap to bins beyond it
                if (key != 0 && bin < uint32_t(range.count)) threads.count(bins + bin);
                largest[thread] = key > largest[thread] ? key : largest[thread];
            };
            int first = 0;
            for (; tile.aligned && first + kStep <= tile.length; first += kStep) {
                // all loads come before the first count, so that they are waited for together
                int32_t keys[kLoads][Tile::kVector];
                for (int load = 0; load < kLoads; ++load) {
                    tile.template keys<true>(first + (load * kHistogramThreads + thread) * Tile::kVector, keys[load]);
                }
                for (int i = 0; i < kLoads * Tile::kVector; ++i) count(keys[i / Tile::kVector][i % Tile::kVector]);
            }
            for (int entry = first + thread; entry < tile.length; entry += kHistogramThreads) count(tile.key(entry));
        });
    }
    merge(group);
    threads.each([&](int thread) {
        if (largest[thread] >= kFirstNonfinite) *histogram.nonfinite = 1;
    });
}

// The shared memory of band_block.
struct BandScratch {
    uint32_t inside[kWordsPerTile];  // the bitmap of the candidates
    uint16_t listed[kCollected];
    int64_t offset;
};

// A transposition in groups of 32 / N lanes. Before it, piece s of a lane, the N bits from N * s on, belongs to word
// number s of the group. After it, lane i has word i.
template <int N, class Threads>
LTP_HD void gather_words(typename Threads::template PerThread<uint32_t>& bits, Threads& threads) {
    typename Threads::template PerThread<uint32_t> other;
    for (int width = 16; width >= N; width /= 2) {
        threads.from_lane_xor(bits, width / N, other);
        threads.each([&](int thread) {
            const uint32_t low = 0xFFFFFFFFu / ((1u << width) + 1);  // the lower half of every 2 * width bits
            const uint32_t received = other[thread];
            bits[thread] = (thread & width / N) == 0 ? (bits[thread] & low) | (received & low) << width
                                                     : (bits[thread] & ~low) | (received & ~low) >> width;
        });
    }
}

// The band pass over one tile: marks, counts and collects.
template <class Initial, class Tuned, class Threads>
LTP_HD void band_block(const DevicePairs& pairs, const Band& band, int64_t number, BandScratch& scratch,
                       Threads& threads) {
    using Tile = PairTile<Initial, Tuned>;
    constexpr int kVector = Tile::kVector, kLoads = kShare / kVector;
    constexpr int kOwnWords = kWordsPerTile / kBandThreads;
    const DeltaPair pair = pairs.rows[pairs.of_tile[number]];
    if (!is_served(pairs, pair)) return;
    const Tile tile(pair, number);
    const int n_words = 2 * ((tile.length + 63) / 64);
    int32_t* const words = band.words + pair.word + (number - pair.tile) * kWordsPerTile;
    const int32_t lower = key_below(band.low[pair.group]), upper = key_below(band.high[pair.group]);

    typename Threads::template PerThread<uint32_t> marked, between;
    typename Threads::template PerThread<int32_t> largest;
    typename Threads::template PerThread<int> n_above, n_inside;
    threads.each([&](int thread) { largest[thread] = n_above[thread] = 0; });
    for (int begin = 0; begin < 32 * n_words; begin += kBandThreads * kShare) {
        threads.each([&](int thread) {
            const int first = begin + thread / 32 * kWarpShare, lane = thread % 32;
            uint32_t over_upper = 0, over_lower = 0;
            tile.with_loads(first, first + kWarpShare, [&](auto whole) {
                LTP_UNROLL(decltype(whole)::value ? 4 : 1)
                for (int load = 0; load < kLoads; ++load) {
                    int32_t keys[kVector];
                    tile.template keys<decltype(whole)::value>(first + (32 * load + lane) * kVector, keys);
                    uint32_t upper_bits = 0, lower_bits = 0;
                    for (int j = 0; j < kVector; ++j) {
                        if (keys[j] > upper) upper_bits |= 1u << j;
                        if (keys[j] > lower) lower_bits |= 1u << j;
                        largest[thread] = keys[j] > largest[thread] ? keys[j] : largest[thread];
                    }
                    over_upper |= upper_bits << load * kVector;
                    over_lower |= lower_bits << load * kVector;
                }
            });
            marked[thread] = over_upper;
            between[thread] = over_lower & ~over_upper;
        });
        gather_words<kVector>(marked, threads);
        gather_words<kVector>(between, threads);
        threads.each([&](int thread) {
            const int lane = thread % 32, group = lane / kLoads, load = lane % kLoads;
            const int word = (begin + thread / 32 * kWarpShare) / 32 + load * kVector + group;
            scratch.inside[word] = between[thread];
            if (word < n_words) words[word] = int32_t(marked[thread]);
            n_above[thread] += count_bits(marked[thread]);
        });
    }
    const int total_above = threads.scan(n_above);  // it synchronises, so that all threads see the words
    // from here on, thread t has the words from t * kOwnWords on
    threads.each([&](int thread) {
        n_inside[thread] = 0;
        for (int word = thread * kOwnWords; word < (thread + 1) * kOwnWords; ++word) {
            if (word < n_words) n_inside[thread] += count_bits(scratch.inside[word]);
        }
    });
    auto& before = n_inside;  // candidates before the words of a thread
    const int total = threads.scan(before);

    threads.each([&](int thread) {
        if (largest[thread] >= kFirstNonfinite) *band.nonfinite = 1;
        if (thread != 0) return;
        const int64_t offset = total == 0 ? 0 : threads.add(band.cursor, total);
        scratch.offset = offset <= band.capacity - total ? offset : -1;
        band.above[number] = total_above;
        band.inside[number] = total;
        band.offsets[number] = scratch.offset;
    });
    if (band.take != nullptr) {
        threads.each([&](int thread) {
            int64_t left = band.take[number] - before[thread];
            for (int word = thread * kOwnWords; left > 0 && word < (thread + 1) * kOwnWords && word < n_words; ++word) {
                for (uint32_t bits = scratch.inside[word]; bits != 0 && left > 0; bits &= bits - 1, --left) {
                    words[word] |= int32_t(bits & (0u - bits));
                }
            }
        });
    }
    threads.sync();
    if (scratch.offset < 0) return;
    for (int first = 0; first < total; first += kCollected) {
        const int count = total - first < kCollected ? total - first : kCollected;
        threads.each([&](int thread) {
            int rank = before[thread] - first;
            for (int word = thread * kOwnWords; word < (thread + 1) * kOwnWords && word < n_words; ++word) {
                for (uint32_t bits = scratch.inside[word]; bits != 0; bits &= bits - 1, ++rank) {
                    if (rank < 0 || rank >= count) continue;
                    scratch.listed[rank] = uint16_t(32 * word + count_bits((bits & (0u - bits)) - 1));
                }
            }
        });
        threads.sync();
        threads.each([&](int thread) {
            for (int i = thread; i < count; i += kBandThreads) {
                const int64_t slot = scratch.offset + first + i;
                band.keys[slot] = tile.key(scratch.listed[i]);
                band.positions[slot] = scratch.listed[i];
            }
        });
        threads.sync();
    }
}

// Whether the numbers of a tile lead to its candidates, to a group, and with words to those of its last candidate.
LTP_HD bool lies_inside(const Candidates& candidates, int64_t tile, const Marks* marks) {
    const int64_t offset = candidates.offsets[tile], count = offset < 0 ? 0 : candidates.inside[tile];
    if (!lies_in(candidates.groups[tile], 1, candidates.n_groups) || count < 0 || count > kTile ||
        (count > 0 && !lies_in(offset, count, candidates.capacity))) {
        return false;
    }
    if (marks == nullptr || count == 0) return true;
    const int last = candidates.positions[offset + count - 1] / 32;  // positions ascend
    return lies_in(marks->tile_words[tile], last + 1, marks->n_words);
}

// Candidates of a tile that are stored.
LTP_HD int64_t stored(const Candidates& candidates, int64_t tile) {
    return candidates.offsets[tile] < 0 ? 0 : candidates.inside[tile];
}

template <class Threads>
LTP_HD void set_bit(int32_t* words, uint16_t position, Threads& threads) {
    threads.set_bits(words + position / 32, int32_t(1u << position % 32));
}

// Counts the candidates of part `block` of `blocks` of the tiles. A search skips groups whose cut is known. bins:
// [bands.bins] in shared memory.
template <class Threads>
LTP_HD void candidate_histogram_block(const Candidates& candidates, const CandidateBins& bands, const Search& search,
                                      int64_t block, int64_t blocks, uint32_t* bins, Threads& threads) {
    const int64_t end = candidates.n_tiles * (block + 1) / blocks;
    empty<kCandidateThreads>(bins, int(bands.bins), threads);
    for (int64_t begin = candidates.n_tiles * block / blocks, stop; begin < end; begin = stop) {
        const int64_t group = candidates.groups[begin];
        for (stop = begin + 1; stop < end && candidates.groups[stop] == group;) ++stop;
        if (!lies_in(group, 1, candidates.n_groups)) return threads.trap();
        const int64_t low = bands.low[group], high = bands.high[group], shift = bands.shift[group];
        if (search.budgets != nullptr && high - low == 1) continue;
        threads.each([&](int thread) {
            for (int64_t tile = begin + thread / 32; tile < stop; tile += kCandidateThreads / 32) {
                if (!lies_inside(candidates, tile, nullptr)) {
                    if (thread % 32 == 0) threads.trap();
                    continue;
                }
                const int32_t* const keys = candidates.keys + candidates.offsets[tile];
                const int64_t count = stored(candidates, tile);
                LTP_UNROLL(4)
                for (int64_t i = thread % 32; i < count; i += 32) {
                    const int32_t key = keys[i];
                    if (key < low || key >= high) continue;
                    const int64_t bin = (key - low) >> shift;
                    if (bin < bands.bins) threads.count(bins + bin);
                }
            }
        });
        merge_into<kCandidateThreads>(bands.histogram + group * bands.bins, bins, int(bands.bins), threads);
    }
}

// `take_above` for part `block` of `blocks` of the tiles, a warp for each. In a search, a band whose candidates have no
// room is a single key, so that all its entries are ties.
template <class Threads>
LTP_HD void take_above_block(const Candidates& candidates, const Above& marks, const Search& search, int64_t block,
                             int64_t blocks, Threads& threads) {
    const int64_t begin = candidates.n_tiles * block / blocks, end = candidates.n_tiles * (block + 1) / blocks;
    typename Threads::template PerThread<int64_t> above, equal, all_above, all_equal;
    for (int64_t first = begin; first < end; first += kCandidateThreads / 32) {
        threads.each([&](int thread) {
            const int64_t tile = first + thread / 32;
            above[thread] = equal[thread] = 0;
            if (tile >= end || !lies_inside(candidates, tile, &marks)) return;
            const int64_t offset = candidates.offsets[tile], count = stored(candidates, tile);
            const int64_t cut = marks.cut[candidates.groups[tile]];
            int32_t* const words = marks.words + marks.tile_words[tile];
            LTP_UNROLL(4)
            for (int64_t i = thread % 32; i < count; i += 32) {
                const int32_t key = candidates.keys[offset + i];
                equal[thread] += key == cut;
                if (key <= cut) continue;
                ++above[thread];
                set_bit(words, candidates.positions[offset + i], threads);
            }
        });
        threads.scan_lanes(above, all_above);
        threads.scan_lanes(equal, all_equal);
        threads.each([&](int thread) {
            const int64_t tile = first + thread / 32;
            if (thread % 32 != 0 || tile >= end) return;
            if (!lies_inside(candidates, tile, &marks)) return threads.trap();
            marks.taken[tile] = all_above[thread];
            marks.ties[tile] = all_equal[thread];
            if (search.budgets == nullptr) return;
            if (candidates.offsets[tile] < 0) marks.ties[tile] = candidates.inside[tile];
            threads.add(search.taken + candidates.groups[tile], all_above[thread]);
        });
    }
}

// `take_ties` for one tile, by N threads.
template <int N, class Threads>
LTP_HD void take_ties_block(const Candidates& candidates, const Ties& marks, int64_t tile, Threads& threads) {
    if (!lies_inside(candidates, tile, &marks)) return threads.trap();
    const int64_t offset = candidates.offsets[tile], count = stored(candidates, tile);
    const int64_t cut = marks.cut[candidates.groups[tile]], take = marks.take[tile];
    int32_t* const words = marks.words + marks.tile_words[tile];
    int64_t before = 0;  // ties in earlier steps
    for (int64_t first = 0; first < count && before < take; first += N) {
        typename Threads::template PerThread<int> rank;
        threads.each([&](int thread) {
            const int64_t i = first + thread;
            rank[thread] = i < count && candidates.keys[offset + i] == cut;
        });
        auto is_tie = rank;
        const int found = threads.scan(rank);
        threads.each([&](int thread) {
            if (!is_tie[thread] || before + rank[thread] >= take) return;
            set_bit(words, candidates.positions[offset + first + thread], threads);
        });
        before += found;
    }
}

}  // namespace ltp
