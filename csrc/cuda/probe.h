#pragma once

namespace ltp {

// Why the runtime that is linked into this module cannot be used, as with a driver that is older; null: it can.
const char* cuda_probe();

}  // namespace ltp
