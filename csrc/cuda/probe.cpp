#include "probe.h"

#include <cuda_runtime_api.h>

namespace ltp {

const char* cuda_probe() {
    int devices = 0;
    const cudaError_t status = cudaGetDeviceCount(&devices);
    if (status == cudaSuccess) return nullptr;
    cudaGetLastError();  // what is returned here is not to be found by others
    return cudaGetErrorString(status);
}

}  // namespace ltp
