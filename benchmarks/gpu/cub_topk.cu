// CUB's top-k of absolute deltas, for the benchmark alone: `cub_topk.py` compiles and calls it.
//
//   initial, tuned: [n] on the device, of type `Weight`; tuned null: `initial` holds the keys themselves, float32
//   found:          [k] float32 on the device, written: the k largest keys, in no order
//   temporary:      device memory of `bytes` bytes; null: `bytes` is written, and nothing else is done
//   returns         a cudaError_t; all work goes to `stream`

#include <cstddef>
#include <cstdint>
#include <limits>

#include <cuda_bf16.h>
#include <thrust/iterator/counting_iterator.h>
#include <thrust/iterator/transform_iterator.h>
#include <cub/device/device_topk.cuh>
#include <cuda/stream_ref>

namespace {

enum class Weight : int { float32, bfloat16 };

template <typename T>
struct Delta {
    const T* initial;
    const T* tuned;

    __host__ __device__ float operator()(std::int64_t i) const {
        return fabsf(static_cast<float>(tuned[i]) - static_cast<float>(initial[i]));
    }
};

template <typename Keys>
cudaError_t largest(Keys keys, std::int64_t n, float* found, std::int64_t k, void* temporary, std::size_t& bytes,
                    cudaStream_t stream) {
    // What it supports; it has no other order and no other determinism.
    const auto environment = cuda::std::execution::env{
        cuda::stream_ref{stream}, cuda::execution::require(cuda::execution::determinism::not_guaranteed,
                                                           cuda::execution::output_ordering::unsorted)};
    // Narrow offsets where they suffice, as they are faster.
    if (n <= std::numeric_limits<std::int32_t>::max())
        return cub::DeviceTopK::MaxKeys(temporary, bytes, keys, found, static_cast<std::int32_t>(n),
                                        static_cast<std::int32_t>(k), environment);
    return cub::DeviceTopK::MaxKeys(temporary, bytes, keys, found, n, k, environment);
}

template <typename T>
auto deltas(const void* initial, const void* tuned) {
    const Delta<T> delta{static_cast<const T*>(initial), static_cast<const T*>(tuned)};
    return thrust::make_transform_iterator(thrust::make_counting_iterator(std::int64_t{0}), delta);
}

}  // namespace

extern "C" int cub_topk(const void* initial, const void* tuned, Weight weight, std::int64_t n, float* found,
                        std::int64_t k, void* temporary, std::size_t* bytes, cudaStream_t stream) {
    if (tuned == nullptr) return largest(static_cast<const float*>(initial), n, found, k, temporary, *bytes, stream);
    if (weight == Weight::float32)
        return largest(deltas<float>(initial, tuned), n, found, k, temporary, *bytes, stream);
    return largest(deltas<__nv_bfloat16>(initial, tuned), n, found, k, temporary, *bytes, stream);
}

extern "C" const char* cub_topk_error(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }
