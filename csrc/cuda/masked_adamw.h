// masked_adamw_, masked_sum_squares and masked_pack_ on a GPU: one launch over a tile table, on the caller's stream.
#pragma once

#include <cstdint>

#include "../common/update.h"

namespace ltp {

constexpr int kWorkItem = 2048;  // the most active entries of a thread block: whole blocks of 8-bit moments
constexpr int kItemsPerTile = int(kTile) / kWorkItem;

// The share of one thread block: at most kWorkItem active entries of a tile, from number `first` on. In a bitmap they
// are in the 64-entry groups from `group` to `end_group` - 1. ltp_sparse/backends/work_items.py makes these rows.
struct alignas(16) WorkItem {
    int32_t tile, first, group, end_group;
};

// All pointers are device memory.
struct DeviceUpdate : Update {
    const Prepared* prepared;  // [P], from `cuda_prepare_step`; null if the one gradient `grad` is packed
    uint64_t grad;
    const WorkItem* items;  // [I]
    int64_t n_items;
};

// How many tiles' sums are added to one. Groups are formed over all tiles of a step, so that a norm does not depend on
// its launches.
constexpr int64_t kNormGroup = 64;

// Addresses of the parameters and gradients of a launch. They are passed by value, so that nothing is copied to the
// device before it.
struct Addresses {
    static constexpr int kMost = 224;  // with `Step` less than 4 KB, the limit for the arguments of a kernel
    int64_t first;                     // the first parameter
    int count;
    uint64_t param[kMost], grad[kMost];
};

// The functions of csrc/cpu/masked_adamw.h on a GPU. stream: a cudaStream_t. They throw std::runtime_error if the
// launch fails. They neither allocate nor wait, so that a CUDA graph can capture them. A tile that leads outside the
// memory of the call is not touched and ends the kernel by a trap, like a failed assertion of torch: the next call that
// waits for the device raises. Only the operator's checks see rows that lead outside their parameter, and wrong ranks
// before the last one.
//
// prepared: [P], written. params, grads: P addresses, 0 for none. One launch for every `Addresses::kMost` parameters.
void cuda_prepare_step(const Step& step, const uint64_t* params, const uint64_t* grads, Prepared* prepared,
                       void* stream);

void cuda_masked_adamw_(const DeviceUpdate& update, void* stream);

// The part for 8-bit moments, in a source of its own since it takes long to compile.
void cuda_masked_adamw_8bit_(const DeviceUpdate& update, void* stream);

// total.sums: float64 [T, kItemsPerTile], the sum of each work item in a fixed order. Places without an item are not
// written. With total.arrived, 1 + G + T counters for the G groups of all T tiles, the last thread block of each tile
// and group adds up its sums; T and then G more sums follow behind the others.
void cuda_masked_sum_squares(const DeviceUpdate& update, const Total& total, void* stream);

void cuda_masked_pack_(const DeviceUpdate& update, float* out, bool accumulate, void* stream);

}  // namespace ltp
