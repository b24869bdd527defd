#include "device_threads.cuh"
#include "launch.cuh"
#include "masked_adamw_block.cuh"

namespace ltp {
namespace {

template <class V>
__global__ void __launch_bounds__(kThreads)
    sum_squares_kernel(const __grid_constant__ DeviceUpdate update, const __grid_constant__ Total total) {
    __shared__ Listed listed;
    __shared__ double scratch[kThreads / 32];
    DeviceThreads<kThreads> threads(scratch);
    sum_squares_block<V>(update, total, blockIdx.x, listed, threads);
}

// Adding needs more registers in flight than ptxas chooses by itself.
template <class Grad, bool ACCUMULATE>
__global__ void __launch_bounds__(kThreads, ACCUMULATE ? 10 : 0)
    pack_kernel(const __grid_constant__ DeviceUpdate update, float* out) {
    __shared__ Listed listed;
    DeviceThreads<kThreads> threads(nullptr);
    pack_block<Grad, ACCUMULATE>(update, out, blockIdx.x, listed, threads);
}

}  // namespace

void cuda_masked_sum_squares(const DeviceUpdate& update, const Total& total, void* stream) {
    with_norm_variant(update, [&](auto variant) {
        const auto kernel = sum_squares_kernel<decltype(variant)>;
        launch("masked_sum_squares", kernel, {update.n_items, kThreads}, stream, update, total);
    });
}

void cuda_masked_pack_(const DeviceUpdate& update, float* out, bool accumulate, void* stream) {
    with_storage_type(update.grad_dtype, [&](auto grad) {
        with_flag(accumulate, [&](auto accumulated) {
            const auto kernel = pack_kernel<decltype(grad), decltype(accumulated)::value>;
            launch("masked_pack_", kernel, {update.n_items, kThreads}, stream, update, out);
        });
    });
}

}  // namespace ltp
