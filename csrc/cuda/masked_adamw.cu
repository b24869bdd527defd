#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "device_threads.cuh"
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

// The parts of a tile come one after the other. What a dimension of the grid cannot count goes to the next.
constexpr int64_t kMostRows = 65535;

__device__ Place own_place() { return {int64_t(blockIdx.z) * gridDim.y + blockIdx.y, int(blockIdx.x)}; }

template <class Param, class Grad, bool PACKED>
__global__ void __launch_bounds__(kThreads) update_kernel(const __grid_constant__ DeviceUpdate update) {
    __shared__ uint16_t listed[kSubTile];
    __shared__ double scratch[kThreads / 32];
    DeviceThreads<kThreads> threads(scratch);
    const Place place = own_place();
    if (place.tile < update.n_tiles) update_block<Param, Grad, PACKED>(update, place, listed, threads);
}

template <class Param, class Grad, bool PACKED>
__global__ void __launch_bounds__(kThreads) update_coded_kernel(const __grid_constant__ DeviceUpdate update) {
    __shared__ double scratch[kThreads / 32];
    DeviceThreads<kThreads> threads(scratch);
    const Place place = own_place();
    if (place.tile < update.n_tiles) update_coded_block<Param, Grad, PACKED>(update, place, threads);
}

template <class Param, class Grad, bool PACKED>
__global__ void __launch_bounds__(kThreads)
    sum_squares_kernel(const __grid_constant__ DeviceUpdate update, const __grid_constant__ Total total) {
    __shared__ uint16_t listed[kSubTile];
    __shared__ double scratch[kThreads / 32];
    DeviceThreads<kThreads> threads(scratch);
    const Place place = own_place();
    if (place.tile < update.n_tiles) sum_squares_block<Param, Grad, PACKED>(update, total, place, listed, threads);
}

template <class Grad>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const __grid_constant__ DeviceUpdate update, float* out, bool accumulate) {
    __shared__ uint16_t listed[kSubTile];
    __shared__ double scratch[kThreads / 32];
    DeviceThreads<kThreads> threads(scratch);
    const Place place = own_place();
    if (place.tile < update.n_tiles) pack_block<Grad>(update, out, accumulate, place, listed, threads);
}

dim3 grid_of(const DeviceUpdate& update, const char* op) {
    const int64_t rows = update.n_tiles < kMostRows ? update.n_tiles : kMostRows;
    const int64_t layers = (update.n_tiles + rows - 1) / rows;
    if (update.parts < 1 || layers > kMostRows) {
        throw std::invalid_argument(std::string(op) + ": " + std::to_string(update.n_tiles) + " tiles in " +
                                    std::to_string(update.parts) + " parts each cannot be launched");
    }
    return dim3(unsigned(update.parts), unsigned(rows), unsigned(layers));
}

void check(const char* op) {
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(op) + ": CUDA error, " + cudaGetErrorString(status));
    }
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
        prepare_kernel<<<(addresses.count + kThreads - 1) / kThreads, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
            step, addresses, prepared);
    }
    check("prepare_step");
}

void cuda_masked_adamw_(const DeviceUpdate& update, void* stream) {
    if (update.n_tiles == 0) return;
    const dim3 grid = grid_of(update, "masked_adamw_");
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

void cuda_masked_sum_squares(const DeviceUpdate& update, const Total& total, void* stream) {
    if (update.n_tiles == 0) return;
    const dim3 grid = grid_of(update, "masked_sum_squares");
    const auto on = static_cast<cudaStream_t>(stream);
    with_storage_types(update.param_dtype, update.grad_dtype, update.packed, [&](auto param, auto grad, auto packed) {
        using Param = decltype(param);
        using Grad = decltype(grad);
        sum_squares_kernel<Param, Grad, decltype(packed)::value><<<grid, kThreads, 0, on>>>(update, total);
    });
    check("masked_sum_squares");
}

void cuda_masked_pack_(const DeviceUpdate& update, float* out, bool accumulate, void* stream) {
    if (update.n_tiles == 0) return;
    const dim3 grid = grid_of(update, "masked_pack_");
    const auto on = static_cast<cudaStream_t>(stream);
    with_storage_type(update.grad_dtype, [&](auto grad) {
        pack_kernel<decltype(grad)><<<grid, kThreads, 0, on>>>(update, out, accumulate);
    });
    check("masked_pack_");
}

}  // namespace ltp
