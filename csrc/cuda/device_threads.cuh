// The threads of a thread block of N threads on a GPU; active_entries.cuh says what `Threads` are.
#pragma once

#include <cstdint>

namespace ltp {

template <int N>
class DeviceThreads {
  public:
    template <class T>
    struct PerThread {
        T own;
        __device__ T& operator[](int) { return own; }
    };

    // scratch: N / 32 items in shared memory
    __device__ explicit DeviceThreads(double* scratch) : scratch_(scratch) {}

    template <class F>
    __device__ void each(F f) {
        f(int(threadIdx.x));
    }

    __device__ void sync() { __syncthreads(); }

    __device__ int largest(PerThread<int>& values) {
        int* const scratch = reinterpret_cast<int*>(scratch_);
        const int warp = __reduce_max_sync(0xFFFFFFFF, values.own);
        __syncthreads();  // the scratch may still be read
        if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = warp;
        __syncthreads();
        int result = scratch[0];
        for (int i = 1; i < N / 32; ++i) result = max(result, scratch[i]);
        return result;
    }

    // Thread 0 has the result; always in the same order.
    __device__ double sum(PerThread<double>& values) {
        for (int offset = 16; offset > 0; offset /= 2) {
            values.own += __shfl_down_sync(0xFFFFFFFF, values.own, offset);
        }
        __syncthreads();
        if (threadIdx.x % 32 == 0) scratch_[threadIdx.x / 32] = values.own;
        __syncthreads();
        double result = scratch_[0];
        for (int i = 1; i < N / 32; ++i) result += scratch_[i];
        return result;
    }

    __device__ int scan(PerThread<int>& values) {
        int* const scratch = reinterpret_cast<int*>(scratch_);
        const int lane = threadIdx.x % 32, own = values.own;
        for (int offset = 1; offset < 32; offset *= 2) {
            const int earlier = __shfl_up_sync(0xFFFFFFFF, values.own, offset);
            if (lane >= offset) values.own += earlier;
        }
        __syncthreads();
        if (lane == 31) scratch[threadIdx.x / 32] = values.own;
        __syncthreads();
        int before = 0, total = 0;
        for (int i = 0; i < N / 32; ++i) {
            if (i < int(threadIdx.x / 32)) before += scratch[i];
            total += scratch[i];
        }
        values.own += before - own;
        return total;
    }

    __device__ void scan_lanes(PerThread<int64_t>& values, PerThread<int64_t>& totals) {
        const int64_t own = values.own;
        for (int offset = 1; offset < 32; offset *= 2) {
            const int64_t earlier = __shfl_up_sync(0xFFFFFFFF, values.own, offset);
            if (int(threadIdx.x % 32) >= offset) values.own += earlier;
        }
        totals.own = __shfl_sync(0xFFFFFFFF, values.own, 31);
        values.own -= own;
    }

    // Every thread makes what it wrote visible, then one counts the block: as threadFenceReduction of NVIDIA's samples.
    template <class Count>
    __device__ bool last(Count* arrived, int64_t blocks) {
        __shared__ bool is_last;
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            is_last = add(arrived, Count(1)) == Count(blocks - 1);
            if (is_last) *arrived = 0;
        }
        __syncthreads();
        if (is_last) __threadfence();
        return is_last;
    }

    __device__ void from_lane_xor(const PerThread<uint32_t>& values, int mask, PerThread<uint32_t>& received) {
        received.own = __shfl_xor_sync(0xFFFFFFFF, values.own, mask);
    }

    __device__ void count(uint32_t* counter) { atomicAdd(counter, 1u); }

    __device__ int64_t add(int64_t* counter, int64_t value) {
        return int64_t(atomicAdd(reinterpret_cast<unsigned long long*>(counter), (unsigned long long)(value)));
    }

    __device__ uint32_t add(uint32_t* counter, uint32_t value) { return atomicAdd(counter, value); }

    __device__ void trap() { __trap(); }

    __device__ void set_bits(int32_t* word, int32_t bits) { atomicOr(word, bits); }
    __device__ void set_bits(uint32_t* word, uint32_t bits) { atomicOr(word, bits); }

  private:
    double* scratch_;
};

}  // namespace ltp
