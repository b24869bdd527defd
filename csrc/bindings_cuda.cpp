// The module ltp_sparse._C_cuda: CUDA kernels over the records of ltp_sparse/backends/arguments.py, on the caller's
// stream and current device.
#include "cuda/masked_adamw.h"
#include "cuda/probe.h"
#include "cuda/sampled_selection.h"
#include "cuda/topk_delta.h"
#include "record.h"

namespace py = pybind11;
using ltp::Record;

namespace {

template <class T>
T* at(py::handle tensor) {
    return reinterpret_cast<T*>(tensor.attr("data_ptr")().cast<uintptr_t>());
}

void* stream_at(uintptr_t address) { return reinterpret_cast<void*>(address); }

// addresses: the table of what the kernels read
ltp::DeviceUpdate launched(ltp::DeviceUpdate update, py::handle addresses, int parts) {
    update.addresses = at<const int64_t>(addresses);
    update.parts = parts;
    return update;
}

void masked_adamw_(py::handle record, py::handle addresses, int parts, uintptr_t stream) {
    ltp::DeviceUpdate update = {};
    ltp::read_update(Record(record), py::len(record.attr("params")), update);
    ltp::cuda_masked_adamw_(launched(update, addresses, parts), stream_at(stream));
}

void masked_sum_squares(py::handle record, py::handle addresses, py::handle out, int parts, uintptr_t stream) {
    ltp::DeviceUpdate update = {};
    ltp::read_norm(Record(record), py::len(record.attr("params")), update);
    ltp::cuda_masked_sum_squares(launched(update, addresses, parts), at<double>(out), stream_at(stream));
}

void masked_pack_(py::handle pack, py::handle addresses, int parts, uintptr_t stream) {
    const Record record(pack);
    ltp::DeviceUpdate update = {};
    ltp::read_tiles(record, py::len(pack.attr("grads")), update);
    float* const out = ltp::read_slots<float>(record, "out", update.room);
    ltp::cuda_masked_pack_(launched(update, addresses, parts), out, record.flag("accumulate"), stream_at(stream));
}

ltp::PairTable table_of(py::handle table, int64_t n_pairs, int64_t n_tiles) {
    return {n_pairs, n_tiles, at<const int64_t>(table)};
}

void delta_histogram(py::handle record, py::handle table, int64_t n_pairs, int64_t n_tiles, const ltp::Kinds& kinds,
                     uintptr_t stream) {
    const ltp::Histogram histogram = ltp::Histogram(Record(record));
    for (const auto& kind : kinds) {
        ltp::cuda_delta_histogram(table_of(table, n_pairs, n_tiles).of(kind), histogram, stream_at(stream));
    }
}

void delta_band(py::handle record, py::handle table, int64_t n_pairs, int64_t n_tiles, const ltp::Kinds& kinds,
                uintptr_t stream) {
    const ltp::Band band = ltp::Band(Record(record));
    for (const auto& kind : kinds) {
        ltp::cuda_delta_band(table_of(table, n_pairs, n_tiles).of(kind), band, {}, 0, stream_at(stream));
    }
}

void select_sampled(py::handle record, py::handle table, int64_t n_pairs, int64_t n_tiles, const ltp::Kinds& kinds,
                    int digit_bits, py::handle zeros, uintptr_t stream) {
    const ltp::PairTable pairs = table_of(table, n_pairs, n_tiles);
    ltp::SampledSelection(Record(record), pairs, kinds, digit_bits, at<char>(zeros)).launch(stream_at(stream));
}

void candidate_histogram(py::handle candidates, uintptr_t stream) {
    const Record record(candidates);
    ltp::cuda_candidate_histogram(ltp::Candidates(record, "low"), ltp::CandidateBins(record), {}, 0, stream_at(stream));
}

void take_above(py::handle candidates, uintptr_t stream) {
    const Record record(candidates);
    ltp::cuda_take_above(ltp::Candidates(record, "cut"), ltp::Above(record), {}, nullptr, 0, stream_at(stream));
}

void take_ties(py::handle candidates, uintptr_t stream) {
    const Record record(candidates);
    ltp::cuda_take_ties(ltp::Candidates(record, "cut"), ltp::Ties(record), stream_at(stream));
}

}  // namespace

PYBIND11_MODULE(_C_cuda, module) {
    module.doc() = "CUDA kernels of ltp_sparse. Each takes its record of ltp_sparse/backends/arguments.py.";
    module.def("probe", ltp::cuda_probe);
    module.def("masked_adamw_", masked_adamw_);
    module.def("masked_sum_squares", masked_sum_squares);
    module.def("masked_pack_", masked_pack_);
    module.def("delta_histogram", delta_histogram);
    module.def("delta_band", delta_band);
    module.def("candidate_histogram", candidate_histogram);
    module.def("take_above", take_above);
    module.def("take_ties", take_ties);
    module.def("select_sampled", select_sampled);
    module.def("sampled_bytes", ltp::SampledSelection::scratch_bytes);
}
