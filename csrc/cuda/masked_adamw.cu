#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "device_threads.cuh"
#include "masked_adamw_block.cuh"

namespace ltp {
namespace {

template <class Param, class Grad, bool PACKED>
__global__ void __launch_bounds__(kThreads) update_kernel(const __grid_constant__ DeviceUpdate update) {
    __shared__ uint16_t listed[kSubTile];
    __shared__ double scratch[kThreads / 32];
    DeviceThreads<kThreads> threads(scratch);
    update_block<Param, Grad, PACKED>(update, blockIdx.x, listed, threads);
}

template <class Param, class Grad, bool PACKED>
__global__ void __launch_bounds__(kThreads) update_coded_kernel(const __grid_constant__ DeviceUpdate update) {
    __shared__ double scratch[kThreads / 32];
    DeviceThreads<kThreads> threads(scratch);
    update_coded_block<Param, Grad, PACKED>(update, blockIdx.x, threads);
}

template <class Param, class Grad, bool PACKED>
__global__ void __launch_bounds__(kThreads)
    sum_squares_kernel(const __grid_constant__ DeviceUpdate update, double* out) {
    __shared__ uint16_t listed[kSubTile];
    __shared__ double scratch[kThreads / 32];
    DeviceThreads<kThreads> threads(scratch);
    const double sum = sum_squares_block<Param, Grad, PACKED>(update, blockIdx.x, listed, threads);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

template <class Grad>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const __grid_constant__ DeviceUpdate update, float* out, bool accumulate) {
    __shared__ uint16_t listed[kSubTile];
    __shared__ double scratch[kThreads / 32];
    DeviceThreads<kThreads> threads(scratch);
    pack_block<Grad>(update, out, accumulate, blockIdx.x, listed, threads);
}

unsigned grid_of(const DeviceUpdate& update, const char* op) {
    const int64_t blocks = update.n_tiles * update.parts;
    if (update.parts < 1 || blocks > 0x7FFFFFFF) {
        throw std::invalid_argument(std::string(op) + ": " + std::to_string(blocks) + " thread blocks are too many");
    }
    return unsigned(blocks);
}

void check(const char* op) {
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(op) + ": CUDA error, " + cudaGetErrorString(status));
    }
}

}  // namespace

void cuda_masked_adamw_(const DeviceUpdate& update, void* stream) {
    if (update.n_tiles == 0) return;
    const unsigned grid = grid_of(update, "masked_adamw_");
    const auto on = static_cast<cudaStream_t>(stream);
    with_storage_types(update.param_dtype, update.grad_dtype, update.packed, [&](auto param, auto grad, auto packed) {
        using Param = decltype(param);
        using Grad = decltype(grad);
        constexpr bool kPacked = decltype(packed)::value;
        if (update.state.scales != nullptr) {
            update_coded_kernel<Param, Grad, kPacked><<<grid, kThreads, 0, on>>>(update);
        } else {
            update_kernel<Param, Grad, kPacked><<<grid, kThreads, 0, on>>>(update);
        }
    });
    check("masked_adamw_");
}

void cuda_masked_sum_squares(const DeviceUpdate& update, double* out, void* stream) {
    if (update.n_tiles == 0) return;
    const unsigned grid = grid_of(update, "masked_sum_squares");
    const auto on = static_cast<cudaStream_t>(stream);
    with_storage_types(update.param_dtype, update.grad_dtype, update.packed, [&](auto param, auto grad, auto packed) {
        using Param = decltype(param);
        using Grad = decltype(grad);
        sum_squares_kernel<Param, Grad, decltype(packed)::value><<<grid, kThreads, 0, on>>>(update, out);
    });
    check("masked_sum_squares");
}

void cuda_masked_pack_(const DeviceUpdate& update, float* out, bool accumulate, void* stream) {
    if (update.n_tiles == 0) return;
    const unsigned grid = grid_of(update, "masked_pack_");
    const auto on = static_cast<cudaStream_t>(stream);
    with_storage_type(update.grad_dtype, [&](auto grad) {
        pack_kernel<decltype(grad)><<<grid, kThreads, 0, on>>>(update, out, accumulate);
    });
    check("masked_pack_");
}

}  // namespace ltp
