// The passes of topk_delta over pairs of tensors, and over the candidates that one of them stores. The key of an entry
// is defined in common/delta_key.h; keys of 0 are never counted and never selected. Tiles are every 65,536 entries of
// each tensor, in order, T in all.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/platform.h"

namespace ltp {

// M pairs of tensors of equal numel, at addresses of contiguous memory, which the caller keeps alive.
struct DeltaPairs {
    std::vector<uintptr_t> initial;                 // M addresses, or empty: the key is that of |tuned|
    std::vector<uintptr_t> tuned;                   // M addresses
    std::vector<int> initial_dtypes, tuned_dtypes;  // codes of Dtype
    std::vector<int64_t> sizes;                     // entries
    std::vector<int64_t> groups;                    // budget group of each pair
};

// Adds to histogram, int64. prefixes empty: [n_groups, 32768] by key >> 16. Else prefixes has n_groups items, and the
// keys with key >> 16 == prefixes[group] go to [n_groups, 65536] by key & 0xFFFF. Returns whether a key was NaN or inf.
bool delta_histogram(const DeltaPairs& pairs, const std::vector<int64_t>& prefixes, int64_t* histogram,
                     int64_t n_groups, int64_t threads);

// Writes the keys of `count` runs of kRun entries to keys [count, kRun]: of those that begin at entry kRun * runs[r] of
// pair tensors[r], 0 <= runs[r] < max(1, size / kRun). At most the largest finite key; 0 beyond the end of a pair.
void sample_keys(const DeltaPairs& pairs, const int64_t* tensors, const int64_t* runs, int64_t count, int32_t* keys,
                 int64_t threads);

struct DeltaBand {
    std::vector<int64_t> low, high;     // per group, 1 <= low <= high
    int32_t* words;                     // out: bit set where key >= high, and for the entries of `take`
    std::vector<int64_t> word_offsets;  // per pair: first of its 2 * ceil(n / 64) words
    int64_t* above;                     // out [T]: entries with key >= high
    int64_t* inside;                    // out [T]: entries with low <= key < high
    const int64_t* take;                // [T] bits set for the first take[t] entries inside, or null
    int32_t* keys;                      // out [capacity]: candidates, the entries inside
    uint16_t* positions;                // out [capacity]: their positions in their tiles
    int64_t capacity;
    int64_t* offsets;  // out [T]: where the tile's candidates stand, ascending; -1: they did not fit
    int64_t* cursor;   // [1]: candidates so far, kept or not; advanced
};

// Writes every out field. Returns whether a key was NaN or inf (these count as >= high).
bool delta_band(const DeltaPairs& pairs, const DeltaBand& band, int64_t threads);

// The candidates that delta_band has stored, none left out; T tiles.
struct Candidates {
    const int32_t* keys;
    const uint16_t* positions;
    int64_t capacity;        // of keys and positions
    const int64_t* offsets;  // [T]
    const int64_t* inside;   // [T]
    const int64_t* groups;   // [T] budget group
    int64_t tiles;
};

// A band of keys of each group, low <= key < high, and the bins that its candidates fall into: (key - low) >> shift.
struct CandidateBins {
    std::vector<int64_t> low, high, shift;
    int64_t bins;  // of a group; what is beyond them is left out
};

// The bitmaps of all tiles.
struct TileWords {
    int32_t* words;
    int64_t n_words;
    const int64_t* first;  // [T] the first word of each tile
};

// These three throw std::invalid_argument for a tile whose numbers lead out of the memory given: the bins stay as they
// were, bits are set for all other tiles.

// Adds to histogram, int64 [groups, bins of a group].
void candidate_histogram(const Candidates& candidates, const CandidateBins& bands, int64_t* histogram, int64_t threads);

// Sets the bits of the candidates whose key is above cut[group]. Writes for every tile how many these are, and how many
// have that key.
void take_above(const Candidates& candidates, const std::vector<int64_t>& cut, const TileWords& words, int64_t* taken,
                int64_t* ties, int64_t threads);

// Sets the bits of the first take[t] candidates of each tile whose key is cut[group].
void take_ties(const Candidates& candidates, const std::vector<int64_t>& cut, const TileWords& words,
               const int64_t* take, int64_t threads);

}  // namespace ltp
