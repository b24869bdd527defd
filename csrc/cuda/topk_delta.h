// The passes of topk_delta on a GPU, as in csrc/cpu/topk_delta.h: launches over the tiles of all pairs, on the
// caller's stream.
#pragma once

#include <cstdint>

#include "../common/platform.h"

namespace ltp {

// A row of the pair table. Addresses are of contiguous device memory; dtypes are codes of Dtype.
struct DeltaPair {
    int64_t initial, initial_dtype;  // address 0 and dtype -1: the key is that of |tuned|
    int64_t tuned, tuned_dtype;
    int64_t size;   // entries
    int64_t group;  // budget group
    int64_t word;   // first of its 2 * ceil(size / 64) words
    int64_t tile;   // its first tile; pairs stand in this order
};
static_assert(sizeof(DeltaPair) == 8 * sizeof(int64_t), "a row of the pair table has 8 columns");

// All pointers are device memory. A launch serves the pairs of one combination of dtypes and leaves the others.
struct CudaPairs {
    const DeltaPair* rows;  // [n_pairs], n_pairs >= 1
    int64_t n_pairs;
    int64_t n_tiles;  // of all pairs
    int initial_dtype, tuned_dtype;
};

struct CudaHistogram {
    const int64_t* prefixes;  // [n_groups], or null: see `bins`
    int64_t* bins;       // added to: [n_groups, 32768] by key >> 16, or with prefixes [n_groups, 65536] by key & 0xFFFF
    int64_t* nonfinite;  // [1], set to 1 if a key was NaN or inf
};

// Shared memory holds as many bins as the device allows, 32,768 at most: one reading of the pairs for each such part.
// Neither allocates nor waits. stream: a cudaStream_t. Throws std::runtime_error if the launch fails.
void cuda_delta_histogram(const CudaPairs& pairs, const CudaHistogram& histogram, void* stream);

struct CudaSample {
    const int64_t *tensors, *runs;  // [count], 0 <= runs[r] < max(1, entries / kRun) of its tensor
    int64_t count;
    int32_t* keys;  // out [count, kRun]: at most the largest finite key, 0 beyond the end of a tensor
};

// The keys of runs of kRun neighbouring entries. As above.
void cuda_sample_keys(const CudaPairs& pairs, const CudaSample& sample, void* stream);

struct CudaBand {
    const int64_t *low, *high;  // [n_groups], 1 <= low <= high
    int32_t* words;             // out: bit set where key >= high, and for the entries of `take`
    int64_t* above;             // out [T]: entries with key >= high
    int64_t* inside;            // out [T]: entries with low <= key < high
    const int64_t* take;        // [T] bits set for the first take[t] entries inside, or null
    int32_t* keys;              // out [capacity]: candidates, the entries inside
    uint16_t* positions;        // out [capacity]: their positions in their tiles
    int64_t capacity;
    int64_t* offsets;    // out [T]: where the tile's candidates stand, ascending; -1: they did not fit
    int64_t* cursor;     // [1]: candidates so far, kept or not; advanced
    int64_t* nonfinite;  // [1], set to 1 if a key was NaN or inf
};

// As above.
void cuda_delta_band(const CudaPairs& pairs, const CudaBand& band, void* stream);

// What the band pass has stored. Tiles whose candidates did not fit have none here.
struct CudaCandidates {
    const int32_t* keys;
    const uint16_t* positions;
    const int64_t* offsets;  // [n_tiles]
    const int64_t* inside;   // [n_tiles]
    const int64_t* groups;   // [n_tiles] budget group
    int64_t n_tiles;
    int64_t capacity;  // of keys and positions
    int64_t n_groups;
};

struct CudaCandidateBins {
    const int64_t *low, *high, *shift;  // [n_groups]: counted are low <= key < high, by (key - low) >> shift
    int64_t* histogram;                 // [n_groups, bins], added to
    int64_t bins;
};

struct CudaMarks {
    const int64_t* cut;  // [n_groups]
    int32_t* words;      // bitmaps as the band pass writes them
    int64_t n_words;
    const int64_t* tile_words;  // [n_tiles], the first word of each tile
    const int64_t* take;        // [n_tiles]; take_ties alone
    int64_t *taken, *ties;      // out [n_tiles]: candidates above the cut, and at it; take_above alone
};

// Adds the candidates of a band to the bins; sets the bits of those above the cut, or of the first take[t] at it of
// each tile. As above; a tile, or a run to sample, whose numbers lead out of the memory given traps, as in
// masked_adamw.h.
void cuda_candidate_histogram(const CudaCandidates& candidates, const CudaCandidateBins& bands, void* stream);
void cuda_take_above(const CudaCandidates& candidates, const CudaMarks& marks, void* stream);
void cuda_take_ties(const CudaCandidates& candidates, const CudaMarks& marks, void* stream);

}  // namespace ltp
