// Runs the CUDA kernels' thread blocks on the CPU, thread by thread: the code of csrc/cuda without a GPU.
#include <cmath>
#include <cstddef>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cuda/masked_adamw_block.cuh"
#include "cuda/topk_delta_block.cuh"

using namespace ltp;

namespace {

int64_t traps = 0;

template <int N>
class HostThreads {
  public:
    template <class T>
    struct PerThread {
        T own[N];
        T& operator[](int thread) { return own[thread]; }
    };

    template <class F>
    void each(F f) {
        for (int thread = 0; thread < N; ++thread) f(thread);
    }

    void sync() {}

    int largest(PerThread<int>& values) {
        int result = values[0];
        for (int thread = 1; thread < N; ++thread) result = values[thread] > result ? values[thread] : result;
        return result;
    }

    // In the order of the warps' shuffles.
    double sum(PerThread<double>& values) {
        double result = 0.0;
        for (int warp = 0; warp < N; warp += 32) {
            for (int offset = 16; offset > 0; offset /= 2) {
                for (int lane = 0; lane < offset; ++lane) values[warp + lane] += values[warp + lane + offset];
            }
            result = warp == 0 ? values[0] : result + values[warp];
        }
        return result;
    }

    int scan(PerThread<int>& values) {
        int total = 0;
        for (int thread = 0; thread < N; ++thread) {
            const int own = values[thread];
            values[thread] = total;
            total += own;
        }
        return total;
    }

    void from_lane_xor(PerThread<uint32_t>& values, int mask, PerThread<uint32_t>& received) {
        for (int thread = 0; thread < N; ++thread) received[thread] = values[thread ^ mask];
    }

    void count(uint32_t* counter) { ++*counter; }

    int64_t add(int64_t* counter, int64_t value) {
        *counter += value;
        return *counter - value;
    }

    void trap() { ++traps; }

    void set_bits(int32_t* word, int32_t bits) { *word |= bits; }
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

template <class Body>
void with_types(const CudaPairs& pairs, Body body) {
    const auto with_tuned = [&](auto tuned) {
        if (pairs.initial_dtype == -1) return body(Zeros(), tuned);
        if (pairs.initial_dtype == int(Dtype::kFloat32)) return body(0.0f, tuned);
        if (pairs.initial_dtype == int(Dtype::kBFloat16)) return body(BFloat16(), tuned);
        return body(Float16(), tuned);
    };
    if (pairs.tuned_dtype == int(Dtype::kFloat32)) return with_tuned(0.0f);
    if (pairs.tuned_dtype == int(Dtype::kBFloat16)) return with_tuned(BFloat16());
    return with_tuned(Float16());
}

}  // namespace

extern "C" {

// Returns how many thread blocks wrote beyond their bins.
int emulated_delta_histogram(const CudaPairs* pairs, const CudaHistogram* histogram, int blocks, int bins_at_once) {
    BinRange range = {};
    range.row = histogram->prefixes == nullptr ? 32768 : 65536;
    range.shift = histogram->prefixes == nullptr ? 16 : 0;
    range.count = bins_at_once;
    int beyond = 0;
    with_types(*pairs, [&](auto initial, auto tuned) {
        for (range.first = 0; range.first < range.row; range.first += range.count) {
            for (int64_t block = blocks - 1; block >= 0; --block) {
                HostThreads<kHistogramThreads> threads;
                const uint32_t poison = 0x77777777;
                std::vector<uint32_t> bins(bins_at_once + 1, poison);
                histogram_block<decltype(initial), decltype(tuned)>(*pairs, *histogram, range, block, blocks,
                                                                    bins.data(), threads);
                beyond += bins.back() != poison;
            }
        }
    });
    return beyond;
}

void emulated_delta_band(const CudaPairs* pairs, const CudaBand* band) {
    with_types(*pairs, [&](auto initial, auto tuned) {
        for (int64_t tile = pairs->n_tiles - 1; tile >= 0; --tile) {
            HostThreads<kBandThreads> threads;
            BandScratch scratch;
            memset(&scratch, 0x77, sizeof scratch);
            band_block<decltype(initial), decltype(tuned)>(*pairs, *band, tile, scratch, threads);
        }
    });
}

void emulated_sample_keys(const CudaPairs* pairs, const CudaSample* sample) {
    with_types(*pairs, [&](auto initial, auto tuned) {
        for (int64_t block = (sample->count - 1) / kRunsPerBlock; block >= 0; --block) {
            HostThreads<kSampleThreads> threads;
            sample_block<decltype(initial), decltype(tuned)>(*pairs, *sample, block, threads);
        }
    });
}

void emulated_candidate_histogram(const CudaCandidates* candidates, const CudaCandidateBins* bands) {
    for (int64_t tile = candidates->n_tiles - 1; tile >= 0; --tile) {
        HostThreads<kCandidateThreads> threads;
        candidate_histogram_block(*candidates, *bands, tile, threads);
    }
}

void emulated_take_above(const CudaCandidates* candidates, const CudaMarks* marks) {
    for (int64_t tile = candidates->n_tiles - 1; tile >= 0; --tile) {
        HostThreads<kCandidateThreads> threads;
        take_above_block(*candidates, *marks, tile, threads);
    }
}

void emulated_take_ties(const CudaCandidates* candidates, const CudaMarks* marks) {
    for (int64_t tile = candidates->n_tiles - 1; tile >= 0; --tile) {
        HostThreads<kCandidateThreads> threads;
        take_ties_block(*candidates, *marks, tile, threads);
    }
}

void emulated_masked_adamw_(const CudaTable* table, void* exp_avg, void* exp_avg_sq, void* scales, int stochastic) {
    const CudaMoments moments = {exp_avg, exp_avg_sq, static_cast<float*>(scales)};
    with_types(*table, [&](auto param, auto grad, auto packed) {
        // Backwards: no thread block may need the work of an earlier one.
        for (int64_t block = table->n_tiles * table->parts - 1; block >= 0; --block) {
            HostThreads<kThreads> threads;
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
            HostThreads<kThreads> threads;
            uint16_t listed[kSubTile];
            out[block] = sum_squares_block<decltype(param), decltype(grad), decltype(packed)::value>(*table, block,
                                                                                                     listed, threads);
        }
    });
}

void emulated_masked_pack_(const CudaTable* table, float* out, int accumulate) {
    for (int64_t block = 0; block < table->n_tiles * table->parts; ++block) {
        HostThreads<kThreads> threads;
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
                 const uint16_t* positions, const double* coefficients, const float* anchor, float* master, int parts,
                 const TileRoom* room) {
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
           parts,
           *room};
}

// How many threads or thread blocks have trapped since the last call.
int64_t take_traps() {
    const int64_t taken = traps;
    traps = 0;
    return taken;
}

size_t table_size() { return sizeof(CudaTable); }

}  // extern "C"
