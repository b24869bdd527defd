// The threads of a thread block of N threads on a GPU; active_entries.cuh says what `Threads` are.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/dtypes.h"

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

    // In inline assembly for two reasons. The compiler does not know that an address from a table is in global memory.
    // And it would move plain loads down to their first use, where each would be waited for by itself.
    template <class T>
    __device__ T load(const T* from) const {
        const size_t at = __cvta_generic_to_global(from);
        T item;
        if constexpr (sizeof(T) > 16) {
            using Part = Vector<uint32_t, (alignof(T) < 16 ? alignof(T) : 16) / 4>;
            constexpr int kParts = sizeof(T) / sizeof(Part);
            Part parts[kParts];
            for (int i = 0; i < kParts; ++i) parts[i] = load(reinterpret_cast<const Part*>(from) + i);
            memcpy(&item, parts, sizeof parts);
            return item;
        }
        uint32_t bits[4];
        if constexpr (sizeof(T) == 16) {
            asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(bits[0]), "=r"(bits[1]), "=r"(bits[2]), "=r"(bits[3])
                         : "l"(at));
        } else if constexpr (sizeof(T) == 8) {
            asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(bits[0]), "=r"(bits[1]) : "l"(at));
        } else if constexpr (sizeof(T) == 4) {
            asm volatile("ld.global.u32 %0, [%1];" : "=r"(bits[0]) : "l"(at));
        } else if constexpr (sizeof(T) == 2) {
            uint16_t half;
            asm volatile("ld.global.u16 %0, [%1];" : "=h"(half) : "l"(at));
            memcpy(bits, &half, 2);
        } else if constexpr (sizeof(T) == 1) {
            asm volatile("ld.global.u8 %0, [%1];" : "=r"(bits[0]) : "l"(at));
        }
        if constexpr (sizeof(T) <= 16) memcpy(&item, bits, sizeof item);
        return item;
    }

    template <class T>
    __device__ void store(T* to, const T& item) const {
        static_assert(sizeof(T) <= 16, "1, 2, 4, 8 or 16 bytes");
        const size_t at = __cvta_generic_to_global(to);
        uint32_t bits[4] = {};
        memcpy(bits, &item, sizeof item);
        if constexpr (sizeof(T) == 16) {
            asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(bits[0]), "r"(bits[1]), "r"(bits[2]),
                         "r"(bits[3])
                         : "memory");
        } else if constexpr (sizeof(T) == 8) {
            asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(at), "r"(bits[0]), "r"(bits[1]) : "memory");
        } else if constexpr (sizeof(T) == 4) {
            asm volatile("st.global.u32 [%0], %1;" ::"l"(at), "r"(bits[0]) : "memory");
        } else if constexpr (sizeof(T) == 2) {
            asm volatile("st.global.u16 [%0], %1;" ::"l"(at), "h"(uint16_t(bits[0])) : "memory");
        } else {
            static_assert(sizeof(T) == 1);
            asm volatile("st.global.u8 [%0], %1;" ::"l"(at), "r"(bits[0]) : "memory");
        }
    }

    // Makes earlier writes of the warp visible to all its lanes.
    __device__ void largest_of_warp(PerThread<uint32_t>& values) {
        values.own = __reduce_max_sync(0xFFFFFFFF, values.own);
        __syncwarp();
    }

    __device__ float keep(float value) {
        asm volatile("" : "+f"(value));
        return value;
    }

    __device__ uint32_t keep(uint32_t value) {
        asm volatile("" : "+r"(value));
        return value;
    }

    __device__ float square_root(float x) {
        float root;
        asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
        return root;
    }

    // The result is on thread 0. The order of the sum is always the same.
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

    // Every thread makes its writes visible, then one counts the block, as in NVIDIA's sample threadFenceReduction.
    template <class Count>
    __device__ bool last(Count* arrived, int64_t blocks) {
        __shared__ bool is_last;
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            is_last = add(arrived, Count(1)) == Count(blocks - 1);
            if (is_last) add(arrived, Count(-blocks));
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
