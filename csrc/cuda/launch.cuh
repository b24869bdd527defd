// A kernel launch with its checks.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace ltp {

// A grid of one dimension.
inline unsigned blocks_of(int64_t items, const char* op) {
    if (items > 0x7FFFFFFF) {
        throw std::invalid_argument(std::string(op) + ": " + std::to_string(items) + " thread blocks are too many");
    }
    return unsigned(items);
}

inline void check(const char* op) {
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(op) + ": CUDA error, " + cudaGetErrorString(status));
    }
}

}  // namespace ltp
