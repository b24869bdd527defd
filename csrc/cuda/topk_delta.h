// The passes of csrc/cpu/topk_delta.h on a GPU: launches over the tiles of all pairs, on the caller's stream.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "../common/selection.h"

namespace ltp {

// A row of the pair table. Addresses are of contiguous device memory; dtypes are codes of Dtype.
struct DeltaPair {
    int64_t initial, initial_dtype;  // address 0 and dtype -1 stand for zeros
    int64_t tuned, tuned_dtype;
    int64_t size;   // entries
    int64_t group;  // budget group
    int64_t word;   // first of its 2 * ceil(size / 64) words
    int64_t tile;   // its first tile; pairs stand in this order
};
static_assert(sizeof(DeltaPair) == 8 * sizeof(int64_t), "a row of the pair table has 8 columns");

// All pointers are device memory. A launch serves the pairs of one combination of dtypes and skips the others.
struct DevicePairs {
    const DeltaPair* rows;  // [n_pairs], n_pairs >= 1
    int64_t n_pairs;
    const int64_t* of_tile;  // [n_tiles], the pair of each tile
    int64_t n_tiles;         // of all pairs
    int initial_dtype, tuned_dtype;
};

using Kinds = std::vector<std::pair<int, int>>;  // combinations of dtypes, of `initial` and `tuned`: a launch each

// The numbers of pairs and tiles, and their table, which `of_pairs` of ltp_sparse/backends/addresses.py makes.
struct PairTable {
    int64_t n_pairs, n_tiles;
    const int64_t* at;

    const DeltaPair* rows() const { return reinterpret_cast<const DeltaPair*>(at); }
    const int64_t* of_tile() const { return at + n_pairs * int64_t(sizeof(DeltaPair) / sizeof(int64_t)); }
    const int64_t* tile_groups() const { return of_tile() + n_tiles; }
    const int64_t* tile_words() const { return tile_groups() + n_tiles; }
    const int64_t* tile_order() const { return tile_words() + n_tiles; }
    const int64_t* pair_order() const { return tile_order() + n_tiles; }
    const int64_t* starts() const { return pair_order() + n_pairs; }

    DevicePairs of(std::pair<int, int> kind) const {
        return {rows(), n_pairs, of_tile(), n_tiles, kind.first, kind.second};
    }
};

// The budget of a group of pairs: a row of the table of budgets.
struct Budget {
    int64_t wanted;                // entries to select
    int64_t entries, first_entry;  // of its pairs; of all pairs of the groups before it
    int64_t runs, first_run;       // the same of sampled runs
    int64_t top, centre, bottom;   // orders among its samples: the ends and the middle of its bracket
};
static_assert(sizeof(Budget) == 8 * sizeof(int64_t), "a row of the table of budgets has 8 columns");

// The samples of all groups, and the band of keys that they give: low[g] <= key < high[g] holds the key at order
// `wanted` almost surely. Two launches count two digits of the sampled keys, and the last thread block of each decides.
struct Bracket {
    const Budget* budgets;  // [n_groups]
    int64_t n_groups, runs;
    const int64_t *pairs, *starts;  // [n_pairs]: the pairs, group after group; the entries before each
    int64_t room;                   // candidates that all bands together may hold
    int64_t *low, *high;            // out [n_groups]
    int32_t* keys;                  // scratch [runs, kRun]
    // scratch, zero at first
    int digit_bits;                             // 8 to kDigitBits
    uint32_t* upper;                            // [n_groups, bins], sampled keys by their upper digit
    uint32_t* lower;                            // [n_groups, 3, bins], by the next one: those at top, centre, bottom
    uint32_t* low_bits;                         // [n_groups, bins]: see sample_lower_block
    int64_t *digits, *ranks, *larger, *counts;  // [n_groups, 3]
    int64_t* moved;                             // [n_groups], samples whose key is not zero
    int64_t* expected;                          // [1], entries inside all bands
    int64_t* arrived;                           // [2], thread blocks done
};

constexpr int kKeyBits = 31, kDigitBits = 11;

// The decisions after a pass over all tiles, made by its last thread block instead of the host: how many entries each
// band has to give, the cut of its candidates, and how many ties each tile takes. All but low and high are zero at
// first. Without budgets, nothing is decided.
struct Search {
    const Budget* budgets;  // [n_groups], or null
    int64_t n_groups;
    int64_t *low, *high;                         // [n_groups], the band; then the part of it that holds the cut
    int64_t *missing, *rank, *shift;             // [n_groups]: entries that a band gives; see CandidateBins
    int64_t* cut;                                // [n_groups]
    float* thresholds;                           // [n_groups], that of the cut; infinite where nothing is selected
    int64_t *above, *inside, *unstored, *taken;  // [n_groups], sums over tiles; candidates without room
    int64_t* starts;                             // [n_groups]
    int64_t* open;                               // [rounds + 1], groups whose cut is not known before a round
    int64_t* arrived;                            // [rounds + 2]
    int64_t* failed;                             // [1]: a band does not hold its cut, or candidates have no room
    const int64_t* order;                        // [n_tiles], tiles, group after group
    int64_t *take, *selected;                    // out [n_tiles]: ties to take; entries selected
};

// Shared memory holds as many bins as the device allows, at most 32,768. The pairs are read once for each such part of
// the bins. It neither allocates nor waits. stream: a cudaStream_t. It throws std::runtime_error if the launch fails.
void cuda_delta_histogram(const DevicePairs& pairs, const Histogram& histogram, void* stream);

// The band of keys of each group, from samples: two launches for all dtypes.
void cuda_sample_upper(const DevicePairs& pairs, const Bracket& bracket, void* stream);
void cuda_sample_lower(const Bracket& bracket, void* stream);

// As above. In a search, the last thread block of all combinations of dtypes decides. bins: those of the search.
void cuda_delta_band(const DevicePairs& pairs, const Band& band, const Search& search, int64_t bins, void* stream);

// Add the candidates of a band to the bins; set the bits of those above the cut; set the bits of the first take[t] at
// the cut in each tile. As above; a tile that leads outside the memory of the call traps, as in masked_adamw.h. round:
// the number of the histogram in a search. It does nothing if every cut is known already.
void cuda_candidate_histogram(const Candidates& candidates, const CandidateBins& bands, const Search& search, int round,
                              void* stream);
void cuda_take_above(const Candidates& candidates, const Above& marks, const Search& search, const int64_t* above,
                     int rounds, void* stream);
void cuda_take_ties(const Candidates& candidates, const Ties& marks, void* stream);

// The same at the end of a search. Tiles without stored candidates are read again, and take band.take of the entries
// inside the band, which have a single key.
void cuda_take_last(const DevicePairs& pairs, const Candidates& candidates, const Ties& marks, const Band& band,
                    const Search& search, void* stream);

}  // namespace ltp
