// masked_adamw_, masked_sum_squares and masked_pack_ on a GPU: one launch over a tile table, on the caller's stream.
#pragma once

#include <cstdint>

#include "../common/update.h"

namespace ltp {

constexpr int kWorkItem = 2048;  // active entries of a thread block, at most: whole blocks of 8-bit moments
constexpr int kItemsPerTile = int(kTile) / kWorkItem;

// Active entries of a tile from number `first` on, at most kWorkItem of them, the share of one thread block. Where the
// tile is a bitmap, they stand in its 64-entry groups from `group` on, before `end_group`. Rows of `work_items` in
// ltp_sparse/backends/work_items.py.
struct alignas(16) WorkItem {
    int32_t tile, first, group, end_group;
};

// All pointers are device memory.
struct DeviceUpdate : Update {
    const Prepared* prepared;  // [P], from `cuda_prepare_step`; null: what is packed is one gradient, `grad`
    uint64_t grad;
    const WorkItem* items;  // [I]
    int64_t n_items;
};

// Tiles whose sums are added up first. Groups are those of all tiles of a step: a norm does not depend on its launches.
constexpr int64_t kNormGroup = 64;

// Addresses of the parameters and gradients of a launch, by value: nothing is copied there before it, nothing must
// outlive it.
struct Addresses {
    static constexpr int kMost = 224;  // with `Step` less than 4 KB, which the arguments of a kernel may have
    int64_t first;                     // the parameter that comes first
    int count;
    uint64_t param[kMost], grad[kMost];
};

// As in csrc/cpu/masked_adamw.h. stream: a cudaStream_t. Throw std::runtime_error if the launch fails; they neither
// allocate nor wait, so that a CUDA graph can capture them. A tile that leads out of the memory given is not touched,
// and ends the kernel by a trap, as a failed assertion of torch does: the next call that waits for the device raises.
// Not seen here are rows that lead out of their parameter and ranks that are wrong in between, which the operator looks
// at.
//
// prepared: [P], written. params, grads: P addresses; 0: none. A launch for every `Addresses::kMost` parameters.
void cuda_prepare_step(const Step& step, const uint64_t* params, const uint64_t* grads, Prepared* prepared,
                       void* stream);

void cuda_masked_adamw_(const DeviceUpdate& update, void* stream);

// The same for 8-bit moments, which it calls; in a source of its own for the time that it takes to compile.
void cuda_masked_adamw_8bit_(const DeviceUpdate& update, void* stream);

// total.sums: float64 [T, kItemsPerTile], the sum of each work item in a fixed order; what a tile has no item for is
// left as it is. With total.arrived, 1 + G + T numbers for the G groups of all T tiles, the last thread block of each
// adds its own up; T and then G more sums stand behind the others then.
void cuda_masked_sum_squares(const DeviceUpdate& update, const Total& total, void* stream);

void cuda_masked_pack_(const DeviceUpdate& update, float* out, bool accumulate, void* stream);

}  // namespace ltp
