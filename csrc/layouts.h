// Layouts and addresses of many tensors in one call, by torch's DLPack exchange API, which is plain C and the same for
// every torch that has it. The structs are those of dlpack.h in DLPack 1.3.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace ltp {

struct DLTensor {
    void* data;
    int32_t device_type, device_id, ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct DLPackExchangeAPI {
    uint32_t major, minor;
    void *previous, *allocate, *from_object, *to_object;
    int (*describe)(void* object, DLTensor* out);  // the object owns what `out` points to
};

// The API of this torch, or null.
inline const DLPackExchangeAPI* dlpack_api() {
    static const DLPackExchangeAPI* const found = [] {
        const pybind11::object tensor = pybind11::module_::import("torch").attr("Tensor");
        const pybind11::object capsule = pybind11::getattr(tensor, "__dlpack_c_exchange_api__", pybind11::none());
        const void* api = capsule.is_none() ? nullptr : PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
        PyErr_Clear();
        const auto* own = static_cast<const DLPackExchangeAPI*>(api);
        return own != nullptr && own->major == 1 && own->describe != nullptr ? own : nullptr;
    }();
    return found;
}

// (layouts, addresses) of a list of tensors, some of which may be None: device, dtype, shape and strides of each as
// bytes, and a tuple of addresses, 0 for None. The result is None if a tensor needs a closer look: it is of a subclass,
// not dense, or its memory is below `lowest`.
inline pybind11::object describe(const pybind11::list& tensors, uintptr_t lowest) {
    static const PyObject* const plain =
        pybind11::object(pybind11::module_::import("torch").attr("Tensor")).release().ptr();
    static const PyObject* const parameter =
        pybind11::object(pybind11::module_::import("torch.nn").attr("Parameter")).release().ptr();
    const DLPackExchangeAPI* const api = dlpack_api();
    if (api == nullptr) return pybind11::none();
    std::string layouts;
    layouts.reserve(64 * tensors.size());
    pybind11::tuple addresses(tensors.size());
    size_t number = 0;
    for (const pybind11::handle tensor : tensors) {
        DLTensor own = {};
        own.ndim = -1;
        if (!tensor.is_none()) {
            const auto* const type = reinterpret_cast<const PyObject*>(Py_TYPE(tensor.ptr()));
            if (type != plain && type != parameter) return pybind11::none();
            if (api->describe(tensor.ptr(), &own) != 0) {
                PyErr_Clear();
                return pybind11::none();
            }
        }
        const uintptr_t address = reinterpret_cast<uintptr_t>(own.data) + own.byte_offset;
        if (own.ndim >= 0 && address < lowest) return pybind11::none();
        layouts.append(reinterpret_cast<const char*>(&own.device_type), 3 * sizeof(int32_t) + 2);
        for (int32_t i = 0; i < own.ndim; ++i) {
            layouts.append(reinterpret_cast<const char*>(own.shape + i), sizeof(int64_t));
            layouts.append(reinterpret_cast<const char*>(own.strides + i), sizeof(int64_t));
        }
        addresses[number++] = address;
    }
    return pybind11::make_tuple(pybind11::bytes(layouts), addresses);
}

}  // namespace ltp
