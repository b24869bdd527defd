// The key by which topk_delta ranks an entry: the 31 magnitude bits of float32(tuned) - float32(initial). As integers
// they are ordered like the magnitudes. 0 stands for an entry that did not move; keys from kFirstNonfinite on are
// infinity and NaN.
#pragma once

#include "dtypes.h"

namespace ltp {

constexpr int32_t kFirstNonfinite = 0x7F800000;
constexpr int64_t kRun = 16;  // neighbouring entries that are sampled together

LTP_HD int32_t delta_key(float delta) { return int32_t(bits_of_float(delta) & 0x7FFFFFFF); }

// The largest key below a bound. No key is above 2^31 - 1, so any larger bound means the same as 2^31.
LTP_HD int32_t key_below(int64_t bound) { return int32_t(bound - 1 < INT32_MAX ? bound - 1 : INT32_MAX); }

}  // namespace ltp
