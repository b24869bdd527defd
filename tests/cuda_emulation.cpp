// Runs the CUDA kernels' thread blocks on the CPU, thread by thread: the code of csrc/cuda without a GPU.
#include <cmath>
#include <cstddef>
#include <type_traits>

#include "cuda/masked_adamw_block.cuh"

using namespace ltp;

namespace {

class HostThreads {
  public:
    template <class T>
    struct PerThread {
        T own[kThreads];
        T& operator[](int thread) { return own[thread]; }
    };

    template <class F>
    void each(F f) {
        for (int thread = 0; thread < kThreads; ++thread) f(thread);
    }

    void sync() {}

    int largest(PerThread<int>& values) {
        int result = values[0];
        for (int thread = 1; thread < kThreads; ++thread) result = values[thread] > result ? values[thread] : result;
        return result;
    }

    // In the order of the warps' shuffles.
    double sum(PerThread<double>& values) {
        double result = 0.0;
        for (int warp = 0; warp < kThreads; warp += 32) {
            for (int offset = 16; offset > 0; offset /= 2) {
                for (int lane = 0; lane < offset; ++lane) values[warp + lane] += values[warp + lane + offset];
            }
            result = warp == 0 ? values[0] : result + values[warp];
        }
        return result;
    }
};

template <class Body>
void with_types(const CudaTable& table, Body body) {
    const auto with_param = [&](auto param) {
        if (table.packed) return body(param, 0.0f, std::true_type());
        if (table.grad_dtype == Dtype::kFloat32) return body(param, 0.0f, std::false_type());
        return body(param, param, std::false_type());
    };
    if (table.param_dtype == Dtype::kFloat32) return with_param(0.0f);
    if (table.param_dtype == Dtype::kBFloat16) return with_param(BFloat16());
    return with_param(Float16());
}

}  // namespace

extern "C" {

void emulated_masked_adamw_(const CudaTable* table, void* exp_avg, void* exp_avg_sq, void* scales, int stochastic) {
    const CudaMoments moments = {exp_avg, exp_avg_sq, static_cast<BFloat16*>(scales)};
    with_types(*table, [&](auto param, auto grad, auto packed) {
        // Backwards: no thread block may need the work of an earlier one.
        for (int64_t block = table->n_tiles * table->parts - 1; block >= 0; --block) {
            HostThreads threads;
            uint16_t listed[kSubTile];
            if (scales != nullptr) {
                update_coded_block<decltype(param), decltype(grad), decltype(packed)::value>(
                    *table, moments, stochastic != 0, block, threads);
            } else {
                update_block<decltype(param), decltype(grad), decltype(packed)::value>(*table, moments, stochastic != 0,
                                                                                       block, listed, threads);
            }
        }
    });
}

void emulated_masked_sum_squares(const CudaTable* table, double* out) {
    with_types(*table, [&](auto param, auto grad, auto packed) {
        for (int64_t block = 0; block < table->n_tiles * table->parts; ++block) {
            HostThreads threads;
            uint16_t listed[kSubTile];
            out[block] = sum_squares_block<decltype(param), decltype(grad), decltype(packed)::value>(*table, block,
                                                                                                     listed, threads);
        }
    });
}

void emulated_masked_pack_(const CudaTable* table, float* out, int accumulate) {
    for (int64_t block = 0; block < table->n_tiles * table->parts; ++block) {
        HostThreads threads;
        uint16_t listed[kSubTile];
        if (table->grad_dtype == Dtype::kFloat32)
            pack_block<float>(*table, out, accumulate != 0, block, listed, threads);
        if (table->grad_dtype == Dtype::kBFloat16)
            pack_block<BFloat16>(*table, out, accumulate != 0, block, listed, threads);
        if (table->grad_dtype == Dtype::kFloat16)
            pack_block<Float16>(*table, out, accumulate != 0, block, listed, threads);
    }
}

void store_table(CudaTable* to, const int64_t* addresses, int param_dtype, int grad_dtype, int packed,
                 const int64_t* tiles, int64_t n_tiles, const int32_t* words, const uint16_t* ranks,
                 const uint16_t* positions, const double* coefficients, const float* anchor, float* master, int parts) {
    *to = {addresses,
           Dtype(param_dtype),
           Dtype(grad_dtype),
           packed != 0,
           reinterpret_cast<const TileRow*>(tiles),
           n_tiles,
           words,
           ranks,
           positions,
           coefficients,
           anchor,
           master,
           parts};
}

size_t table_size() { return sizeof(CudaTable); }

}  // extern "C"
