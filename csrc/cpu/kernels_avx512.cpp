#include "lanes_avx512.h"
#include "masked_adamw_tile.h"
#include "masked_copy_tile.h"
#include "tile_digest.h"
#include "topk_delta_tile.h"

namespace ltp {

extern const Kernels kernels_avx512 = {"avx512",       fits,          adamw, sum_squares, pack_gradients, copy_entries,
                                       histogram_high, histogram_low, band,  collect,     all_keys,       digest};

}  // namespace ltp
