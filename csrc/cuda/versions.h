// Which CUDA the kernels were built with, and which one the driver serves.
#pragma once

namespace ltp {

struct Versions {
    int runtime, driver;  // 1000 * major + 10 * minor; driver 0: there is none
};

Versions cuda_versions();

}  // namespace ltp
