// A kernel launch with its checks.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace ltp {

inline void check(cudaError_t status, const char* op) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(op) + ": CUDA error, " + cudaGetErrorString(status));
    }
}

struct Grid {
    int64_t blocks;  // in one dimension; nothing is launched for 0
    int threads;
    int bytes = 0;  // dynamic shared memory of a thread block
};

// stream: a cudaStream_t
template <class... Parameters>
void launch(const char* op, void (*kernel)(Parameters...), const Grid& grid, void* stream,
            const std::remove_reference_t<Parameters>&... arguments) {
    if (grid.blocks > 0x7FFFFFFF) {
        throw std::invalid_argument(std::string(op) + ": " + std::to_string(grid.blocks) +
                                    " thread blocks are too many");
    }
    if (grid.blocks == 0) return;
    kernel<<<unsigned(grid.blocks), grid.threads, grid.bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
    check(cudaGetLastError(), op);
}

}  // namespace ltp
