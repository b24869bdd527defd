// The module ltp_sparse._C: CPU kernels over addresses and sizes. Shapes and dtypes are checked in Python, at the door.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/kernels.h"
#include "cpu/masked_adamw.h"
#include "cpu/thread_pool.h"
#include "cpu/topk_delta.h"

namespace py = pybind11;

namespace {

using Addresses = std::vector<uintptr_t>;
using Sizes = std::vector<int64_t>;

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void check_threads(int64_t threads) {
    if (threads < 1) throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
}

ltp::Dtype dtype_of(int code) {
    if (code < 0 || code > 2) throw std::invalid_argument("dtype codes are 0, 1 and 2, got " + std::to_string(code));
    return ltp::Dtype(code);
}

ltp::MaskedAdamW table_of(Addresses params, Addresses grads, Sizes sizes, int param_dtype, int grad_dtype, bool packed,
                          uintptr_t tiles, int64_t n_tiles, uintptr_t words, int64_t n_words, uintptr_t positions,
                          int64_t n_positions, uintptr_t coefficients, uintptr_t anchor, uintptr_t master,
                          int64_t n_slots, int64_t n_blocks = ltp::kNoLimit) {
    const ltp::Dtype param = dtype_of(param_dtype), grad = dtype_of(grad_dtype);
    if (packed ? grads.size() != 1 : !params.empty() && params.size() != grads.size()) {
        throw std::invalid_argument(
            "expected one gradient address (or 0) per parameter, or one in all if packed, got " +
            std::to_string(grads.size()) + " for " + std::to_string(params.size()));
    }
    if (sizes.size() != (packed ? params.size() : grads.size())) {
        throw std::invalid_argument("expected one size per parameter, got " + std::to_string(sizes.size()));
    }
    if (!packed && grad != ltp::Dtype::kFloat32 && grad != param) {
        throw std::invalid_argument("expected gradients of the parameters' dtype or of float32");
    }
    const ltp::TileRoom room = {int64_t(sizes.size()), n_words, n_positions, n_slots, n_blocks};
    return {std::move(params),
            std::move(grads),
            std::move(sizes),
            param,
            grad,
            packed,
            at<const int64_t>(tiles),
            n_tiles,
            at<const int32_t>(words),
            at<const uint16_t>(positions),
            room,
            at<const double>(coefficients),
            at<const float>(anchor),
            at<float>(master)};
}

void masked_adamw_(Addresses params, Addresses grads, Sizes sizes, int param_dtype, int grad_dtype, bool packed,
                   uintptr_t exp_avg, uintptr_t exp_avg_sq, int64_t n_slots, uintptr_t scales, int64_t n_blocks,
                   uintptr_t master, uintptr_t tiles, int64_t n_tiles, uintptr_t words, int64_t n_words,
                   uintptr_t positions, int64_t n_positions, uintptr_t coefficients, uintptr_t anchor, bool stochastic,
                   int64_t threads) {
    check_threads(threads);
    ltp::masked_adamw_(table_of(std::move(params), std::move(grads), std::move(sizes), param_dtype, grad_dtype, packed,
                                tiles, n_tiles, words, n_words, positions, n_positions, coefficients, anchor, master,
                                n_slots, scales == 0 ? ltp::kNoLimit : n_blocks),
                       {exp_avg, exp_avg_sq, at<float>(scales)}, stochastic, threads);
}

void masked_sum_squares(Addresses params, Addresses grads, Sizes sizes, int param_dtype, int grad_dtype, bool packed,
                        uintptr_t master, int64_t n_slots, uintptr_t tiles, int64_t n_tiles, uintptr_t words,
                        int64_t n_words, uintptr_t positions, int64_t n_positions, uintptr_t coefficients,
                        uintptr_t anchor, uintptr_t out, int64_t threads) {
    check_threads(threads);
    const bool by_slot = packed || master != 0 || anchor != 0;
    ltp::masked_sum_squares(table_of(std::move(params), std::move(grads), std::move(sizes), param_dtype, grad_dtype,
                                     packed, tiles, n_tiles, words, n_words, positions, n_positions, coefficients,
                                     anchor, master, by_slot ? n_slots : ltp::kNoLimit),
                            at<double>(out), threads);
}

void masked_pack_(Addresses grads, Sizes sizes, int grad_dtype, uintptr_t out, int64_t n_slots, uintptr_t tiles,
                  int64_t n_tiles, uintptr_t words, int64_t n_words, uintptr_t positions, int64_t n_positions,
                  bool accumulate, int64_t threads) {
    check_threads(threads);
    ltp::masked_pack_(table_of({}, std::move(grads), std::move(sizes), grad_dtype, grad_dtype, false, tiles, n_tiles,
                               words, n_words, positions, n_positions, 0, 0, 0, n_slots),
                      at<float>(out), accumulate, threads);
}

bool delta_histogram(Addresses initial, Addresses tuned, std::vector<int> initial_dtypes, std::vector<int> tuned_dtypes,
                     std::vector<int64_t> sizes, std::vector<int64_t> groups, std::vector<int64_t> prefixes,
                     uintptr_t histogram, int64_t n_groups, int64_t threads) {
    check_threads(threads);
    return ltp::delta_histogram({std::move(initial), std::move(tuned), std::move(initial_dtypes),
                                 std::move(tuned_dtypes), std::move(sizes), std::move(groups)},
                                prefixes, at<int64_t>(histogram), n_groups, threads);
}

void sample_keys(Addresses initial, Addresses tuned, std::vector<int> initial_dtypes, std::vector<int> tuned_dtypes,
                 std::vector<int64_t> sizes, uintptr_t tensors, uintptr_t runs, int64_t count, uintptr_t keys,
                 int64_t threads) {
    check_threads(threads);
    std::vector<int64_t> groups(sizes.size());
    ltp::sample_keys({std::move(initial), std::move(tuned), std::move(initial_dtypes), std::move(tuned_dtypes),
                      std::move(sizes), std::move(groups)},
                     at<const int64_t>(tensors), at<const int64_t>(runs), count, at<int32_t>(keys), threads);
}

bool delta_band(Addresses initial, Addresses tuned, std::vector<int> initial_dtypes, std::vector<int> tuned_dtypes,
                std::vector<int64_t> sizes, std::vector<int64_t> groups, std::vector<int64_t> low,
                std::vector<int64_t> high, uintptr_t words, std::vector<int64_t> word_offsets, uintptr_t above,
                uintptr_t inside, uintptr_t take, uintptr_t keys, uintptr_t positions, int64_t capacity,
                uintptr_t offsets, uintptr_t cursor, int64_t threads) {
    check_threads(threads);
    return ltp::delta_band({std::move(initial), std::move(tuned), std::move(initial_dtypes), std::move(tuned_dtypes),
                            std::move(sizes), std::move(groups)},
                           {std::move(low), std::move(high), at<int32_t>(words), std::move(word_offsets),
                            at<int64_t>(above), at<int64_t>(inside), at<const int64_t>(take), at<int32_t>(keys),
                            at<uint16_t>(positions), capacity, at<int64_t>(offsets), at<int64_t>(cursor)},
                           threads);
}

ltp::Candidates candidates_at(uintptr_t keys, uintptr_t positions, int64_t capacity, uintptr_t offsets,
                              uintptr_t inside, uintptr_t groups, int64_t tiles) {
    return {at<const int32_t>(keys),   at<const uint16_t>(positions), capacity, at<const int64_t>(offsets),
            at<const int64_t>(inside), at<const int64_t>(groups),     tiles};
}

void candidate_histogram(uintptr_t keys, uintptr_t positions, int64_t capacity, uintptr_t offsets, uintptr_t inside,
                         uintptr_t groups, int64_t tiles, std::vector<int64_t> low, std::vector<int64_t> high,
                         std::vector<int64_t> shift, uintptr_t histogram, int64_t bins, int64_t threads) {
    check_threads(threads);
    ltp::candidate_histogram(candidates_at(keys, positions, capacity, offsets, inside, groups, tiles),
                             {std::move(low), std::move(high), std::move(shift), bins}, at<int64_t>(histogram),
                             threads);
}

void take_above(uintptr_t keys, uintptr_t positions, int64_t capacity, uintptr_t offsets, uintptr_t inside,
                uintptr_t groups, int64_t tiles, std::vector<int64_t> cut, uintptr_t words, int64_t n_words,
                uintptr_t tile_words, uintptr_t taken, uintptr_t ties, int64_t threads) {
    check_threads(threads);
    ltp::take_above(candidates_at(keys, positions, capacity, offsets, inside, groups, tiles), cut,
                    {at<int32_t>(words), n_words, at<const int64_t>(tile_words)}, at<int64_t>(taken), at<int64_t>(ties),
                    threads);
}

void take_ties(uintptr_t keys, uintptr_t positions, int64_t capacity, uintptr_t offsets, uintptr_t inside,
               uintptr_t groups, int64_t tiles, std::vector<int64_t> cut, uintptr_t words, int64_t n_words,
               uintptr_t tile_words, uintptr_t take, int64_t threads) {
    check_threads(threads);
    ltp::take_ties(candidates_at(keys, positions, capacity, offsets, inside, groups, tiles), cut,
                   {at<int32_t>(words), n_words, at<const int64_t>(tile_words)}, at<const int64_t>(take), threads);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    using py::arg;
    const auto release = py::call_guard<py::gil_scoped_release>();
    module.doc() = "CPU kernels of ltp_sparse. Arguments are addresses of contiguous memory; see csrc/cpu/*.h.";
    module.def("masked_adamw_", masked_adamw_, arg("params"), arg("grads"), arg("sizes"), arg("param_dtype"),
               arg("grad_dtype"), arg("packed"), arg("exp_avg"), arg("exp_avg_sq"), arg("n_slots"), arg("scales"),
               arg("n_blocks"), arg("master"), arg("tiles"), arg("n_tiles"), arg("words"), arg("n_words"),
               arg("positions"), arg("n_positions"), arg("coefficients"), arg("anchor"), arg("stochastic"),
               arg("threads"), release);
    module.def("masked_sum_squares", masked_sum_squares, arg("params"), arg("grads"), arg("sizes"), arg("param_dtype"),
               arg("grad_dtype"), arg("packed"), arg("master"), arg("n_slots"), arg("tiles"), arg("n_tiles"),
               arg("words"), arg("n_words"), arg("positions"), arg("n_positions"), arg("coefficients"), arg("anchor"),
               arg("out"), arg("threads"), release);
    module.def("masked_pack_", masked_pack_, arg("grads"), arg("sizes"), arg("grad_dtype"), arg("out"), arg("n_slots"),
               arg("tiles"), arg("n_tiles"), arg("words"), arg("n_words"), arg("positions"), arg("n_positions"),
               arg("accumulate"), arg("threads"), release);
    module.def("delta_histogram", delta_histogram, arg("initial"), arg("tuned"), arg("initial_dtypes"),
               arg("tuned_dtypes"), arg("sizes"), arg("groups"), arg("prefixes"), arg("histogram"), arg("n_groups"),
               arg("threads"), release);
    module.def("sample_keys", sample_keys, arg("initial"), arg("tuned"), arg("initial_dtypes"), arg("tuned_dtypes"),
               arg("sizes"), arg("tensors"), arg("runs"), arg("count"), arg("keys"), arg("threads"), release);
    module.def("delta_band", delta_band, arg("initial"), arg("tuned"), arg("initial_dtypes"), arg("tuned_dtypes"),
               arg("sizes"), arg("groups"), arg("low"), arg("high"), arg("words"), arg("word_offsets"), arg("above"),
               arg("inside"), arg("take"), arg("keys"), arg("positions"), arg("capacity"), arg("offsets"),
               arg("cursor"), arg("threads"), release);
    module.def("candidate_histogram", candidate_histogram, arg("keys"), arg("positions"), arg("capacity"),
               arg("offsets"), arg("inside"), arg("groups"), arg("tiles"), arg("low"), arg("high"), arg("shift"),
               arg("histogram"), arg("bins"), arg("threads"), release);
    module.def("take_above", take_above, arg("keys"), arg("positions"), arg("capacity"), arg("offsets"), arg("inside"),
               arg("groups"), arg("tiles"), arg("cut"), arg("words"), arg("n_words"), arg("tile_words"), arg("taken"),
               arg("ties"), arg("threads"), release);
    module.def("take_ties", take_ties, arg("keys"), arg("positions"), arg("capacity"), arg("offsets"), arg("inside"),
               arg("groups"), arg("tiles"), arg("cut"), arg("words"), arg("n_words"), arg("tile_words"), arg("take"),
               arg("threads"), release);
    module.def(
        "use_openmp", ltp::use_openmp, arg("gomp_parallel"),
        "Runs kernels on the threads of the OpenMP runtime whose GOMP_parallel is at this address; 0: on own threads.");
    module.def("isa", [] { return ltp::kernels().name; }, "The instruction set in use: avx512, avx2 or generic.");
    module.def("set_isa", ltp::use_isa, arg("name"), "Switches the instruction set; ValueError if not supported.");
}
