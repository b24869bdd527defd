// Reads a record of ltp_sparse/backends/arguments.py by the names of its fields. Python has checked shapes, dtypes and
// devices (ltp_sparse/backends/checks.py).
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "common/platform.h"

namespace ltp {

// The address of a tensor.
template <class T>
T* address_of(pybind11::handle tensor) {
    return reinterpret_cast<T*>(tensor.attr("data_ptr")().cast<uintptr_t>());
}

class Record {
  public:
    explicit Record(pybind11::handle record) : record_(record) {}

    bool has(const char* name) const { return !field(name).is_none(); }

    bool flag(const char* name) const { return field(name).cast<bool>(); }

    uint64_t number(const char* name) const { return field(name).cast<uint64_t>(); }

    double real(const char* name) const { return field(name).cast<double>(); }

    std::vector<int64_t> numbers(const char* name) const { return field(name).cast<std::vector<int64_t>>(); }

    // Empty if the record has no such field.
    std::vector<int64_t> optional_numbers(const char* name) const {
        return pybind11::getattr(record_, name, pybind11::list()).cast<std::vector<int64_t>>();
    }

    // The address of a tensor; null if it has no entries or is None.
    template <class T>
    T* at(const char* name) const {
        const pybind11::object tensor = field(name);
        return tensor.is_none() ? nullptr : address_of<T>(tensor);
    }

    int64_t entries(const char* name) const {
        const pybind11::object tensor = field(name);
        return tensor.is_none() ? 0 : tensor.attr("numel")().cast<int64_t>();
    }

    int64_t item_bytes(const char* name) const { return field(name).attr("element_size")().cast<int64_t>(); }

    // The addresses of a list of tensors, 0 for an absent one.
    std::vector<uintptr_t> addresses(const char* name) const {
        return field(name).attr("addresses").cast<std::vector<uintptr_t>>();
    }
    std::vector<int64_t> sizes(const char* name) const {
        return field(name).attr("sizes").cast<std::vector<int64_t>>();
    }
    std::vector<int> dtypes(const char* name) const { return field(name).attr("codes").cast<std::vector<int>>(); }
    Dtype dtype(const char* name) const { return Dtype(field(name).attr("code").cast<int>()); }

  private:
    pybind11::object field(const char* name) const { return record_.attr(name); }

    pybind11::handle record_;
};

}  // namespace ltp
