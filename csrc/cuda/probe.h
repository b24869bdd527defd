#pragma once

namespace ltp {

// The reason why the CUDA runtime of this module cannot be used, such as an older driver; null if it can.
const char* cuda_probe();

}  // namespace ltp
