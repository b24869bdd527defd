// masked_adamw_ and masked_sum_squares over a tile table.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "../common/update.h"
#include "kernels.h"

namespace ltp {

// The parameters of an update: addresses of contiguous memory, which the caller keeps alive.
struct HostUpdate : Update {
    std::vector<uintptr_t> params;  // P addresses of [numel] of param_dtype
    std::vector<uintptr_t> grads;   // P addresses of [numel] of grad_dtype; parameters with address 0 are skipped.
                                    // If packed, the address of [K]
    std::vector<int64_t> sizes;     // P times numel
};

// The listed tensors take the place of the gradients. read: read_tiles, or read_index for tensors of any one dtype
template <class Record>
HostUpdate host_tensors(const Record& record, const char* name, void (*read)(const Record&, int64_t, Update&)) {
    HostUpdate update = {};
    update.grads = record.addresses(name);
    update.sizes = record.sizes(name);
    read(record, int64_t(update.grads.size()), update);
    return update;
}

// read: read_norm or read_update
template <class Record>
HostUpdate host_update(const Record& record, void (*read)(const Record&, int64_t, Update&)) {
    HostUpdate update = {};
    update.params = record.addresses("params");
    update.grads = record.addresses("grads");
    update.sizes = record.sizes("params");
    const size_t wanted = record.flag("packed") ? 1 : update.params.size();
    if (update.grads.size() != wanted) {
        throw std::invalid_argument(
            "expected one gradient address (or 0) per parameter, or one in all if packed, got " +
            std::to_string(update.grads.size()) + " for " + std::to_string(update.params.size()));
    }
    read(record, int64_t(update.params.size()), update);
    return update;
}

// Updates the active entries, moments and masters of every parameter that has a gradient and whose APPLY is not 0.
// Parameters in bfloat16 are rounded to nearest or stochastically.
//
// This and the functions below throw std::invalid_argument for a table that leads outside the memory of the call. If a
// row is wrong, nothing has been written. If a list or bitmap does not fit its row, all other tiles have been
// processed.
void masked_adamw_(const HostUpdate& update, int64_t threads);

// Writes to out [T] the sum of the squared effective gradients of each tile's active entries; 0 without a gradient.
void masked_sum_squares(const HostUpdate& update, double* out, int64_t threads);

// The norm over all tiles, after the last launch of a step. The sums are added in the order of the tiles.
void gradient_norm(const HostUpdate& update, const Total& total, int64_t threads);

// Copies the active entries of `grads` to their slots in out [K], or adds them. Parameters are not read.
void masked_pack_(const HostUpdate& update, float* out, bool accumulate, int64_t threads);

// Copies the active entries of tensors with items of this size to their slots, back, or exchanges them.
void masked_copy(const HostUpdate& entries, void* slots, int64_t item_bytes, Copy how, int64_t threads);

}  // namespace ltp
