// The passes of topk_delta over pairs of tensors, and over the candidates that the band pass stores. common/delta_key.h
// defines the key of an entry. Keys of 0 are never counted and never selected.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/selection.h"

namespace ltp {

// M pairs of tensors of equal numel, at addresses of contiguous memory, which the caller keeps alive.
struct HostPairs {
    std::vector<uintptr_t> initial;                 // M addresses, or empty: the key is that of |tuned|
    std::vector<uintptr_t> tuned;                   // M addresses
    std::vector<int> initial_dtypes, tuned_dtypes;  // codes of Dtype
    std::vector<int64_t> sizes;                     // entries
    std::vector<int64_t> groups;                    // budget groups; empty for samples
    std::vector<int64_t> word_offsets;              // for the band pass, the first of the 2 * ceil(n / 64) words
};

void delta_histogram(const HostPairs& pairs, const Histogram& histogram, int64_t threads);

void sample_keys(const HostPairs& pairs, const Sample& sample, int64_t threads);

// Writes every out field; a key that is NaN or inf counts as >= high.
void delta_band(const HostPairs& pairs, const Band& band, int64_t threads);

// These three throw std::invalid_argument for a tile that leads outside the memory of the call. The bins are unchanged
// then, and bits have been set for all other tiles.

void candidate_histogram(const Candidates& candidates, const CandidateBins& bands, int64_t threads);

// Sets the bits of the candidates whose key is above cut[group]. Writes for every tile how many these are, and how many
// keys equal the cut.
void take_above(const Candidates& candidates, const Above& marks, int64_t threads);

// Sets the bits of the first take[t] candidates of each tile whose key is cut[group].
void take_ties(const Candidates& candidates, const Ties& marks, int64_t threads);

}  // namespace ltp
