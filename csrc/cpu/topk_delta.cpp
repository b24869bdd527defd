#include "topk_delta.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../common/delta_key.h"
#include "kernels.h"
#include "thread_pool.h"
#include "tile_queue.h"

namespace ltp {
namespace {

void require(bool holds, const std::string& message) {
    if (!holds) throw std::invalid_argument(message);
}

// At most `length` entries of a pair, from `start` on.
DeltaTile tile_of(const HostPairs& pairs, int64_t pair, int64_t start, int64_t length) {
    const auto address = [&](uintptr_t base, int dtype) {
        return reinterpret_cast<const void*>(base + uintptr_t(start) * bytes_of(Dtype(dtype)));
    };
    DeltaTile tile = {};
    tile.tuned_dtype = Dtype(pairs.tuned_dtypes[pair]);
    tile.tuned = address(pairs.tuned[pair], pairs.tuned_dtypes[pair]);
    if (!pairs.initial.empty()) {
        tile.initial_dtype = Dtype(pairs.initial_dtypes[pair]);
        tile.initial = address(pairs.initial[pair], pairs.initial_dtypes[pair]);
    }
    tile.length = std::min(length, pairs.sizes[pair] - start);
    return tile;
}

// The tiles of the pairs, checked and queued.
class PairTiles {
  public:
    PairTiles(const std::string& op, const HostPairs& pairs, int64_t n_groups) : pairs_(pairs) {
        require(pairs.groups.size() == pairs.tuned.size(),
                op + ": expected a group for each of the " + std::to_string(pairs.tuned.size()) + " tensors");
        for (const int64_t group : pairs.groups) {
            require(group >= 0 && group < n_groups,
                    op + ": group " + std::to_string(group) + " of " + std::to_string(n_groups));
        }
        for (size_t i = 0; i < pairs.sizes.size(); ++i) {
            for (int64_t start = 0; start < pairs.sizes[i]; start += kTile) {
                tiles_.push_back({int64_t(i), start});
                queue_.add(std::min(kTile, pairs.sizes[i] - start));
            }
        }
    }

    int64_t split(int64_t workers) { return queue_.split(workers); }

    // Calls body(number, pair, start, tile) for tiles that this worker takes, until none is left.
    template <class Body>
    void for_each(int64_t worker, Body body) {
        queue_.for_each(worker, [&](int64_t t) {
            const Place& at = tiles_[t];
            body(t, at.pair, at.start, tile_of(pairs_, at.pair, at.start, kTile));
        });
    }

  private:
    struct Place {
        int64_t pair, start;
    };

    const HostPairs& pairs_;
    std::vector<Place> tiles_;
    TileQueue queue_;
};

// One thread's bins of one group at a time, in 32 bits so that they stay in the cache.
class ThreadBins {
  public:
    ThreadBins(int64_t bins, int64_t* histogram) : bins_(bins), histogram_(histogram) {}

    // The bins, for `entries` more entries of `group`.
    uint32_t* bins(int64_t group, int64_t entries) {
        if (group != group_ || entries_ > INT32_MAX) flush();
        group_ = group;
        entries_ += entries;
        return bins_.data();
    }

    void flush() {
        if (entries_ == 0) return;
        int64_t* row = histogram_ + group_ * int64_t(bins_.size());
        for (size_t bin = 0; bin < bins_.size(); ++bin) {
            if (bins_[bin] != 0) __atomic_fetch_add(row + bin, int64_t(bins_[bin]), __ATOMIC_RELAXED);
        }
        std::fill(bins_.begin(), bins_.end(), 0);
        entries_ = 0;
    }

  private:
    std::vector<uint32_t> bins_;
    int64_t* histogram_;
    int64_t group_ = 0, entries_ = 0;
};

// Sets in words the bits of the first `count` entries of `selected`.
void set_first(const uint64_t* selected, int64_t count, int32_t* words) {
    for (int64_t group = 0; count > 0; ++group) {
        uint64_t word;
        memcpy(&word, words + 2 * group, sizeof word);
        for (uint64_t bits = selected[group]; bits != 0 && count > 0; bits &= bits - 1, --count) word |= bits & -bits;
        memcpy(words + 2 * group, &word, sizeof word);
    }
}

void set_bit(int32_t* words, uint16_t position) { words[position >> 5] |= int32_t(uint32_t(1) << (position & 31)); }

// Whether the positions of a tile's candidates lie in its words.
bool lie_in_words(const Marks& marks, int64_t t, const uint16_t* positions, int64_t count) {
    uint16_t largest = 0;
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, positions[i]);
    return marks.tile_words[t] >= 0 && marks.tile_words[t] < marks.n_words - (largest >> 5);
}

// Calls body(worker, tile, its keys, its positions) for every tile with candidates, on `threads` threads. marks: where
// the body sets bits, or null. Skips tiles that lead outside the memory of the call, and then throws.
template <class Body>
void for_each_tile(const char* op, const Candidates& candidates, const Marks* marks, int64_t threads, Body body) {
    TileQueue queue;
    for (int64_t t = 0; t < candidates.n_tiles; ++t) {
        queue.add(std::min(std::max<int64_t>(candidates.inside[t], 0), kTile));
    }
    std::atomic<int64_t> wrong{-1};
    run_parallel(queue.split(threads), [&](int64_t worker) {
        queue.for_each(worker, [&](int64_t t) {
            const int64_t count = candidates.inside[t], offset = candidates.offsets[t], group = candidates.groups[t];
            if (count == 0) return;
            const uint16_t* positions = candidates.positions + offset;
            if (count < 0 || count > kTile || offset < 0 || offset > candidates.capacity - count || group < 0 ||
                group >= candidates.n_groups || (marks != nullptr && !lie_in_words(*marks, t, positions, count))) {
                wrong = t;
            } else {
                body(worker, t, candidates.keys + offset, positions);
            }
        });
    });
    require(wrong < 0, std::string(op) + ": the numbers of tile " + std::to_string(wrong) +
                           " lead out of its candidates, groups or words");
}

}  // namespace

void delta_histogram(const HostPairs& pairs, const Histogram& histogram, int64_t threads) {
    const int64_t* const prefixes = histogram.prefixes;
    for (int64_t g = 0; prefixes != nullptr && g < histogram.n_groups; ++g) {
        require(prefixes[g] >= 0 && prefixes[g] < 32768,
                "delta_histogram: prefix must be in [0, 32768), got " + std::to_string(prefixes[g]));
    }
    PairTiles tiles("delta_histogram", pairs, histogram.n_groups);
    const Kernels& kernel = kernels();
    const int64_t workers = tiles.split(threads);
    std::vector<ThreadBins> thread_bins(std::max<int64_t>(workers, 1),
                                        ThreadBins(prefixes == nullptr ? kHighBins : kLowBins, histogram.bins));
    std::atomic<bool> nonfinite{false};
    run_parallel(workers, [&](int64_t worker) {
        ThreadBins& own = thread_bins[worker];
        tiles.for_each(worker, [&](int64_t, int64_t pair, int64_t, const DeltaTile& tile) {
            const int64_t group = pairs.groups[pair];
            uint32_t* bins = own.bins(group, tile.length);
            const int32_t largest = prefixes == nullptr ? kernel.histogram_high(tile, bins)
                                                        : kernel.histogram_low(tile, int32_t(prefixes[group]), bins);
            if (largest >= kFirstNonfinite) nonfinite = true;
        });
        own.flush();
    });
    if (nonfinite) *histogram.nonfinite = 1;
}

void sample_keys(const HostPairs& pairs, const Sample& sample, int64_t threads) {
    const int64_t n = int64_t(pairs.sizes.size()), count = sample.count;
    const int64_t *tensors = sample.tensors, *runs = sample.runs;
    for (int64_t r = 0; r < count; ++r) {
        if (tensors[r] < 0 || tensors[r] >= n) {
            throw std::invalid_argument("sample_keys: tensor " + std::to_string(tensors[r]) + " of " +
                                        std::to_string(n));
        }
        const int64_t size = pairs.sizes[tensors[r]];
        if (runs[r] < 0 || runs[r] >= std::max<int64_t>(1, size / kRun)) {
            throw std::invalid_argument("sample_keys: run " + std::to_string(runs[r]) + " of a tensor of " +
                                        std::to_string(size) + " entries");
        }
    }
    constexpr int64_t kAhead = 16;  // runs that are prefetched while earlier ones wait for memory
    const Kernels& kernel = kernels();
    TileQueue queue;
    for (int64_t r = 0; r < count; ++r) queue.add(64 * kRun);  // a run costs as much as this, since it waits for memory
    run_parallel(queue.split(threads), [&](int64_t worker) {
        queue.for_each(worker, [&](int64_t r) {
            if (r + kAhead < count) {
                const DeltaTile later = tile_of(pairs, tensors[r + kAhead], kRun * runs[r + kAhead], kRun);
                __builtin_prefetch(later.initial);
                __builtin_prefetch(later.tuned);
            }
            int32_t* const out = sample.keys + r * kRun;
            const DeltaTile tile = tile_of(pairs, tensors[r], kRun * runs[r], kRun);
            kernel.all_keys(tile, out);
            for (int64_t i = 0; i < tile.length; ++i) out[i] = std::min(out[i], kFirstNonfinite - 1);
            std::fill(out + tile.length, out + kRun, 0);
        });
    });
}

void delta_band(const HostPairs& pairs, const Band& band, int64_t threads) {
    for (int64_t g = 0; g < band.n_groups; ++g) {
        require(1 <= band.low[g] && band.low[g] <= band.high[g], "delta_band: expected 1 <= low <= high, got " +
                                                                     std::to_string(band.low[g]) + " and " +
                                                                     std::to_string(band.high[g]));
    }
    require(band.digests == nullptr || !pairs.initial.empty(), "delta_band: digests are of the initial tensors");
    PairTiles tiles("delta_band", pairs, band.n_groups);
    const Kernels& kernel = kernels();
    std::atomic<bool> nonfinite{false};
    run_parallel(tiles.split(threads), [&](int64_t worker) {
        uint64_t inside[kTile / 64];
        tiles.for_each(worker, [&](int64_t t, int64_t pair, int64_t start, const DeltaTile& tile) {
            const int64_t group = pairs.groups[pair];
            int32_t* words = band.words + pairs.word_offsets[pair] + start / 32;
            const BandCounts counts =
                kernel.band(tile, key_below(band.low[group]), key_below(band.high[group]), words, inside);
            band.above[t] = counts.above;
            band.inside[t] = counts.inside;
            if (counts.largest >= kFirstNonfinite) nonfinite = true;
            if (band.take != nullptr) set_first(inside, std::min(band.take[t], counts.inside), words);
            const int64_t offset = __atomic_fetch_add(band.cursor, counts.inside, __ATOMIC_RELAXED);
            const bool fits = counts.inside == 0 || (offset >= 0 && offset <= band.capacity - counts.inside);
            band.offsets[t] = fits ? offset : -1;
            if (fits && counts.inside > 0) kernel.collect(tile, inside, band.keys + offset, band.positions + offset);
            if (band.digests != nullptr) {  // while the tile is in the cache
                const Digest digest = kernel.digest(tile.initial, tile.length * bytes_of(tile.initial_dtype));
                band.digests[2 * t] = int64_t(digest.low);
                band.digests[2 * t + 1] = int64_t(digest.high);
            }
        });
    });
    if (nonfinite) *band.nonfinite = 1;
}

void candidate_histogram(const Candidates& candidates, const CandidateBins& bands, int64_t threads) {
    const int64_t n_groups = candidates.n_groups;
    for (int64_t g = 0; g < n_groups; ++g) {
        require(bands.shift[g] >= 0 && bands.shift[g] < 32,
                "candidate_histogram: shift must be in [0, 32), got " + std::to_string(bands.shift[g]));
    }
    std::vector<std::vector<int64_t>> counts(threads);
    const auto add = [&](int64_t worker, int64_t t, const int32_t* keys, const uint16_t*) {
        std::vector<int64_t>& own = counts[worker];
        if (own.empty()) own.resize(n_groups * bands.bins);
        const int64_t group = candidates.groups[t];
        const int64_t low = bands.low[group], high = bands.high[group], shift = bands.shift[group];
        for (int64_t i = 0; i < candidates.inside[t]; ++i) {
            if (keys[i] < low || keys[i] >= high) continue;
            const int64_t bin = (keys[i] - low) >> shift;
            if (bin < bands.bins) ++own[group * bands.bins + bin];
        }
    };
    for_each_tile("candidate_histogram", candidates, nullptr, threads, add);
    for (const auto& own : counts) {
        for (size_t bin = 0; bin < own.size(); ++bin) bands.histogram[bin] += own[bin];
    }
}

void take_above(const Candidates& candidates, const Above& marks, int64_t threads) {
    std::fill(marks.taken, marks.taken + candidates.n_tiles, 0);
    std::fill(marks.ties, marks.ties + candidates.n_tiles, 0);
    const auto take = [&](int64_t, int64_t t, const int32_t* keys, const uint16_t* positions) {
        const int64_t limit = marks.cut[candidates.groups[t]];
        int64_t above = 0, equal = 0;
        for (int64_t i = 0; i < candidates.inside[t]; ++i) {
            equal += keys[i] == limit;
            if (keys[i] <= limit) continue;
            ++above;
            set_bit(marks.words + marks.tile_words[t], positions[i]);
        }
        marks.taken[t] = above;
        marks.ties[t] = equal;
    };
    for_each_tile("take_above", candidates, &marks, threads, take);
}

void take_ties(const Candidates& candidates, const Ties& marks, int64_t threads) {
    const auto set = [&](int64_t, int64_t t, const int32_t* keys, const uint16_t* positions) {
        int64_t left = marks.take[t];
        for (int64_t i = 0; left > 0 && i < candidates.inside[t]; ++i) {
            if (keys[i] != marks.cut[candidates.groups[t]]) continue;
            set_bit(marks.words + marks.tile_words[t], positions[i]);
            --left;
        }
    };
    for_each_tile("take_ties", candidates, &marks, threads, set);
}

}  // namespace ltp
