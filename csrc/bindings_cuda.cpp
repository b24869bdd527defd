// The module ltp_sparse._C_cuda: CUDA kernels over the records of ltp_sparse/backends/arguments.py, on the caller's
// stream and current device.
#include "cuda/masked_adamw.h"
#include "cuda/probe.h"
#include "cuda/sampled_selection.h"
#include "cuda/topk_delta.h"
#include "record.h"

namespace py = pybind11;
using ltp::address_of;
using ltp::Record;

namespace {

void* stream_at(uintptr_t address) { return reinterpret_cast<void*>(address); }

// Writes `prepared` for these addresses. If packed, all gradients have the first address.
void prepare(const ltp::Step& step, std::vector<uintptr_t> params, std::vector<uintptr_t> grads, bool packed,
             ltp::Prepared* prepared, uintptr_t stream) {
    if (packed) grads.assign(params.size(), grads.at(0));
    params.resize(size_t(step.n_params));  // addresses of 0 are not read
    if (grads.size() != params.size()) throw std::invalid_argument("expected a gradient, or 0, for each parameter");
    ltp::cuda_prepare_step(step, params.data(), grads.data(), prepared, stream_at(stream));
}

void prepare_step(py::handle record, uintptr_t stream) {
    const Record own(record);
    ltp::Step step = {};
    ltp::read_step(own, step);
    prepare(step, own.addresses("params"), own.addresses("grads"), own.flag("packed"),
            own.at<ltp::Prepared>("prepared"), stream);
}

// `prepared` from coefficients that are computed already.
void prepare_norm(py::handle record, uintptr_t stream) {
    const Record norm(record);
    ltp::Step step = {};
    step.n_params = int64_t(py::len(record.attr("params")));
    step.coefficients = norm.at<double>("coefficients");
    prepare(step, norm.addresses("params"), norm.addresses("grads"), norm.flag("packed"),
            norm.at<ltp::Prepared>("prepared"), stream);
}

// `prepared` with only the addresses of gradients.
void prepare_pack(py::handle record, py::handle prepared, uintptr_t stream) {
    const std::vector<uintptr_t> grads = Record(record).addresses("grads");
    ltp::Step step = {};
    step.n_params = int64_t(grads.size());
    prepare(step, {}, grads, false, address_of<ltp::Prepared>(prepared), stream);
}

void read_items(py::handle items, ltp::DeviceUpdate& to) {
    to.items = address_of<const ltp::WorkItem>(items);
    to.n_items = int64_t(py::len(items));
}

// read: read_norm or read_update
ltp::DeviceUpdate device_update(py::handle record, py::handle items,
                                void (*read)(const Record&, int64_t, ltp::Update&)) {
    const Record own(record);
    ltp::DeviceUpdate update = {};
    read(own, int64_t(py::len(record.attr("params"))), update);
    update.prepared = own.at<const ltp::Prepared>("prepared");
    read_items(items, update);
    return update;
}

void masked_adamw_(py::handle update, py::handle items, uintptr_t stream) {
    ltp::cuda_masked_adamw_(device_update(update, items, ltp::read_update<Record>), stream_at(stream));
}

void masked_sum_squares(py::handle norm, py::handle items, py::handle out, uintptr_t stream) {
    ltp::Total total = {};
    total.sums = address_of<double>(out);
    ltp::cuda_masked_sum_squares(device_update(norm, items, ltp::read_norm<Record>), total, stream_at(stream));
}

void gradient_norm(py::handle norm, py::handle items, py::handle total, uintptr_t stream) {
    const ltp::DeviceUpdate update = device_update(norm, items, ltp::read_norm<Record>);
    ltp::cuda_masked_sum_squares(update, ltp::read_total(Record(total)), stream_at(stream));
}

// prepared: None for one gradient, whose address is passed by value.
void masked_pack_(py::handle pack, py::handle prepared, py::handle items, uintptr_t stream) {
    const Record record(pack);
    ltp::DeviceUpdate update = {};
    ltp::read_tiles(record, py::len(pack.attr("grads")), update);
    float* const out = ltp::read_slots<float>(record, "out", update.room);
    read_items(items, update);
    if (prepared.is_none()) {
        update.grad = record.addresses("grads").at(0);
    } else {
        update.prepared = address_of<const ltp::Prepared>(prepared);
    }
    ltp::cuda_masked_pack_(update, out, record.flag("accumulate"), stream_at(stream));
}

ltp::PairTable table_of(py::handle table, int64_t n_pairs, int64_t n_tiles) {
    return {n_pairs, n_tiles, address_of<const int64_t>(table)};
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
    ltp::SampledSelection(Record(record), pairs, kinds, digit_bits, address_of<char>(zeros)).launch(stream_at(stream));
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
    module.def("prepare_step", prepare_step);
    module.def("prepare_norm", prepare_norm);
    module.def("prepare_pack", prepare_pack);
    module.def("masked_adamw_", masked_adamw_);
    module.def("masked_sum_squares", masked_sum_squares);
    module.def("gradient_norm", gradient_norm);
    module.def("masked_pack_", masked_pack_);
    module.def("delta_histogram", delta_histogram);
    module.def("delta_band", delta_band);
    module.def("candidate_histogram", candidate_histogram);
    module.def("take_above", take_above);
    module.def("take_ties", take_ties);
    module.def("select_sampled", select_sampled);
    module.def("sampled_bytes", ltp::SampledSelection::scratch_bytes);
}
