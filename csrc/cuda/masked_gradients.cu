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

// What is added to needs more registers in flight than ptxas gives of its own.
template <class Grad, bool ACCUMULATE>
__global__ void __launch_bounds__(kThreads, ACCUMULATE ? 10 : 0)
    pack_kernel(const __grid_constant__ DeviceUpdate update, float* out) {
    __shared__ Listed listed;
    DeviceThreads<kThreads> threads(nullptr);
    pack_block<Grad, ACCUMULATE>(update, out, blockIdx.x, listed, threads);
}

}  // namespace

void cuda_masked_sum_squares(const DeviceUpdate& update, const Total& total, void* stream) {
    if (update.n_items == 0) return;
    const unsigned grid = blocks_of(update.n_items, "masked_sum_squares");
    with_norm_variant(update, [&](auto variant) {
        sum_squares_kernel<decltype(variant)><<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(update, total);
    });
    check("masked_sum_squares");
}

void cuda_masked_pack_(const DeviceUpdate& update, float* out, bool accumulate, void* stream) {
    if (update.n_items == 0) return;
    const unsigned grid = blocks_of(update.n_items, "masked_pack_");
    const auto on = static_cast<cudaStream_t>(stream);
    with_storage_type(update.grad_dtype, [&](auto grad) {
        with_flag(accumulate, [&](auto accumulated) {
            pack_kernel<decltype(grad), decltype(accumulated)::value><<<grid, kThreads, 0, on>>>(update, out);
        });
    });
    check("masked_pack_");
}

}  // namespace ltp
