#include "device_threads.cuh"
#include "launch.cuh"
#include "masked_adamw_block.cuh"

namespace ltp {
namespace {

__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const __grid_constant__ Step step, const __grid_constant__ Addresses addresses, Prepared* prepared) {
    const int i = int(blockIdx.x * kThreads + threadIdx.x);
    if (i >= addresses.count) return;
    const int64_t param = addresses.first + i;
    prepared[param] = prepare(step, param, addresses.param[i], addresses.grad[i]);
}

// With random bits, ptxas aims at nine blocks and spills; 0 leaves the number to it.
template <class V>
__global__ void __launch_bounds__(kThreads, V::kStochastic ? 7 : 0)
    update_kernel(const __grid_constant__ DeviceUpdate update) {
    __shared__ Listed listed;
    DeviceThreads<kThreads> threads(nullptr);
    update_block<V>(update, blockIdx.x, listed, threads);
}

}  // namespace

void cuda_prepare_step(const Step& step, const uint64_t* params, const uint64_t* grads, Prepared* prepared,
                       void* stream) {
    Addresses addresses;
    for (addresses.first = 0; addresses.first < step.n_params; addresses.first += Addresses::kMost) {
        const int64_t left = step.n_params - addresses.first;
        addresses.count = int(left < Addresses::kMost ? left : Addresses::kMost);
        for (int i = 0; i < addresses.count; ++i) {
            addresses.param[i] = params[addresses.first + i];
            addresses.grad[i] = grads[addresses.first + i];
        }
        const Grid grid = {(addresses.count + kThreads - 1) / kThreads, kThreads};
        launch("prepare_step", prepare_kernel, grid, stream, step, addresses, prepared);
    }
}

void cuda_masked_adamw_(const DeviceUpdate& update, void* stream) {
    if (update.state.scales != nullptr) return cuda_masked_adamw_8bit_(update, stream);
    with_variant(update, [&](auto variant) {
        launch("masked_adamw_", update_kernel<decltype(variant)>, {update.n_items, kThreads}, stream, update);
    });
}

}  // namespace ltp
