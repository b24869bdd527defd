// masked_adamw_ and masked_sum_squares over a tile table.
#pragma once

#include <cstdint>
#include <vector>

namespace ltp {

// A list of P parameters, their packed state of K slots and the T tiles that hold their active entries.
// All addresses are of contiguous memory, which the caller keeps alive.
struct MaskedAdamW {
    std::vector<uintptr_t> params;  // P addresses of float32 [numel]
    std::vector<uintptr_t> grads;   // P addresses of float32 [numel]; 0 = no gradient, the parameter is skipped
    const int64_t* tiles;           // [T, 7] PARAM, START, LENGTH, ACTIVE, SLOT, INDEX, ENCODING
    int64_t n_tiles;
    const int32_t* words;        // bitmaps, 2 * ceil(LENGTH / 64) words at INDEX
    const uint16_t* positions;   // lists, ACTIVE ascending positions in the tile at INDEX
    const double* coefficients;  // [P, 10], see common/adamw.h
    const float* anchor;         // [K] the weights to pull to, or null
};

// Updates the active entries of `params`, exp_avg [K] and exp_avg_sq [K] (float32), in place, of every parameter that
// has a gradient and whose APPLY is not 0. Throws std::invalid_argument for a tile table that cannot be.
void masked_adamw_(const MaskedAdamW& table, float* exp_avg, float* exp_avg_sq, int64_t threads);

// Writes to out [T] the sum of the squared effective gradients of each tile's active entries; 0 without a gradient.
void masked_sum_squares(const MaskedAdamW& table, double* out, int64_t threads);

}  // namespace ltp
