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

void check(const char* op, const DeltaPairs& pairs, int64_t n_groups) {
    const std::string name(op);
    const size_t n = pairs.tuned.size();
    require((pairs.initial.empty() || pairs.initial.size() == n) &&
                pairs.initial_dtypes.size() == pairs.initial.size() && pairs.tuned_dtypes.size() == n &&
                pairs.sizes.size() == n && pairs.groups.size() == n,
            name + ": the lists must have an item for each of the " + std::to_string(n) + " tensors");
    for (size_t i = 0; i < n; ++i) {
        const int codes[2] = {pairs.tuned_dtypes[i], pairs.initial.empty() ? 0 : pairs.initial_dtypes[i]};
        for (const int code : codes) {
            require(code >= 0 && code <= 2, name + ": dtype codes are 0, 1 and 2, got " + std::to_string(code));
        }
        require(pairs.sizes[i] >= 0, name + ": negative size");
        require(pairs.groups[i] >= 0 && pairs.groups[i] < n_groups,
                name + ": group " + std::to_string(pairs.groups[i]) + " of " + std::to_string(n_groups));
    }
}

// At most `length` entries of a pair, from `start` on.
DeltaTile tile_of(const DeltaPairs& pairs, int64_t pair, int64_t start, int64_t length) {
    const auto address = [&](uintptr_t base, int dtype) {
        return reinterpret_cast<const void*>(base + uintptr_t(start) * (dtype == 0 ? 4 : 2));
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
    PairTiles(const char* op, const DeltaPairs& pairs, int64_t n_groups) : pairs_(pairs) {
        check(op, pairs, n_groups);
        for (size_t i = 0; i < pairs.sizes.size(); ++i) {
            for (int64_t start = 0; start < pairs.sizes[i]; start += kTile) {
                tiles_.push_back({int64_t(i), start});
                queue_.add(std::min(kTile, pairs.sizes[i] - start));
            }
        }
    }

    int64_t size() const { return int64_t(tiles_.size()); }
    int64_t split(int64_t workers) { return queue_.split(workers); }

    // Calls body(number, pair, start, tile) for tiles that this worker takes, until none is left.
    template <class Body>
    void for_each(int64_t worker, Body body) {
        for (int64_t begin, end; queue_.take(worker, begin, end);) {
            for (int64_t t = begin; t < end; ++t) {
                const Place& at = tiles_[t];
                body(t, at.pair, at.start, tile_of(pairs_, at.pair, at.start, kTile));
            }
        }
    }

  private:
    struct Place {
        int64_t pair, start;
    };

    const DeltaPairs& pairs_;
    std::vector<Place> tiles_;
    TileQueue queue_;
};

// One thread's bins of one group at a time, in 32 bits so that they stay in the cache.
class ThreadBins {
  public:
    ThreadBins(int64_t bins, int64_t* histogram) : bins_(bins), histogram_(histogram) {}

    // The bins for `entries` more entries of `group`.
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
bool lie_in_words(const TileWords& words, int64_t t, const uint16_t* positions, int64_t count) {
    uint16_t largest = 0;
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, positions[i]);
    return words.first[t] >= 0 && words.first[t] < words.n_words - (largest >> 5);
}

// Calls body(worker, tile, its keys, its positions) for every tile that holds candidates, on `threads` threads. words:
// where the body sets bits, or null. Leaves out tiles whose numbers lead out of this memory, and throws.
template <class Body>
void for_each_tile(const char* op, const Candidates& candidates, int64_t n_groups, const TileWords* words,
                   int64_t threads, Body body) {
    TileQueue queue;
    for (int64_t t = 0; t < candidates.tiles; ++t) {
        queue.add(std::min(std::max<int64_t>(candidates.inside[t], 0), kTile));
    }
    std::atomic<int64_t> wrong{-1};
    run_parallel(queue.split(threads), [&](int64_t worker) {
        for (int64_t begin, end; queue.take(worker, begin, end);) {
            for (int64_t t = begin; t < end; ++t) {
                const int64_t count = candidates.inside[t], offset = candidates.offsets[t],
                              group = candidates.groups[t];
                if (count == 0) continue;
                const uint16_t* positions = candidates.positions + offset;
                if (count < 0 || count > kTile || offset < 0 || offset > candidates.capacity - count || group < 0 ||
                    group >= n_groups || (words != nullptr && !lie_in_words(*words, t, positions, count))) {
                    wrong = t;
                } else {
                    body(worker, t, candidates.keys + offset, positions);
                }
            }
        }
    });
    require(wrong < 0, std::string(op) + ": the numbers of tile " + std::to_string(wrong) +
                           " lead out of its candidates, groups or words");
}

}  // namespace

bool delta_histogram(const DeltaPairs& pairs, const std::vector<int64_t>& prefixes, int64_t* histogram,
                     int64_t n_groups, int64_t threads) {
    require(
        prefixes.empty() || int64_t(prefixes.size()) == n_groups,
        "delta_histogram: expected " + std::to_string(n_groups) + " prefixes, got " + std::to_string(prefixes.size()));
    for (const int64_t prefix : prefixes) {
        require(prefix >= 0 && prefix < 32768,
                "delta_histogram: prefix must be in [0, 32768), got " + std::to_string(prefix));
    }
    PairTiles tiles("delta_histogram", pairs, n_groups);
    const Kernels& kernel = kernels();
    const int64_t workers = tiles.split(threads);
    std::vector<ThreadBins> thread_bins(std::max<int64_t>(workers, 1),
                                        ThreadBins(prefixes.empty() ? kHighBins : kLowBins, histogram));
    std::atomic<bool> nonfinite{false};
    run_parallel(workers, [&](int64_t worker) {
        ThreadBins& own = thread_bins[worker];
        tiles.for_each(worker, [&](int64_t, int64_t pair, int64_t, const DeltaTile& tile) {
            const int64_t group = pairs.groups[pair];
            uint32_t* bins = own.bins(group, tile.length);
            const int32_t largest = prefixes.empty() ? kernel.histogram_high(tile, bins)
                                                     : kernel.histogram_low(tile, int32_t(prefixes[group]), bins);
            if (largest >= kFirstNonfinite) nonfinite = true;
        });
        own.flush();
    });
    return nonfinite;
}

void sample_keys(const DeltaPairs& pairs, const int64_t* tensors, const int64_t* runs, int64_t count, int32_t* keys,
                 int64_t threads) {
    check("sample_keys", pairs, INT64_MAX);
    const int64_t n = int64_t(pairs.sizes.size());
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
    constexpr int64_t kAhead = 16;  // runs: the lines of a run wait for memory, those of the next ones meanwhile
    const Kernels& kernel = kernels();
    TileQueue queue;
    for (int64_t r = 0; r < count; ++r) queue.add(64 * kRun);  // each waits for memory
    run_parallel(queue.split(threads), [&](int64_t worker) {
        for (int64_t begin, end; queue.take(worker, begin, end);) {
            for (int64_t r = begin; r < end; ++r) {
                if (r + kAhead < count) {
                    const DeltaTile later = tile_of(pairs, tensors[r + kAhead], kRun * runs[r + kAhead], kRun);
                    __builtin_prefetch(later.initial);
                    __builtin_prefetch(later.tuned);
                }
                int32_t* const out = keys + r * kRun;
                const DeltaTile tile = tile_of(pairs, tensors[r], kRun * runs[r], kRun);
                kernel.all_keys(tile, out);
                for (int64_t i = 0; i < tile.length; ++i) out[i] = std::min(out[i], kFirstNonfinite - 1);
                std::fill(out + tile.length, out + kRun, 0);
            }
        }
    });
}

bool delta_band(const DeltaPairs& pairs, const DeltaBand& band, int64_t threads) {
    const int64_t n_groups = int64_t(band.low.size());
    require(band.high.size() == band.low.size(), "delta_band: low and high must have one item per group");
    for (int64_t g = 0; g < n_groups; ++g) {
        require(1 <= band.low[g] && band.low[g] <= band.high[g], "delta_band: expected 1 <= low <= high, got " +
                                                                     std::to_string(band.low[g]) + " and " +
                                                                     std::to_string(band.high[g]));
    }
    require(band.word_offsets.size() == pairs.tuned.size(), "delta_band: word_offsets must have one item per tensor");
    PairTiles tiles("delta_band", pairs, n_groups);
    const Kernels& kernel = kernels();
    std::atomic<bool> nonfinite{false};
    run_parallel(tiles.split(threads), [&](int64_t worker) {
        uint64_t inside[kTile / 64];
        tiles.for_each(worker, [&](int64_t t, int64_t pair, int64_t start, const DeltaTile& tile) {
            const int64_t group = pairs.groups[pair];
            int32_t* words = band.words + band.word_offsets[pair] + start / 32;
            // No key is above 2^31 - 1, so any larger bound means the same as 2^31.
            const auto bound = [](int64_t key) { return int32_t(std::min<int64_t>(key - 1, INT32_MAX)); };
            const BandCounts counts = kernel.band(tile, bound(band.low[group]), bound(band.high[group]), words, inside);
            band.above[t] = counts.above;
            band.inside[t] = counts.inside;
            if (counts.largest >= kFirstNonfinite) nonfinite = true;
            if (band.take != nullptr) set_first(inside, std::min(band.take[t], counts.inside), words);
            const int64_t offset = __atomic_fetch_add(band.cursor, counts.inside, __ATOMIC_RELAXED);
            const bool fits = counts.inside == 0 || (offset >= 0 && offset <= band.capacity - counts.inside);
            band.offsets[t] = fits ? offset : -1;
            if (fits && counts.inside > 0) kernel.collect(tile, inside, band.keys + offset, band.positions + offset);
        });
    });
    return nonfinite;
}

void candidate_histogram(const Candidates& candidates, const CandidateBins& bands, int64_t* histogram,
                         int64_t threads) {
    const int64_t n_groups = int64_t(bands.low.size());
    require(bands.high.size() == bands.low.size() && bands.shift.size() == bands.low.size(),
            "candidate_histogram: low, high and shift must have one item per group");
    for (const int64_t shift : bands.shift) {
        require(shift >= 0 && shift < 32,
                "candidate_histogram: shift must be in [0, 32), got " + std::to_string(shift));
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
    for_each_tile("candidate_histogram", candidates, n_groups, nullptr, threads, add);
    for (const auto& own : counts) {
        for (size_t bin = 0; bin < own.size(); ++bin) histogram[bin] += own[bin];
    }
}

void take_above(const Candidates& candidates, const std::vector<int64_t>& cut, const TileWords& words, int64_t* taken,
                int64_t* ties, int64_t threads) {
    std::fill(taken, taken + candidates.tiles, 0);
    std::fill(ties, ties + candidates.tiles, 0);
    const auto take = [&](int64_t, int64_t t, const int32_t* keys, const uint16_t* positions) {
        const int64_t limit = cut[candidates.groups[t]];
        int64_t above = 0, equal = 0;
        for (int64_t i = 0; i < candidates.inside[t]; ++i) {
            equal += keys[i] == limit;
            if (keys[i] <= limit) continue;
            ++above;
            set_bit(words.words + words.first[t], positions[i]);
        }
        taken[t] = above;
        ties[t] = equal;
    };
    for_each_tile("take_above", candidates, int64_t(cut.size()), &words, threads, take);
}

void take_ties(const Candidates& candidates, const std::vector<int64_t>& cut, const TileWords& words,
               const int64_t* take, int64_t threads) {
    const auto set = [&](int64_t, int64_t t, const int32_t* keys, const uint16_t* positions) {
        int64_t left = take[t];
        for (int64_t i = 0; left > 0 && i < candidates.inside[t]; ++i) {
            if (keys[i] != cut[candidates.groups[t]]) continue;
            set_bit(words.words + words.first[t], positions[i]);
            --left;
        }
    };
    for_each_tile("take_ties", candidates, int64_t(cut.size()), &words, threads, set);
}

}  // namespace ltp
