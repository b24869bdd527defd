// The module ltp_sparse._C_cuda with launches that run the kernels' thread blocks on the CPU, thread by thread: the
// code of csrc/cuda, and its bindings, without a GPU.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <type_traits>
#include <vector>

#include "bindings_cuda.cpp"
#include "cuda/masked_adamw_block.cuh"
#include "cuda/topk_delta_search.cuh"

using namespace ltp;

namespace {

int64_t traps = 0, launches = 0, launches_to_run = INT64_MAX;

// Of the histogram pass; the former of all passes with a number of thread blocks of their own.
int blocks = 3, bins_at_once = 32768;
int64_t beyond = 0;  // thread blocks that wrote beyond their bins

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

    // Alignment is what the sanitizer looks at.
    template <class T>
    T load(const T* from) const {
        return *from;
    }

    template <class T>
    void store(T* to, const T& item) const {
        *to = item;
    }

    template <class T>
    T keep(T value) const {
        return value;
    }

    // As wrong as a GPU's may be, in either direction.
    float square_root(float x) const {
        return float(std::sqrt(double(x)) * (1 + (bits_of_float(x) % 2 == 0 ? 0x1p-23 : -0x1p-23)));
    }

    void largest_of_warp(PerThread<uint32_t>& values) {
        for (int warp = 0; warp < N; warp += 32) {
            uint32_t result = values[warp];
            for (int lane = 1; lane < 32; ++lane) result = std::max(result, values[warp + lane]);
            for (int lane = 0; lane < 32; ++lane) values[warp + lane] = result;
        }
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

    void scan_lanes(PerThread<int64_t>& values, PerThread<int64_t>& totals) {
        for (int warp = 0; warp < N; warp += 32) {
            int64_t total = 0;
            for (int thread = warp; thread < warp + 32; ++thread) {
                const int64_t own = values[thread];
                values[thread] = total;
                total += own;
            }
            for (int thread = warp; thread < warp + 32; ++thread) totals[thread] = total;
        }
    }

    template <class Count>
    bool last(Count* arrived, int64_t blocks) {
        if (++*arrived != Count(blocks)) return false;
        *arrived = 0;
        return true;
    }

    void from_lane_xor(PerThread<uint32_t>& values, int mask, PerThread<uint32_t>& received) {
        for (int thread = 0; thread < N; ++thread) received[thread] = values[thread ^ mask];
    }

    void count(uint32_t* counter) { ++*counter; }

    int64_t add(int64_t* counter, int64_t value) {
        *counter += value;
        return *counter - value;
    }

    uint32_t add(uint32_t* counter, uint32_t value) {
        *counter += value;
        return *counter - value;
    }

    void trap() { ++traps; }

    void set_bits(int32_t* word, int32_t bits) { *word |= bits; }
    void set_bits(uint32_t* word, uint32_t bits) { *word |= bits; }
};

// No thread block may need the work of an earlier one.
template <class Run>
void backwards(int64_t count, Run run) {
    for (int64_t block = count - 1; block >= 0; --block) run(block);
}

// Shared memory of a thread block, with what nobody has written in it.
struct PoisonedListed : Listed {
    PoisonedListed() { memset(static_cast<void*>(this), 0x77, sizeof(Listed)); }
};

}  // namespace

namespace ltp {

void cuda_delta_histogram(const DevicePairs& pairs, const Histogram& histogram, void*) {
    if (++launches > launches_to_run) return;
    BinRange range = {};
    range.row = histogram.prefixes == nullptr ? 32768 : 65536;
    range.shift = histogram.prefixes == nullptr ? 16 : 0;
    range.count = bins_at_once;
    with_pair_types(pairs, [&](auto initial, auto tuned) {
        for (range.first = 0; range.first < range.row; range.first += range.count) {
            for (int64_t block = blocks - 1; block >= 0; --block) {
                HostThreads<kHistogramThreads> threads;
                const uint32_t poison = 0x77777777;
                std::vector<uint32_t> bins(bins_at_once + 1, poison);
                histogram_block<decltype(initial), decltype(tuned)>(pairs, histogram, range, block, blocks, bins.data(),
                                                                    threads);
                beyond += bins.back() != poison;
            }
        }
    });
}

void cuda_delta_band(const DevicePairs& pairs, const Band& band, const Search& search, int64_t bins, void*) {
    if (++launches > launches_to_run) return;
    with_pair_types(pairs, [&](auto initial, auto tuned) {
        backwards(pairs.n_tiles, [&](int64_t tile) {
            HostThreads<kBandThreads> threads;
            BandScratch scratch;
            memset(&scratch, 0x77, sizeof scratch);
            band_kernel_block<decltype(initial), decltype(tuned)>(pairs, band, search, bins, tile, scratch, threads);
        });
    });
}

void cuda_sample_upper(const DevicePairs& pairs, const Bracket& bracket, void*) {
    if (++launches > launches_to_run) return;
    backwards(blocks, [&](int64_t block) {
        HostThreads<kSampleThreads> threads;
        SampleScratch scratch;
        memset(&scratch, 0x77, sizeof scratch);
        sample_upper_block(pairs, bracket, block, blocks, scratch, threads);
        if (threads.last(bracket.arrived, blocks)) decide_upper(bracket, threads);
    });
}

void cuda_sample_lower(const Bracket& bracket, void*) {
    if (++launches > launches_to_run) return;
    backwards(blocks, [&](int64_t block) {
        HostThreads<kSampleThreads> threads;
        std::vector<uint32_t> bins(size_t(4) << kDigitBits, 0x77777777);
        sample_lower_block(bracket, block, blocks, bins.data(), threads);
        if (threads.last(bracket.arrived + 1, blocks)) decide_lower(bracket, threads);
    });
}

void cuda_candidate_histogram(const Candidates& candidates, const CandidateBins& bands, const Search& search, int round,
                              void*) {
    if (++launches > launches_to_run) return;
    backwards(blocks, [&](int64_t block) {
        HostThreads<kCandidateThreads> threads;
        std::vector<uint32_t> bins(bands.bins, 0x77777777);
        candidate_kernel_block(candidates, bands, search, round, block, blocks, bins.data(), threads);
    });
}

void cuda_take_above(const Candidates& candidates, const Above& marks, const Search& search, const int64_t* above,
                     int rounds, void*) {
    if (++launches > launches_to_run) return;
    backwards(blocks, [&](int64_t block) {
        HostThreads<kCandidateThreads> threads;
        above_kernel_block(candidates, marks, search, above, rounds, block, blocks, threads);
    });
}

const char* cuda_probe() { return nullptr; }

void cuda_take_ties(const Candidates& candidates, const Ties& marks, void*) {
    if (++launches > launches_to_run) return;
    backwards(candidates.n_tiles, [&](int64_t tile) {
        HostThreads<kTieThreads> threads;
        take_ties_block<kTieThreads>(candidates, marks, tile, threads);
    });
}

void cuda_take_last(const DevicePairs& pairs, const Candidates& candidates, const Ties& marks, const Band& band,
                    const Search& search, void*) {
    if (++launches > launches_to_run) return;
    with_pair_types(pairs, [&](auto initial, auto tuned) {
        backwards(pairs.n_tiles, [&](int64_t tile) {
            HostThreads<kBandThreads> threads;
            BandScratch scratch;
            memset(&scratch, 0x77, sizeof scratch);
            take_last_block<decltype(initial), decltype(tuned)>(pairs, candidates, marks, band, search, tile, scratch,
                                                                threads);
        });
    });
}

void cuda_prepare_step(const Step& step, const uint64_t* params, const uint64_t* grads, Prepared* prepared, void*) {
    for (int64_t param = step.n_params - 1; param >= 0; --param) {
        prepared[param] = prepare(step, param, params[param], grads[param]);
    }
}

void cuda_masked_adamw_(const DeviceUpdate& update, void*) {
    with_variant(update, [&](auto variant) {
        using V = decltype(variant);
        // Backwards: no thread block may need the work of an earlier one.
        for (int64_t item = update.n_items - 1; item >= 0; --item) {
            HostThreads<kThreads> threads;
            PoisonedListed listed;
            if (update.state.scales != nullptr) {
                update_coded_block<V>(update, item, listed, threads);
            } else {
                update_block<V>(update, item, listed, threads);
            }
        }
    });
}

void cuda_masked_sum_squares(const DeviceUpdate& update, const Total& total, void*) {
    with_norm_variant(update, [&](auto variant) {
        for (int64_t item = update.n_items - 1; item >= 0; --item) {
            HostThreads<kThreads> threads;
            PoisonedListed listed;
            sum_squares_block<decltype(variant)>(update, total, item, listed, threads);
        }
    });
}

void cuda_masked_pack_(const DeviceUpdate& update, float* out, bool accumulate, void*) {
    with_storage_type(update.grad_dtype, [&](auto grad) {
        with_flag(accumulate, [&](auto accumulated) {
            for (int64_t item = 0; item < update.n_items; ++item) {
                HostThreads<kThreads> threads;
                PoisonedListed listed;
                pack_block<decltype(grad), decltype(accumulated)::value>(update, out, item, listed, threads);
            }
        });
    });
}

}  // namespace ltp

extern "C" {

void set_histogram(int thread_blocks, int bins) {
    blocks = thread_blocks;
    bins_at_once = bins;
}

// How many threads or thread blocks have trapped since the last call.
int64_t take_traps() {
    const int64_t taken = traps;
    traps = 0;
    return taken;
}

// Of the selection's kernels.
int64_t launches_so_far() { return launches; }

// From now on, so many do something.
void run_launches(int64_t count) { launches_to_run = launches + count; }

// How often a code is wrong, and the whole part of its root, with roots that are as far off as a GPU's may be.
void wrong_codes(int64_t* codes, int64_t* roots) {
    *codes = *roots = 0;
    for (int code = 0; code <= 256; ++code) {
        const float border = fourth_power(float(code));
        for (int64_t step = -600; step <= 600; ++step) {
            const int64_t bits = int64_t(bits_of_float(border)) + step * (step % 2 == 0 ? 1 : 97);
            const float x = std::min(float_from_bits(uint32_t(std::max(bits, int64_t(0)))), fourth_power(255.0f));
            for (const double error : {0x1p-23, -0x1p-23}) {
                const auto root = [=](float square) { return float(std::sqrt(double(square)) * (1 + error)); };
                for (int random = -8; random < 8; ++random) {
                    const Magnitude size = {x, chance_of(uint32_t(random) & 0xFFFF)};
                    const float whole = truncf(root(root(x)));
                    *codes += size.forgives() && size.code(whole) != size.code(size.whole_root());
                    *roots += whole != size.whole_root();
                }
            }
        }
    }
}

int64_t blocks_beyond_their_bins() { return beyond; }

}  // extern "C"
