// masked_adamw_, masked_sum_squares and masked_pack_ on a GPU: one launch over a tile table, on the caller's stream.
#pragma once

#include <cstdint>

#include "../common/update.h"

namespace ltp {

// All pointers are device memory.
struct DeviceUpdate : Update {
    const int64_t* addresses;  // [P, 2] of parameter and gradient, 0: none; packed: all gradients are at the same [K]
    int parts;                 // thread blocks a tile
};

// As in csrc/cpu/masked_adamw.h. stream: a cudaStream_t. Throw std::runtime_error if the launch fails; they neither
// allocate nor wait, so that a CUDA graph can capture them. A tile that leads out of the memory given is not touched,
// and ends the kernel by a trap, as a failed assertion of torch does: the next call that waits for the device raises.
// Not seen here are rows that lead out of their parameter and ranks that are wrong in between, which the operator looks
// at.
void cuda_masked_adamw_(const DeviceUpdate& update, void* stream);

// out: float64 [T, parts], a sum per thread block, each in a fixed order.
void cuda_masked_sum_squares(const DeviceUpdate& update, double* out, void* stream);

// addresses: [P] of the gradients alone.
void cuda_masked_pack_(const DeviceUpdate& update, float* out, bool accumulate, void* stream);

}  // namespace ltp
