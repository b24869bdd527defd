// The ranking key of topk_delta: the 31 magnitude bits of float32(tuned) - float32(initial). As integers these order
// like the magnitudes, so the largest deltas are the largest keys; 0 is "did not move", >= kFirstNonfinite is NaN or
// inf.
#pragma once

#include "dtypes.h"

namespace ltp {

constexpr int32_t kFirstNonfinite = 0x7F800000;
constexpr int64_t kRun = 16;  // neighbouring entries that are sampled together

LTP_HD int32_t delta_key(float delta) { return int32_t(bits_of_float(delta) & 0x7FFFFFFF); }

}  // namespace ltp
