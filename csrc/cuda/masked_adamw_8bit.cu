#include "device_threads.cuh"
#include "launch.cuh"
#include "masked_adamw_block.cuh"

namespace ltp {
namespace {

// With an anchor, the loads in flight need more registers than six blocks have.
template <class V>
__global__ void __launch_bounds__(kThreads, V::kAnchor ? 5 : 6)
    update_coded_kernel(const __grid_constant__ DeviceUpdate update) {
    __shared__ Listed listed;
    DeviceThreads<kThreads> threads(nullptr);
    update_coded_block<V>(update, blockIdx.x, listed, threads);
}

}  // namespace

void cuda_masked_adamw_8bit_(const DeviceUpdate& update, void* stream) {
    with_variant(update, [&](auto variant) {
        launch("masked_adamw_", update_coded_kernel<decltype(variant)>, {update.n_items, kThreads}, stream, update);
    });
}

}  // namespace ltp
