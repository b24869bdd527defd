#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "device_threads.cuh"
#include "topk_delta_block.cuh"

namespace ltp {
namespace {

template <class Initial, class Tuned>
__global__ void __launch_bounds__(kHistogramThreads, 1)
    histogram_kernel(CudaPairs pairs, CudaHistogram histogram, BinRange range) {
    extern __shared__ uint32_t bins[];
    __shared__ double scratch[kHistogramThreads / 32];
    DeviceThreads<kHistogramThreads> threads(scratch);
    histogram_block<Initial, Tuned>(pairs, histogram, range, blockIdx.x, gridDim.x, bins, threads);
}

// Four thread blocks a processor keep the memory busy.
template <class Initial, class Tuned>
__global__ void __launch_bounds__(kBandThreads, 4) band_kernel(CudaPairs pairs, CudaBand band) {
    __shared__ BandScratch collected;
    __shared__ double scratch[kBandThreads / 32];
    DeviceThreads<kBandThreads> threads(scratch);
    band_block<Initial, Tuned>(pairs, band, blockIdx.x, collected, threads);
}

// Calls launch(initial, tuned) with values of the storage types.
template <class Launch>
void with_types(const CudaPairs& pairs, Launch launch) {
    const auto with_tuned = [&](auto tuned) {
        switch (pairs.initial_dtype) {
            case -1:
                return launch(Zeros(), tuned);
            case int(Dtype::kFloat32):
                return launch(float(), tuned);
            case int(Dtype::kBFloat16):
                return launch(BFloat16(), tuned);
            default:
                return launch(Float16(), tuned);
        }
    };
    switch (pairs.tuned_dtype) {
        case int(Dtype::kFloat32):
            return with_tuned(float());
        case int(Dtype::kBFloat16):
            return with_tuned(BFloat16());
        default:
            return with_tuned(Float16());
    }
}

void check(cudaError_t status, const char* op) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(op) + ": CUDA error, " + cudaGetErrorString(status));
    }
}

int attribute_of_device(cudaDeviceAttr attribute, const char* op) {
    int device = 0, value = 0;
    check(cudaGetDevice(&device), op);
    check(cudaDeviceGetAttribute(&value, attribute, device), op);
    return value;
}

}  // namespace

void cuda_delta_histogram(const CudaPairs& pairs, const CudaHistogram& histogram, void* stream) {
    const char* const op = "delta_histogram";
    if (pairs.n_tiles == 0) return;
    const int processors = attribute_of_device(cudaDevAttrMultiProcessorCount, op);
    const int shared = attribute_of_device(cudaDevAttrMaxSharedMemoryPerBlockOptin, op);
    const unsigned grid = unsigned(std::min<int64_t>(processors, pairs.n_tiles));
    BinRange range = {};
    range.row = histogram.prefixes == nullptr ? 32768 : 65536;
    range.shift = histogram.prefixes == nullptr ? 16 : 0;
    range.count = 32768;
    while (range.count * int(sizeof(uint32_t)) + 1024 > shared) range.count /= 2;  // 1024: scratch, and the system's
    const int bytes = range.count * int(sizeof(uint32_t));
    with_types(pairs, [&](auto initial, auto tuned) {
        const auto kernel = histogram_kernel<decltype(initial), decltype(tuned)>;
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), op);
        for (range.first = 0; range.first < range.row; range.first += range.count) {
            kernel<<<grid, kHistogramThreads, bytes, static_cast<cudaStream_t>(stream)>>>(pairs, histogram, range);
            check(cudaGetLastError(), op);
        }
    });
}

void cuda_delta_band(const CudaPairs& pairs, const CudaBand& band, void* stream) {
    const char* const op = "delta_band";
    if (pairs.n_tiles == 0) return;
    if (pairs.n_tiles > 0x7FFFFFFF) {
        throw std::invalid_argument("delta_band: " + std::to_string(pairs.n_tiles) + " tiles are too many");
    }
    with_types(pairs, [&](auto initial, auto tuned) {
        band_kernel<decltype(initial), decltype(tuned)>
            <<<unsigned(pairs.n_tiles), kBandThreads, 0, static_cast<cudaStream_t>(stream)>>>(pairs, band);
    });
    check(cudaGetLastError(), op);
}

}  // namespace ltp
