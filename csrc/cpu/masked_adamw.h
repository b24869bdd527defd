// masked_adamw_ and masked_sum_squares over a tile table.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/dtypes.h"
#include "../common/tile.h"

namespace ltp {

constexpr int64_t kNoLimit = INT64_MAX;

// A list of P parameters, their packed state of K slots and the T tiles that hold their active entries.
// All addresses are of contiguous memory, which the caller keeps alive; null where something is not used.
struct MaskedAdamW {
    std::vector<uintptr_t> params;  // P addresses of [numel] of param_dtype
    std::vector<uintptr_t> grads;   // P addresses of [numel] of grad_dtype; 0 = no gradient, the parameter is skipped
    std::vector<int64_t> sizes;     // P times numel
    Dtype param_dtype, grad_dtype;
    bool packed;           // grads is one address, of float32 [K]
    const int64_t* tiles;  // [T, 8] PARAM, START, LENGTH, ACTIVE, SLOT, INDEX, ENCODING, BLOCK
    int64_t n_tiles;
    const int32_t* words;       // bitmaps, 2 * ceil(LENGTH / 64) words at INDEX
    const uint16_t* positions;  // lists, ACTIVE ascending positions in the tile at INDEX
    TileRoom room;
    const double* coefficients;  // [P, 11], see common/adamw.h
    const float* anchor;         // [K] the weights to pull to, or null
    float* master;               // [K] the exact weights, updated, or null
};

// The moments, updated in place: float32 [K], or with scales int8 [K] and uint8 [K], see common/quantization.h.
struct Moments {
    uintptr_t exp_avg, exp_avg_sq;
    float* scales;  // [B, 2], or null
};

// Updates the active entries of `params`, their moments and masters, of every parameter that has a gradient and whose
// APPLY is not 0; bfloat16 parameters are rounded to nearest or stochastically.
//
// As the two below, throws std::invalid_argument for a table whose tiles do not lie in the memory given: before
// anything is written if a row says so; for a list or a bitmap that its row does not fit, after all other tiles.
void masked_adamw_(const MaskedAdamW& table, const Moments& moments, bool stochastic, int64_t threads);

// Writes to out [T] the sum of the squared effective gradients of each tile's active entries; 0 without a gradient.
void masked_sum_squares(const MaskedAdamW& table, double* out, int64_t threads);

// Copies the active entries of `grads` to their slots of out [K], or adds them. Reads no parameters.
void masked_pack_(const MaskedAdamW& table, float* out, bool accumulate, int64_t threads);

}  // namespace ltp
