// The module ltp_sparse._C: CPU kernels over the records of ltp_sparse/backends/arguments.py.
#include "cpu/kernels.h"
#include "cpu/list_positions.h"
#include "cpu/masked_adamw.h"
#include "cpu/thread_pool.h"
#include "cpu/topk_delta.h"
#include "layouts.h"
#include "record.h"

namespace py = pybind11;
using ltp::Record;

namespace {

// Runs without the interpreter's lock: everything from Python objects has been read before.
template <class Run>
void run(int64_t threads, Run run_on) {
    if (threads < 1) throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
    const py::gil_scoped_release release;
    run_on(threads);
}

ltp::HostPairs pairs_of(const Record& record) {
    return {record.addresses("initial"),
            record.addresses("tuned"),
            record.dtypes("initial"),
            record.dtypes("tuned"),
            record.sizes("tuned"),
            record.optional_numbers("groups"),
            record.optional_numbers("word_offsets")};
}

void masked_adamw_(py::handle update, int64_t threads) {
    const ltp::HostUpdate arguments = ltp::host_update(Record(update), ltp::read_update<Record>);
    run(threads, [&](int64_t n) { ltp::masked_adamw_(arguments, n); });
}

void prepare_step(py::handle record) {
    ltp::Step step = {};
    ltp::read_step(Record(record), step);
    for (int64_t param = 0; param < step.n_params; ++param) ltp::prepare(step, param, 0, 0);
}

void gradient_norm(py::handle norm, py::handle total, int64_t threads) {
    const ltp::HostUpdate arguments = ltp::host_update(Record(norm), ltp::read_norm<Record>);
    const ltp::Total into = ltp::read_total(Record(total));
    run(threads, [&](int64_t n) { ltp::gradient_norm(arguments, into, n); });
}

void masked_sum_squares(py::handle norm, py::handle out, int64_t threads) {
    const ltp::HostUpdate arguments = ltp::host_update(Record(norm), ltp::read_norm<Record>);
    double* const sums = ltp::address_of<double>(out);
    run(threads, [&](int64_t n) { ltp::masked_sum_squares(arguments, sums, n); });
}

void masked_pack_(py::handle pack, int64_t threads) {
    const Record record(pack);
    ltp::HostUpdate arguments = ltp::host_tensors(record, "grads", ltp::read_tiles<Record>);
    float* const out = ltp::read_slots<float>(record, "out", arguments.room);
    const bool accumulate = record.flag("accumulate");
    run(threads, [&](int64_t n) { ltp::masked_pack_(arguments, out, accumulate, n); });
}

template <ltp::Copy HOW>
void masked_copy(py::handle entries, int64_t threads) {
    const Record record(entries);
    ltp::HostUpdate arguments = ltp::host_tensors(record, "tensors", ltp::read_index<Record>);
    void* const slots = ltp::read_slots<void>(record, "slots", arguments.room);
    const int64_t item_bytes = record.item_bytes("slots");
    run(threads, [&](int64_t n) { ltp::masked_copy(arguments, slots, item_bytes, HOW, n); });
}

// A pass over pairs of tensors.
template <class Arguments>
auto over_pairs(void (*pass)(const ltp::HostPairs&, const Arguments&, int64_t)) {
    return [=](py::handle tensors, int64_t threads) {
        const Record record(tensors);
        const ltp::HostPairs pairs = pairs_of(record);
        const Arguments arguments(record);
        run(threads, [&](int64_t n) { pass(pairs, arguments, n); });
    };
}

// A pass over the stored candidates. per_group: a field with an item for each group.
template <class Arguments>
auto over_candidates(void (*pass)(const ltp::Candidates&, const Arguments&, int64_t), const char* per_group) {
    return [=](py::handle candidates, int64_t threads) {
        const Record record(candidates);
        const ltp::Candidates stored(record, per_group);
        const Arguments arguments(record);
        run(threads, [&](int64_t n) { pass(stored, arguments, n); });
    };
}

void list_positions(py::handle words, py::handle positions) {
    const auto entries = [](py::handle tensor) { return tensor.attr("numel")().cast<int64_t>(); };
    const auto* const from = ltp::address_of<const uint32_t>(words);
    auto* const to = ltp::address_of<uint16_t>(positions);
    const int64_t n_words = entries(words), k = entries(positions);
    const py::gil_scoped_release release;
    ltp::list_positions(from, n_words, to, k);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    using py::arg;
    module.doc() = "CPU kernels of ltp_sparse. Each takes its record of ltp_sparse/backends/arguments.py.";
    module.def("masked_adamw_", masked_adamw_, arg("update"), arg("threads"));
    module.def("describe", ltp::describe, arg("tensors"), arg("lowest"),
               "(layouts, addresses) of a list of tensors or None; None if one needs a closer look.");
    module.def("prepare_step", prepare_step, arg("step"));
    module.def("gradient_norm", gradient_norm, arg("norm"), arg("total"), arg("threads"));
    module.def("masked_sum_squares", masked_sum_squares, arg("norm"), arg("out"), arg("threads"));
    module.def("masked_pack_", masked_pack_, arg("pack"), arg("threads"));
    module.def("masked_gather_", masked_copy<ltp::Copy::kGather>, arg("entries"), arg("threads"));
    module.def("masked_scatter_", masked_copy<ltp::Copy::kScatter>, arg("entries"), arg("threads"));
    module.def("masked_swap_", masked_copy<ltp::Copy::kSwap>, arg("entries"), arg("threads"));
    module.def(
        "list_positions", list_positions, arg("words"), arg("positions"),
        "Writes the positions of the set bits of a bitmap, ascending; the bits must be as many as the positions.");
    module.def("delta_histogram", over_pairs(ltp::delta_histogram), arg("histogram"), arg("threads"));
    module.def("sample_keys", over_pairs(ltp::sample_keys), arg("sample"), arg("threads"));
    module.def("delta_band", over_pairs(ltp::delta_band), arg("band"), arg("threads"));
    module.def("candidate_histogram", over_candidates(ltp::candidate_histogram, "low"), arg("candidates"),
               arg("threads"));
    module.def("take_above", over_candidates(ltp::take_above, "cut"), arg("candidates"), arg("threads"));
    module.def("take_ties", over_candidates(ltp::take_ties, "cut"), arg("candidates"), arg("threads"));
    module.def(
        "use_openmp", ltp::use_openmp, arg("gomp_parallel"),
        "Runs kernels on the threads of the OpenMP runtime whose GOMP_parallel is at this address; 0: on own threads.");
    module.def("isa", [] { return ltp::kernels().name; }, "The instruction set in use: avx512, avx2 or generic.");
    module.def("set_isa", ltp::use_isa, arg("name"), "Switches the instruction set; ValueError if not supported.");
}
