#include <algorithm>

#include "device_threads.cuh"
#include "launch.cuh"
#include "topk_delta_search.cuh"

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

// Four thread blocks per processor keep the memory busy.
template <class Initial, class Tuned>
__global__ void __launch_bounds__(kBandThreads, 4)
    band_kernel(DevicePairs pairs, Band band, Search search, int64_t bins) {
    __shared__ BandScratch collected;
    __shared__ double scratch[kBandThreads / 32];
    DeviceThreads<kBandThreads> threads(scratch);
    band_kernel_block<Initial, Tuned>(pairs, band, search, bins, blockIdx.x, collected, threads);
}

// One thread block per processor is named here and below, since ptxas otherwise takes 32 registers and spills.
__global__ void __launch_bounds__(kSampleThreads, 1) sample_upper_kernel(DevicePairs pairs, Bracket bracket) {
    __shared__ SampleScratch scratch;
    DeviceThreads<kSampleThreads> threads(nullptr);
    sample_upper_block(pairs, bracket, blockIdx.x, gridDim.x, scratch, threads);
    if (threads.last(bracket.arrived, gridDim.x)) decide_upper(bracket, threads);
}

__global__ void __launch_bounds__(kSampleThreads, 1) sample_lower_kernel(Bracket bracket) {
    __shared__ uint32_t bins[4 << kDigitBits];
    DeviceThreads<kSampleThreads> threads(nullptr);
    sample_lower_block(bracket, blockIdx.x, gridDim.x, bins, threads);
    if (threads.last(bracket.arrived + 1, gridDim.x)) decide_lower(bracket, threads);
}

__global__ void __launch_bounds__(kCandidateThreads, 1)
    candidate_histogram_kernel(Candidates candidates, CandidateBins bands, Search search, int round) {
    extern __shared__ uint32_t bins[];
    DeviceThreads<kCandidateThreads> threads(nullptr);
    candidate_kernel_block(candidates, bands, search, round, blockIdx.x, gridDim.x, bins, threads);
}

__global__ void __launch_bounds__(kCandidateThreads, 1)
    take_above_kernel(Candidates candidates, Above marks, Search search, const int64_t* above, int rounds) {
    __shared__ double scratch[kCandidateThreads / 32];
    DeviceThreads<kCandidateThreads> threads(scratch);
    above_kernel_block(candidates, marks, search, above, rounds, blockIdx.x, gridDim.x, threads);
}

__global__ void __launch_bounds__(kTieThreads, 1) take_ties_kernel(Candidates candidates, Ties marks) {
    __shared__ double scratch[kTieThreads / 32];
    DeviceThreads<kTieThreads> threads(scratch);
    take_ties_block<kTieThreads>(candidates, marks, blockIdx.x, threads);
}

template <class Initial, class Tuned>
__global__ void __launch_bounds__(kBandThreads, 4)
    take_last_kernel(DevicePairs pairs, Candidates candidates, Ties marks, Band band, Search search) {
    __shared__ BandScratch collected;
    __shared__ double scratch[kBandThreads / 32];
    DeviceThreads<kBandThreads> threads(scratch);
    take_last_block<Initial, Tuned>(pairs, candidates, marks, band, search, blockIdx.x, collected, threads);
}

int attribute_of_device(cudaDeviceAttr attribute, const char* op) {
    int device = 0, value = 0;
    check(cudaGetDevice(&device), op);
    check(cudaDeviceGetAttribute(&value, attribute, device), op);
    return value;
}

// A thread has several samples, and a processor at most one thread block.
Grid sample_grid(const Bracket& bracket, const char* op) {
    const int64_t enough = (bracket.runs * kRun + 4 * kSampleThreads - 1) / (4 * kSampleThreads);
    return {std::min<int64_t>(attribute_of_device(cudaDevAttrMultiProcessorCount, op), enough), kSampleThreads};
}

// A warp for each tile, up to two thread blocks per processor.
Grid candidate_grid(const Candidates& candidates, const char* op) {
    const int64_t enough = (candidates.n_tiles + kCandidateThreads / 32 - 1) / (kCandidateThreads / 32);
    return {std::min<int64_t>(2 * attribute_of_device(cudaDevAttrMultiProcessorCount, op), enough), kCandidateThreads};
}

}  // namespace

void cuda_delta_histogram(const DevicePairs& pairs, const Histogram& histogram, void* stream) {
    const char* const op = "delta_histogram";
    const int processors = attribute_of_device(cudaDevAttrMultiProcessorCount, op);
    const int shared = attribute_of_device(cudaDevAttrMaxSharedMemoryPerBlockOptin, op);
    BinRange range = {};
    range.row = histogram.prefixes == nullptr ? 32768 : 65536;
    range.shift = histogram.prefixes == nullptr ? 16 : 0;
    range.count = 32768;
    while (range.count * int(sizeof(uint32_t)) + 1024 > shared)
        range.count /= 2;  // 1024 bytes for scratch and the system
    const int bytes = range.count * int(sizeof(uint32_t));
    const Grid grid = {std::min<int64_t>(processors, pairs.n_tiles), kHistogramThreads, bytes};
    with_pair_types(pairs, [&](auto initial, auto tuned) {
        const auto kernel = histogram_kernel<decltype(initial), decltype(tuned)>;
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), op);
        for (range.first = 0; range.first < range.row; range.first += range.count) {
            launch(op, kernel, grid, stream, pairs, histogram, range);
        }
    });
}

void cuda_delta_band(const DevicePairs& pairs, const Band& band, const Search& search, int64_t bins, void* stream) {
    with_pair_types(pairs, [&](auto initial, auto tuned) {
        launch("delta_band", band_kernel<decltype(initial), decltype(tuned)>, {pairs.n_tiles, kBandThreads}, stream,
               pairs, band, search, bins);
    });
}

void cuda_sample_upper(const DevicePairs& pairs, const Bracket& bracket, void* stream) {
    const char* const op = "sample_bracket";
    launch(op, sample_upper_kernel, sample_grid(bracket, op), stream, pairs, bracket);
}

void cuda_sample_lower(const Bracket& bracket, void* stream) {
    const char* const op = "sample_bracket";
    launch(op, sample_lower_kernel, sample_grid(bracket, op), stream, bracket);
}

void cuda_candidate_histogram(const Candidates& candidates, const CandidateBins& bands, const Search& search, int round,
                              void* stream) {
    const char* const op = "candidate_histogram";
    const auto kernel = candidate_histogram_kernel;
    Grid grid = candidate_grid(candidates, op);
    grid.bytes = int(bands.bins * int64_t(sizeof(uint32_t)));
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.bytes), op);
    launch(op, kernel, grid, stream, candidates, bands, search, round);
}

void cuda_take_above(const Candidates& candidates, const Above& marks, const Search& search, const int64_t* above,
                     int rounds, void* stream) {
    const char* const op = "take_above";
    launch(op, take_above_kernel, candidate_grid(candidates, op), stream, candidates, marks, search, above, rounds);
}

void cuda_take_ties(const Candidates& candidates, const Ties& marks, void* stream) {
    launch("take_ties", take_ties_kernel, {candidates.n_tiles, kTieThreads}, stream, candidates, marks);
}

void cuda_take_last(const DevicePairs& pairs, const Candidates& candidates, const Ties& marks, const Band& band,
                    const Search& search, void* stream) {
    with_pair_types(pairs, [&](auto initial, auto tuned) {
        launch("take_ties", take_last_kernel<decltype(initial), decltype(tuned)>, {pairs.n_tiles, kBandThreads}, stream,
               pairs, candidates, marks, band, search);
    });
}

}  // namespace ltp
