// The passes of topk_delta on a GPU, as in csrc/cpu/topk_delta.h: launches over the tiles of all pairs, on the
// caller's stream.
#pragma once

#include <cstdint>

#include "../common/selection.h"

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
struct DevicePairs {
    const DeltaPair* rows;  // [n_pairs], n_pairs >= 1
    int64_t n_pairs;
    int64_t n_tiles;  // of all pairs
    int initial_dtype, tuned_dtype;
};

// Shared memory holds as many bins as the device allows, 32,768 at most: one reading of the pairs for each such part.
// Neither allocates nor waits. stream: a cudaStream_t. Throws std::runtime_error if the launch fails.
void cuda_delta_histogram(const DevicePairs& pairs, const Histogram& histogram, void* stream);

// The keys of runs of kRun neighbouring entries. As above.
void cuda_sample_keys(const DevicePairs& pairs, const Sample& sample, void* stream);

// As above.
void cuda_delta_band(const DevicePairs& pairs, const Band& band, void* stream);

// Adds the candidates of a band to the bins; sets the bits of those above the cut, or of the first take[t] at it of
// each tile. As above; a tile, or a run to sample, whose numbers lead out of the memory given traps, as in
// masked_adamw.h.
void cuda_candidate_histogram(const Candidates& candidates, const CandidateBins& bands, void* stream);
void cuda_take_above(const Candidates& candidates, const Above& marks, void* stream);
void cuda_take_ties(const Candidates& candidates, const Ties& marks, void* stream);

}  // namespace ltp
