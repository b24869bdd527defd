// The decisions of a selection that its last thread blocks make on the GPU, so that the host waits once: the bands of
// keys from samples, and after each pass over the tiles the input of the next. See topk_delta.h; active_entries.cuh
// describes `Threads`.
#pragma once

#include "../common/rounding.h"
#include "topk_delta_block.cuh"

namespace ltp {

constexpr int kSampleThreads = 1024;

// The place, in a row of bins, of the entry at some order; 1 is the largest.
struct Place {
    int64_t bin, rank;      // its bin, and its order there; -1 and 0 if there is no such entry
    int64_t larger, count;  // entries in higher bins, and in this one
    int64_t total;          // entries of the row
};

// Looks for RANKS orders in each of the rows [n_rows, bins], a warp for each row, with at least 256 bins. Order number
// i is rank_of(row, i, entries of the row), or 0 for none. Calls found(row, i, place) on one thread. With CLEAR, the
// rows are zero afterwards.
template <int N, int RANKS, bool CLEAR, class Count, class Threads, class RankOf, class Found>
LTP_HD void find_ranks(Count* rows, int64_t n_rows, int bins, Threads& threads, RankOf rank_of, Found found) {
    const int own = bins / 32;  // bins of a lane, in descending order
    struct Ranks {
        int64_t of[RANKS];
    };
    typename Threads::template PerThread<int64_t> before, total, counted;
    typename Threads::template PerThread<Ranks> ranks;
    for (int64_t first = 0; first < n_rows; first += N / 32) {
        threads.each([&](int thread) {
            const int64_t row = first + thread / 32;
            counted[thread] = 0;
            if (row < n_rows) {
                using Vector = Vector<Count, 16 / sizeof(Count)>;
                const auto* const from = reinterpret_cast<const Vector*>(rows + (row + 1) * bins - thread % 32 * own) -
                                         own / (16 / int(sizeof(Count)));
                LTP_UNROLL(8)
                for (int i = 0; i < own / (16 / int(sizeof(Count))); ++i) {
                    const Vector several = from[i];
                    for (const Count count : several.item) counted[thread] += int64_t(count);
                }
            }
            before[thread] = counted[thread];
        });
        threads.scan_lanes(before, total);
        threads.each([&](int thread) {
            const int64_t row = first + thread / 32;
            for (int i = 0; i < RANKS && row < n_rows; ++i) ranks[thread].of[i] = rank_of(row, i, total[thread]);
        });
        threads.sync();  // `found` may overwrite the orders
        threads.each([&](int thread) {
            const int64_t row = first + thread / 32;
            if (row >= n_rows) return;
            Count* const end = rows + (row + 1) * bins - thread % 32 * own;
            for (int i = 0; i < RANKS; ++i) {
                const int64_t rank = ranks[thread].of[i];
                if (rank == 0 && thread % 32 == 0) found(row, i, Place{-1, 0, 0, 0, total[thread]});
                if (rank <= before[thread] || rank > before[thread] + counted[thread]) continue;
                int64_t larger = before[thread];
                int at = 1;
                while (larger + int64_t(end[-at]) < rank) larger += int64_t(end[-at++]);
                const int64_t bin = end - at - (rows + row * bins), count = int64_t(end[-at]);
                found(row, i, Place{bin, rank - larger, larger, count, total[thread]});
            }
            if constexpr (CLEAR) {
                for (int i = 1; i <= own; ++i) end[-i] = 0;
            }
        });
    }
    threads.sync();
}

// --- samples ---

// The index of the last of `count` ascending numbers that is at most `value`.
LTP_HD int64_t last_up_to(const int64_t* numbers, int64_t stride, int64_t count, int64_t value) {
    int64_t first = 0;
    while (count > 1) {
        const int64_t half = count / 2;
        const bool upper = numbers[(first + half) * stride] <= value;
        first += upper ? half : 0;
        count = upper ? count - half : half;
    }
    return first;
}

constexpr int64_t kBudgetColumns = sizeof(Budget) / sizeof(int64_t);

// The group of a sampled run. Groups without runs are never found, since the next group starts at the same run.
LTP_HD int64_t group_of_run(const Bracket& bracket, int64_t run) {
    return last_up_to(&bracket.budgets->first_run, kBudgetColumns, bracket.n_groups, run);
}

// Samples are few, so that the dtypes are chosen for each of them, and one launch serves all.
LTP_HD float value_at(int64_t address, int64_t dtype, int64_t entry) {
    switch (Dtype(dtype)) {
        case Dtype::kBFloat16:
            return load_float32(reinterpret_cast<const BFloat16*>(address) + entry);
        case Dtype::kFloat16:
            return load_float32(reinterpret_cast<const Float16*>(address) + entry);
        case Dtype::kFloat32:
            break;
    }
    return load_float32(reinterpret_cast<const float*>(address) + entry);
}

// The shared memory of sample_upper_block.
struct SampleScratch {
    uint32_t bins[1 << kDigitBits];
    int64_t first[kSampleThreads];  // the first entry of each run, and its pair
    int64_t pair[kSampleThreads];
};

// The place of a run: a random one in each of budget.runs equal parts of a group, as `places` in
// ltp_sparse/ops/samples.py.
LTP_HD void place_run(const DevicePairs& pairs, const Bracket& bracket, const Budget& budget, int64_t run,
                      int64_t& pair, int64_t& first) {
    const int64_t part = run - budget.first_run;
    const int64_t begin = part * budget.entries / budget.runs, end = (part + 1) * budget.entries / budget.runs;
    const int64_t within = int64_t(uint64_t(mix32(uint32_t(run))) * uint64_t(end - begin) >> 32);
    const int64_t at = budget.first_entry + begin + within;
    const int64_t number = last_up_to(bracket.starts, 1, pairs.n_pairs, at);
    pair = bracket.pairs[number];
    const int64_t size = pairs.rows[pair].size, of_pair = (at - bracket.starts[number]) / kRun;
    const int64_t last = size < 2 * kRun ? 0 : size / kRun - 1;
    first = (of_pair < last ? of_pair : last) * kRun;
}

// At most the largest finite key; 0 beyond the end of the pair.
LTP_HD int32_t sampled_key(const DeltaPair& pair, int64_t entry) {
    if (entry >= pair.size) return 0;
    float delta = value_at(pair.tuned, pair.tuned_dtype, entry);
    if (pair.initial_dtype != -1) delta -= value_at(pair.initial, pair.initial_dtype, entry);
    const int32_t key = delta_key(delta);
    return key < kFirstNonfinite ? key : kFirstNonfinite - 1;
}

// Calls visit(group, first, stop) for the runs first .. stop - 1 of each group of part `block` of `blocks` of all runs.
template <class Visit>
LTP_HD void for_each_group(const Bracket& bracket, int64_t block, int64_t blocks, Visit visit) {
    const int64_t end = bracket.runs * (block + 1) / blocks;
    for (int64_t first = bracket.runs * block / blocks, stop; first < end; first = stop) {
        const int64_t group = group_of_run(bracket, first);
        const int64_t last = bracket.budgets[group].first_run + bracket.budgets[group].runs;
        stop = last < end ? last : end;
        visit(group, first, stop);
    }
}

// Samples part `block` of `blocks` of the runs, and counts the upper digits of their keys.
template <class Threads>
LTP_HD void sample_upper_block(const DevicePairs& pairs, const Bracket& bracket, int64_t block, int64_t blocks,
                               SampleScratch& scratch, Threads& threads) {
    constexpr int kSamples = 4;  // samples of a thread in flight
    const int n_bins = 1 << bracket.digit_bits, shift = kKeyBits - bracket.digit_bits;
    empty<kSampleThreads>(scratch.bins, n_bins, threads);
    for_each_group(bracket, block, blocks, [&](int64_t group, int64_t first, int64_t stop) {
        const Budget budget = bracket.budgets[group];
        for (; first < stop; first += kSampleThreads) {
            const int runs = stop - first < kSampleThreads ? int(stop - first) : kSampleThreads,
                      count = runs * int(kRun);
            threads.each([&](int thread) {
                if (thread >= runs) return;
                place_run(pairs, bracket, budget, first + thread, scratch.pair[thread], scratch.first[thread]);
            });
            threads.sync();
            threads.each([&](int thread) {
                for (int begin = thread; begin < count; begin += kSamples * kSampleThreads) {
                    int32_t keys[kSamples];
                    for (int j = 0; j < kSamples; ++j) {
                        const int i = begin + j * kSampleThreads, run = i / int(kRun);
                        keys[j] =
                            i < count ? sampled_key(pairs.rows[scratch.pair[run]], scratch.first[run] + i % kRun) : 0;
                    }
                    for (int j = 0; j < kSamples; ++j) {
                        const int i = begin + j * kSampleThreads;
                        if (i < count) bracket.keys[first * kRun + i] = keys[j];
                        if (keys[j] != 0) threads.count(scratch.bins + (keys[j] >> shift));
                    }
                }
            });
            threads.sync();
        }
        merge_into<kSampleThreads>(bracket.upper + group * n_bins, scratch.bins, n_bins, threads);
    });
}

// The upper digits at the three orders of every group. If fewer samples have moved, that of the smallest of these.
template <class Threads>
LTP_HD void decide_upper(const Bracket& bracket, Threads& threads) {
    const int n_bins = 1 << bracket.digit_bits;
    const auto rank_of = [&](int64_t group, int i, int64_t moved) {
        const int64_t rank = (&bracket.budgets[group].top)[i];
        return rank < moved ? rank : moved;
    };
    find_ranks<kSampleThreads, 3, false>(bracket.upper, bracket.n_groups, n_bins, threads, rank_of,
                                         [&](int64_t group, int i, const Place& place) {
                                             bracket.moved[group] = place.total;
                                             bracket.digits[3 * group + i] = place.bin;
                                             bracket.ranks[3 * group + i] = place.rank;
                                             bracket.larger[3 * group + i] = place.larger;
                                         });
}

// Counts the next digit of the samples that share the upper one with an end or the middle of their bracket. For those
// in the middle, low_bits records which bits below that digit were set, and in its upper half which were not. If no bit
// was both, all keys of the bin are equal. bins: four rows in shared memory.
template <class Threads>
LTP_HD void sample_lower_block(const Bracket& bracket, int64_t block, int64_t blocks, uint32_t* bins,
                               Threads& threads) {
    const int bits = bracket.digit_bits, n_bins = 1 << bits, shift = kKeyBits - 2 * bits;
    empty<kSampleThreads>(bins, 4 * n_bins, threads);
    for_each_group(bracket, block, blocks, [&](int64_t group, int64_t first, int64_t stop) {
        const int64_t* const digits = bracket.digits + 3 * group;
        threads.each([&](int thread) {
            LTP_UNROLL(4)
            for (int64_t i = first * kRun + thread; i < stop * kRun; i += kSampleThreads) {
                const int32_t key = bracket.keys[i];
                if (key == 0) continue;
                const int64_t upper = key >> (kKeyBits - bits);
                const int bin = key >> shift & (n_bins - 1);
                for (int j = 0; j < 3; ++j) {
                    if (upper == digits[j]) threads.count(bins + j * n_bins + bin);
                }
                if (upper != digits[1]) continue;
                const uint32_t mask = (1u << shift) - 1, low = uint32_t(key) & mask;
                threads.set_bits(bins + 3 * n_bins + bin, low | (~low & mask) << 16);
            }
        });
        threads.sync();
        threads.each([&](int thread) {
            uint32_t* const low_bits = bins + 3 * n_bins;
            for (int bin = thread; bin < n_bins; bin += kSampleThreads) {
                if (low_bits[bin] != 0) threads.set_bits(bracket.low_bits + group * n_bins + bin, low_bits[bin]);
                low_bits[bin] = 0;
            }
        });
        merge_into<kSampleThreads>(bracket.lower + 3 * group * n_bins, bins, 3 * n_bins, threads);
    });
}

// The band of every group, from the lower end of its bottom's bin to the upper end of its top's bin; the keys of a bin
// share two digits. The bins of `lower` are zero afterwards. If the bands hold more candidates than there is room for,
// a group whose middle is a crowd of one key takes a band of that key alone, which needs no candidates.
template <class Threads>
LTP_HD void decide_lower(const Bracket& bracket, Threads& threads) {
    const int bits = bracket.digit_bits, n_bins = 1 << bits, shift = kKeyBits - 2 * bits;
    const auto rank_of = [&](int64_t row, int, int64_t) { return bracket.ranks[row]; };
    find_ranks<kSampleThreads, 1, true>(bracket.lower, 3 * bracket.n_groups, n_bins, threads, rank_of,
                                        [&](int64_t row, int, const Place& place) {
                                            if (place.rank == 0) return;
                                            bracket.digits[row] = bracket.digits[row] << bits | place.bin;
                                            bracket.larger[row] += place.larger;
                                            bracket.counts[row] = place.count;
                                        });
    threads.each([&](int thread) {
        for (int64_t group = thread; group < bracket.n_groups; group += kSampleThreads) {
            const Budget& budget = bracket.budgets[group];
            const int64_t top = 3 * group, bottom = top + 2, moved = bracket.moved[group];
            int64_t low = kFirstNonfinite, high = kFirstNonfinite + int64_t(1), within = 0;
            if (budget.wanted > 0) {
                const bool all = budget.bottom > moved;  // even the smallest key may be selected
                low = all || bracket.digits[bottom] == 0 ? 1 : bracket.digits[bottom] << shift;
                within = all ? moved : bracket.larger[bottom] + bracket.counts[bottom];
                if (bracket.digits[top] >= 0) {
                    high = (bracket.digits[top] + 1) << shift;
                    within -= bracket.larger[top];
                } else {
                    high = budget.top > 0 ? low + 1 : kFirstNonfinite;  // if nothing has moved in the sample
                }
            }
            bracket.low[group] = low;
            bracket.high[group] = high > low ? high : low + 1;
            if (budget.runs > 0) threads.add(bracket.expected, within * budget.entries / (budget.runs * kRun));
        }
    });
    threads.sync();
    if (*bracket.expected <= bracket.room) return;
    threads.each([&](int thread) {
        for (int64_t group = thread; group < bracket.n_groups; group += kSampleThreads) {
            const Budget& budget = bracket.budgets[group];
            const int64_t centre = 3 * group + 1, digits = bracket.digits[centre];
            if (budget.wanted == 0 || budget.centre > bracket.moved[group] || bracket.counts[centre] < 2) continue;
            const uint32_t seen = bracket.low_bits[group * n_bins + (digits & (n_bins - 1))];
            if ((seen & seen >> 16) != 0) continue;
            bracket.low[group] = digits << shift | (seen & 0xFFFF);
            bracket.high[group] = bracket.low[group] + 1;
        }
    });
}

// --- decisions after the passes over the tiles ---

// The shift with which `bins` bins cover the keys low .. high - 1.
LTP_HD int64_t shift_of(int64_t low, int64_t high, int64_t bins) {
    int64_t shift = 0;
    while ((high - 1 - low) >> shift >= bins) ++shift;
    return shift;
}

// Narrows the range that holds the cut of a group to the keys low .. high - 1. A single key is the cut.
template <class Threads>
LTP_HD void narrow(const Search& search, int64_t group, int64_t low, int64_t high, int64_t bins, int round,
                   Threads& threads) {
    search.low[group] = low;
    search.high[group] = high;
    search.shift[group] = shift_of(low, high, bins);
    if (high - low > 1) {
        threads.add(search.open + round, int64_t(1));
        return;
    }
    search.rank[group] = 0;
    search.cut[group] = low;
    search.thresholds[group] = float_from_bits(uint32_t(low));
}

// Adds the counts of the band pass in one tile to those of its group.
template <class Threads>
LTP_HD void add_tile(const DevicePairs& pairs, const Band& band, const Search& search, int64_t tile, Threads& threads) {
    threads.each([&](int thread) {
        if (thread != 0) return;
        const int64_t group = pairs.rows[pairs.of_tile[tile]].group;
        threads.add(search.above + group, band.above[tile]);
        threads.add(search.inside + group, band.inside[tile]);
        if (band.offsets[tile] < 0) threads.add(search.unstored + group, band.inside[tile]);
    });
}

// How many entries each band has to give, and whether it can: its candidates are stored, or all its keys are equal.
template <int N, class Threads>
LTP_HD void decide_band(const Band& band, const Search& search, int64_t bins, Threads& threads) {
    threads.each([&](int thread) {
        if (thread == 0 && *band.nonfinite != 0) *search.failed = 1;
        for (int64_t group = thread; group < search.n_groups; group += N) {
            const int64_t low = search.low[group], high = search.high[group], wanted = search.budgets[group].wanted;
            const int64_t above = search.above[group], inside = search.inside[group];
            // a band that starts at the smallest key holds all entries that have moved, perhaps fewer than wanted
            int64_t missing = wanted - above;
            if (low == 1 && missing > inside) missing = inside;
            const bool none = missing == 0 && (wanted == 0 || (low == 1 && above == 0));
            const bool holds = none || (missing >= 1 && missing <= inside);
            if (!holds || (search.unstored[group] > 0 && high - low > 1)) *search.failed = 1;
            search.missing[group] = search.rank[group] = missing;
            if (missing == 0) {
                narrow(search, group, kFirstNonfinite, kFirstNonfinite + int64_t(1), bins, 0, threads);
            } else {
                narrow(search, group, low, high, bins, 0, threads);
            }
        }
    });
}

// The bin of each group that holds its cut. The bins are zero afterwards.
template <class Threads>
LTP_HD void decide_round(const CandidateBins& bands, const Search& search, int round, Threads& threads) {
    const auto rank_of = [&](int64_t group, int, int64_t) { return search.rank[group]; };
    find_ranks<kCandidateThreads, 1, true>(
        bands.histogram, search.n_groups, int(bands.bins), threads, rank_of,
        [&](int64_t group, int, const Place& place) {
            if (place.rank == 0) return;
            const int64_t shift = search.shift[group], low = search.low[group] + (place.bin << shift);
            const int64_t end = low + (int64_t(1) << shift), high = search.high[group];
            search.rank[group] = place.rank;
            narrow(search, group, low, end < high ? end : high, bands.bins, round + 1, threads);
        });
}

// How many ties each tile takes, the earliest tiles of a group first, and how many entries each tile selects.
template <class Threads>
LTP_HD void decide_ties(const Above& marks, const Candidates& candidates, const int64_t* above, const Search& search,
                        Threads& threads) {
    typename Threads::template PerThread<int> before;
    int64_t earlier = 0;  // ties in earlier steps
    for (int64_t first = 0; first < candidates.n_tiles; first += kCandidateThreads) {
        threads.each([&](int thread) {
            const int64_t i = first + thread;
            before[thread] = i < candidates.n_tiles ? int(marks.ties[search.order[i]]) : 0;
        });
        const int ties = threads.scan(before);
        threads.each([&](int thread) {
            const int64_t i = first + thread;
            if (i >= candidates.n_tiles) return;
            const int64_t tile = search.order[i], group = candidates.groups[tile];
            search.take[tile] = earlier + before[thread];
            if (i == 0 || candidates.groups[search.order[i - 1]] != group) search.starts[group] = search.take[tile];
        });
        earlier += ties;
    }
    threads.sync();
    threads.each([&](int thread) {
        for (int64_t tile = thread; tile < candidates.n_tiles; tile += kCandidateThreads) {
            const int64_t group = candidates.groups[tile], ties = marks.ties[tile];
            const int64_t wanted = search.missing[group] - search.taken[group];
            const int64_t left = wanted - (search.take[tile] - search.starts[group]);
            const int64_t take = left < 0 ? 0 : left < ties ? left : ties;
            search.take[tile] = take;
            search.selected[tile] = above[tile] + marks.taken[tile] + take;
        }
    });
}

// --- the thread blocks of kernels: a pass and, in a search, the decision of its last block ---

template <class Initial, class Tuned, class Threads>
LTP_HD void band_kernel_block(const DevicePairs& pairs, const Band& band, const Search& search, int64_t bins,
                              int64_t tile, BandScratch& scratch, Threads& threads) {
    if (!is_served(pairs, pairs.rows[pairs.of_tile[tile]])) return;
    band_block<Initial, Tuned>(pairs, band, tile, scratch, threads);
    if (search.budgets == nullptr) return;
    add_tile(pairs, band, search, tile, threads);
    if (threads.last(search.arrived, pairs.n_tiles)) decide_band<kBandThreads>(band, search, bins, threads);
}

template <class Threads>
LTP_HD void candidate_kernel_block(const Candidates& candidates, const CandidateBins& bands, const Search& search,
                                   int round, int64_t block, int64_t blocks, uint32_t* bins, Threads& threads) {
    const bool decides = search.budgets != nullptr;
    if (decides && (*search.failed != 0 || search.open[round] == 0)) return;
    candidate_histogram_block(candidates, bands, search, block, blocks, bins, threads);
    if (decides && threads.last(search.arrived + 1 + round, blocks)) decide_round(bands, search, round, threads);
}

// above: [n_tiles], from the band pass.
template <class Threads>
LTP_HD void above_kernel_block(const Candidates& candidates, const Above& marks, const Search& search,
                               const int64_t* above, int rounds, int64_t block, int64_t blocks, Threads& threads) {
    const bool decides = search.budgets != nullptr;
    if (decides && *search.failed != 0) return;
    take_above_block(candidates, marks, search, block, blocks, threads);
    if (decides && threads.last(search.arrived + 1 + rounds, blocks)) {
        decide_ties(marks, candidates, above, search, threads);
    }
}

// One tile at the end of a search, from its candidates or, if they had no room, from its weights.
template <class Initial, class Tuned, class Threads>
LTP_HD void take_last_block(const DevicePairs& pairs, const Candidates& candidates, const Ties& marks, const Band& band,
                            const Search& search, int64_t tile, BandScratch& scratch, Threads& threads) {
    if (*search.failed != 0 || marks.take[tile] == 0) return;
    if (!is_served(pairs, pairs.rows[pairs.of_tile[tile]])) return;
    if (candidates.offsets[tile] < 0) {
        band_block<Initial, Tuned>(pairs, band, tile, scratch, threads);
    } else {
        take_ties_block<kBandThreads>(candidates, marks, tile, threads);
    }
}

}  // namespace ltp
