#include "versions.h"

#include <cuda_runtime.h>

namespace ltp {

Versions cuda_versions() {
    Versions found = {};
    cudaRuntimeGetVersion(&found.runtime);
    if (cudaDriverGetVersion(&found.driver) != cudaSuccess) found.driver = 0;
    cudaGetLastError();
    return found;
}

}  // namespace ltp
