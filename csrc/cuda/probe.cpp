#include "probe.h"

#include <cuda_runtime_api.h>

namespace ltp {

const char* cuda_probe() {
    int devices = 0;
    const cudaError_t status = cudaGetDeviceCount(&devices);
    if (status == cudaSuccess) return nullptr;
    cudaGetLastError();  // clears the error, so that no later call reports it
    return cudaGetErrorString(status);
}

}  // namespace ltp
