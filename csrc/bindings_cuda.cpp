// The module ltp_sparse._C_cuda: CUDA kernels over device addresses and sizes, on the caller's stream and current
// device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/masked_adamw.h"
#include "cuda/topk_delta.h"

namespace py = pybind11;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

ltp::Dtype dtype_of(int code) {
    if (code < 0 || code > 2) throw std::invalid_argument("dtype codes are 0, 1 and 2, got " + std::to_string(code));
    return ltp::Dtype(code);
}

ltp::CudaTable table_of(uintptr_t addresses, int param_dtype, int grad_dtype, bool packed, uintptr_t tiles,
                        int64_t n_tiles, uintptr_t words, uintptr_t ranks, uintptr_t positions, int parts,
                        const std::vector<int64_t>& room) {
    ltp::CudaTable table = {};
    table.addresses = at<const int64_t>(addresses);
    table.param_dtype = dtype_of(param_dtype);
    table.grad_dtype = dtype_of(grad_dtype);
    table.packed = packed;
    table.tiles = at<const ltp::TileRow>(tiles);
    table.n_tiles = n_tiles;
    table.words = at<const int32_t>(words);
    table.ranks = at<const uint16_t>(ranks);
    table.positions = at<const uint16_t>(positions);
    table.parts = parts;
    if (room.size() != 5) throw std::invalid_argument("room: expected 5 numbers, got " + std::to_string(room.size()));
    table.room = {room[0], room[1], room[2], room[3], room[4]};
    return table;
}

void masked_adamw_(uintptr_t addresses, int param_dtype, int grad_dtype, bool packed, uintptr_t exp_avg,
                   uintptr_t exp_avg_sq, uintptr_t scales, uintptr_t master, uintptr_t tiles, int64_t n_tiles,
                   uintptr_t words, uintptr_t ranks, uintptr_t positions, uintptr_t coefficients, uintptr_t anchor,
                   bool stochastic, int parts, const std::vector<int64_t>& room, uintptr_t stream) {
    ltp::CudaTable table =
        table_of(addresses, param_dtype, grad_dtype, packed, tiles, n_tiles, words, ranks, positions, parts, room);
    table.coefficients = at<const double>(coefficients);
    table.anchor = at<const float>(anchor);
    table.master = at<float>(master);
    ltp::cuda_masked_adamw_(table, {at<void>(exp_avg), at<void>(exp_avg_sq), at<float>(scales)}, stochastic,
                            at<void>(stream));
}

void masked_sum_squares(uintptr_t addresses, int param_dtype, int grad_dtype, bool packed, uintptr_t master,
                        uintptr_t tiles, int64_t n_tiles, uintptr_t words, uintptr_t ranks, uintptr_t positions,
                        uintptr_t coefficients, uintptr_t anchor, uintptr_t out, int parts,
                        const std::vector<int64_t>& room, uintptr_t stream) {
    ltp::CudaTable table =
        table_of(addresses, param_dtype, grad_dtype, packed, tiles, n_tiles, words, ranks, positions, parts, room);
    table.coefficients = at<const double>(coefficients);
    table.anchor = at<const float>(anchor);
    table.master = at<float>(master);
    ltp::cuda_masked_sum_squares(table, at<double>(out), at<void>(stream));
}

void masked_pack_(uintptr_t addresses, int grad_dtype, uintptr_t out, uintptr_t tiles, int64_t n_tiles, uintptr_t words,
                  uintptr_t ranks, uintptr_t positions, bool accumulate, int parts, const std::vector<int64_t>& room,
                  uintptr_t stream) {
    const ltp::CudaTable table =
        table_of(addresses, grad_dtype, grad_dtype, false, tiles, n_tiles, words, ranks, positions, parts, room);
    ltp::cuda_masked_pack_(table, at<float>(out), accumulate, at<void>(stream));
}

ltp::CudaPairs pairs_of(uintptr_t pairs, int64_t n_pairs, int64_t n_tiles, int initial_dtype, int tuned_dtype) {
    if (initial_dtype != -1) dtype_of(initial_dtype);
    dtype_of(tuned_dtype);
    return {at<const ltp::DeltaPair>(pairs), n_pairs, n_tiles, initial_dtype, tuned_dtype};
}

void delta_histogram(uintptr_t pairs, int64_t n_pairs, int64_t n_tiles, int initial_dtype, int tuned_dtype,
                     uintptr_t prefixes, uintptr_t histogram, uintptr_t nonfinite, uintptr_t stream) {
    ltp::cuda_delta_histogram(pairs_of(pairs, n_pairs, n_tiles, initial_dtype, tuned_dtype),
                              {at<const int64_t>(prefixes), at<int64_t>(histogram), at<int64_t>(nonfinite)},
                              at<void>(stream));
}

void delta_band(uintptr_t pairs, int64_t n_pairs, int64_t n_tiles, int initial_dtype, int tuned_dtype, uintptr_t low,
                uintptr_t high, uintptr_t words, uintptr_t above, uintptr_t inside, uintptr_t take, uintptr_t keys,
                uintptr_t positions, int64_t capacity, uintptr_t offsets, uintptr_t cursor, uintptr_t nonfinite,
                uintptr_t stream) {
    ltp::CudaBand band = {};
    band.low = at<const int64_t>(low);
    band.high = at<const int64_t>(high);
    band.words = at<int32_t>(words);
    band.above = at<int64_t>(above);
    band.inside = at<int64_t>(inside);
    band.take = at<const int64_t>(take);
    band.keys = at<int32_t>(keys);
    band.positions = at<uint16_t>(positions);
    band.capacity = capacity;
    band.offsets = at<int64_t>(offsets);
    band.cursor = at<int64_t>(cursor);
    band.nonfinite = at<int64_t>(nonfinite);
    ltp::cuda_delta_band(pairs_of(pairs, n_pairs, n_tiles, initial_dtype, tuned_dtype), band, at<void>(stream));
}

void sample_keys(uintptr_t pairs, int64_t n_pairs, int64_t n_tiles, int initial_dtype, int tuned_dtype,
                 uintptr_t tensors, uintptr_t runs, int64_t count, uintptr_t keys, uintptr_t stream) {
    ltp::cuda_sample_keys(pairs_of(pairs, n_pairs, n_tiles, initial_dtype, tuned_dtype),
                          {at<const int64_t>(tensors), at<const int64_t>(runs), count, at<int32_t>(keys)},
                          at<void>(stream));
}

ltp::CudaCandidates candidates_at(uintptr_t keys, uintptr_t positions, uintptr_t offsets, uintptr_t inside,
                                  uintptr_t groups, int64_t n_tiles, int64_t capacity, int64_t n_groups) {
    return {at<const int32_t>(keys),
            at<const uint16_t>(positions),
            at<const int64_t>(offsets),
            at<const int64_t>(inside),
            at<const int64_t>(groups),
            n_tiles,
            capacity,
            n_groups};
}

void candidate_histogram(uintptr_t keys, uintptr_t positions, uintptr_t offsets, uintptr_t inside, uintptr_t groups,
                         int64_t n_tiles, int64_t capacity, int64_t n_groups, uintptr_t low, uintptr_t high,
                         uintptr_t shift, uintptr_t histogram, int64_t bins, uintptr_t stream) {
    ltp::cuda_candidate_histogram(
        candidates_at(keys, positions, offsets, inside, groups, n_tiles, capacity, n_groups),
        {at<const int64_t>(low), at<const int64_t>(high), at<const int64_t>(shift), at<int64_t>(histogram), bins},
        at<void>(stream));
}

void take_above(uintptr_t keys, uintptr_t positions, uintptr_t offsets, uintptr_t inside, uintptr_t groups,
                int64_t n_tiles, int64_t capacity, int64_t n_groups, uintptr_t cut, uintptr_t words, int64_t n_words,
                uintptr_t tile_words, uintptr_t taken, uintptr_t ties, uintptr_t stream) {
    ltp::CudaMarks marks = {};
    marks.cut = at<const int64_t>(cut);
    marks.words = at<int32_t>(words);
    marks.n_words = n_words;
    marks.tile_words = at<const int64_t>(tile_words);
    marks.taken = at<int64_t>(taken);
    marks.ties = at<int64_t>(ties);
    ltp::cuda_take_above(candidates_at(keys, positions, offsets, inside, groups, n_tiles, capacity, n_groups), marks,
                         at<void>(stream));
}

void take_ties(uintptr_t keys, uintptr_t positions, uintptr_t offsets, uintptr_t inside, uintptr_t groups,
               int64_t n_tiles, int64_t capacity, int64_t n_groups, uintptr_t cut, uintptr_t words, int64_t n_words,
               uintptr_t tile_words, uintptr_t take, uintptr_t stream) {
    ltp::CudaMarks marks = {};
    marks.cut = at<const int64_t>(cut);
    marks.words = at<int32_t>(words);
    marks.n_words = n_words;
    marks.tile_words = at<const int64_t>(tile_words);
    marks.take = at<const int64_t>(take);
    ltp::cuda_take_ties(candidates_at(keys, positions, offsets, inside, groups, n_tiles, capacity, n_groups), marks,
                        at<void>(stream));
}

}  // namespace

PYBIND11_MODULE(_C_cuda, module) {
    using py::arg;
    module.doc() = "CUDA kernels of ltp_sparse. Arguments are device addresses; see csrc/cuda/*.h.";
    module.def("masked_adamw_", masked_adamw_, arg("addresses"), arg("param_dtype"), arg("grad_dtype"), arg("packed"),
               arg("exp_avg"), arg("exp_avg_sq"), arg("scales"), arg("master"), arg("tiles"), arg("n_tiles"),
               arg("words"), arg("ranks"), arg("positions"), arg("coefficients"), arg("anchor"), arg("stochastic"),
               arg("parts"), arg("room"), arg("stream"));
    module.def("masked_sum_squares", masked_sum_squares, arg("addresses"), arg("param_dtype"), arg("grad_dtype"),
               arg("packed"), arg("master"), arg("tiles"), arg("n_tiles"), arg("words"), arg("ranks"), arg("positions"),
               arg("coefficients"), arg("anchor"), arg("out"), arg("parts"), arg("room"), arg("stream"));
    module.def("masked_pack_", masked_pack_, arg("addresses"), arg("grad_dtype"), arg("out"), arg("tiles"),
               arg("n_tiles"), arg("words"), arg("ranks"), arg("positions"), arg("accumulate"), arg("parts"),
               arg("room"), arg("stream"));
    module.def("delta_histogram", delta_histogram, arg("pairs"), arg("n_pairs"), arg("n_tiles"), arg("initial_dtype"),
               arg("tuned_dtype"), arg("prefixes"), arg("histogram"), arg("nonfinite"), arg("stream"));
    module.def("delta_band", delta_band, arg("pairs"), arg("n_pairs"), arg("n_tiles"), arg("initial_dtype"),
               arg("tuned_dtype"), arg("low"), arg("high"), arg("words"), arg("above"), arg("inside"), arg("take"),
               arg("keys"), arg("positions"), arg("capacity"), arg("offsets"), arg("cursor"), arg("nonfinite"),
               arg("stream"));
    module.def("sample_keys", sample_keys, arg("pairs"), arg("n_pairs"), arg("n_tiles"), arg("initial_dtype"),
               arg("tuned_dtype"), arg("tensors"), arg("runs"), arg("count"), arg("keys"), arg("stream"));
    module.def("candidate_histogram", candidate_histogram, arg("keys"), arg("positions"), arg("offsets"), arg("inside"),
               arg("groups"), arg("n_tiles"), arg("capacity"), arg("n_groups"), arg("low"), arg("high"), arg("shift"),
               arg("histogram"), arg("bins"), arg("stream"));
    module.def("take_above", take_above, arg("keys"), arg("positions"), arg("offsets"), arg("inside"), arg("groups"),
               arg("n_tiles"), arg("capacity"), arg("n_groups"), arg("cut"), arg("words"), arg("n_words"),
               arg("tile_words"), arg("taken"), arg("ties"), arg("stream"));
    module.def("take_ties", take_ties, arg("keys"), arg("positions"), arg("offsets"), arg("inside"), arg("groups"),
               arg("n_tiles"), arg("capacity"), arg("n_groups"), arg("cut"), arg("words"), arg("n_words"),
               arg("tile_words"), arg("take"), arg("stream"));
}
