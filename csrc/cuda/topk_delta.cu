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
    histogram_kernel(DevicePairs pairs, Histogram histogram, BinRange range) {
    extern __shared__ uint32_t bins[];
    __shared__ double scratch[kHistogramThreads / 32];
    DeviceThreads<kHistogramThreads> threads(scratch);
    histogram_block<Initial, Tuned>(pairs, histogram, range, blockIdx.x, gridDim.x, bins, threads);
}

// Four thread blocks a processor keep the memory busy.
template <class Initial, class Tuned>
__global__ void __launch_bounds__(kBandThreads, 4) band_kernel(DevicePairs pairs, Band band) {
    __shared__ BandScratch collected;
    __shared__ double scratch[kBandThreads / 32];
    DeviceThreads<kBandThreads> threads(scratch);
    band_block<Initial, Tuned>(pairs, band, blockIdx.x, collected, threads);
}

template <class Initial, class Tuned>
__global__ void __launch_bounds__(kSampleThreads) sample_kernel(DevicePairs pairs, Sample sample) {
    DeviceThreads<kSampleThreads> threads(nullptr);
    sample_block<Initial, Tuned>(pairs, sample, blockIdx.x, threads);
}

__global__ void __launch_bounds__(kCandidateThreads)
    candidate_histogram_kernel(Candidates candidates, CandidateBins bands) {
    DeviceThreads<kCandidateThreads> threads(nullptr);
    candidate_histogram_block(candidates, bands, blockIdx.x, threads);
}

__global__ void __launch_bounds__(kCandidateThreads) take_above_kernel(Candidates candidates, Above marks) {
    __shared__ double scratch[kCandidateThreads / 32];
    DeviceThreads<kCandidateThreads> threads(scratch);
    take_above_block(candidates, marks, blockIdx.x, threads);
}

__global__ void __launch_bounds__(kCandidateThreads) take_ties_kernel(Candidates candidates, Ties marks) {
    __shared__ double scratch[kCandidateThreads / 32];
    DeviceThreads<kCandidateThreads> threads(scratch);
    take_ties_block(candidates, marks, blockIdx.x, threads);
}

void check(cudaError_t status, const char* op) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(op) + ": CUDA error, " + cudaGetErrorString(status));
    }
}

unsigned grid_of(int64_t blocks, const char* op) {
    if (blocks > 0x7FFFFFFF) {
        throw std::invalid_argument(std::string(op) + ": " + std::to_string(blocks) + " thread blocks are too many");
    }
    return unsigned(blocks);
}

// A thread block a tile.
template <class Rest>
void launch_on_tiles(const char* op, void (*kernel)(Candidates, Rest), const Candidates& candidates, const Rest& rest,
                     void* stream) {
    if (candidates.n_tiles == 0) return;
    const unsigned grid = grid_of(candidates.n_tiles, op);
    kernel<<<grid, kCandidateThreads, 0, static_cast<cudaStream_t>(stream)>>>(candidates, rest);
    check(cudaGetLastError(), op);
}

int attribute_of_device(cudaDeviceAttr attribute, const char* op) {
    int device = 0, value = 0;
    check(cudaGetDevice(&device), op);
    check(cudaDeviceGetAttribute(&value, attribute, device), op);
    return value;
}

}  // namespace

void cuda_delta_histogram(const DevicePairs& pairs, const Histogram& histogram, void* stream) {
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
    with_pair_types(pairs, [&](auto initial, auto tuned) {
        const auto kernel = histogram_kernel<decltype(initial), decltype(tuned)>;
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), op);
        for (range.first = 0; range.first < range.row; range.first += range.count) {
            kernel<<<grid, kHistogramThreads, bytes, static_cast<cudaStream_t>(stream)>>>(pairs, histogram, range);
            check(cudaGetLastError(), op);
        }
    });
}

void cuda_delta_band(const DevicePairs& pairs, const Band& band, void* stream) {
    const char* const op = "delta_band";
    if (pairs.n_tiles == 0) return;
    const unsigned grid = grid_of(pairs.n_tiles, op);
    with_pair_types(pairs, [&](auto initial, auto tuned) {
        band_kernel<decltype(initial), decltype(tuned)>
            <<<grid, kBandThreads, 0, static_cast<cudaStream_t>(stream)>>>(pairs, band);
    });
    check(cudaGetLastError(), op);
}

void cuda_sample_keys(const DevicePairs& pairs, const Sample& sample, void* stream) {
    const char* const op = "sample_keys";
    if (sample.count == 0) return;
    const unsigned grid = grid_of((sample.count + kRunsPerBlock - 1) / kRunsPerBlock, op);
    with_pair_types(pairs, [&](auto initial, auto tuned) {
        sample_kernel<decltype(initial), decltype(tuned)>
            <<<grid, kSampleThreads, 0, static_cast<cudaStream_t>(stream)>>>(pairs, sample);
    });
    check(cudaGetLastError(), op);
}

void cuda_candidate_histogram(const Candidates& candidates, const CandidateBins& bands, void* stream) {
    launch_on_tiles("candidate_histogram", candidate_histogram_kernel, candidates, bands, stream);
}

void cuda_take_above(const Candidates& candidates, const Above& marks, void* stream) {
    launch_on_tiles("take_above", take_above_kernel, candidates, marks, stream);
}

void cuda_take_ties(const Candidates& candidates, const Ties& marks, void* stream) {
    launch_on_tiles("take_ties", take_ties_kernel, candidates, marks, stream);
}

}  // namespace ltp
