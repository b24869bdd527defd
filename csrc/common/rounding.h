// The random bits of stochastic rounding, for bfloat16 weights and 8-bit moments. They depend only on (seed, step,
// parameter, flat index), so that encoding, tiling and device do not change a result. `ltp_sparse/backends/rounding.py`
// is the same in torch.
#pragma once

#include "dtypes.h"

namespace ltp {

// The first step of `mix32`. It is linear: that of key ^ index is that of the key ^ that of the index.
LTP_HD uint32_t folded(uint32_t x) { return x ^ x >> 16; }

// The other steps.
LTP_HD uint32_t mix_folded(uint32_t x) {
    x *= 0x7FEB352Du;
    x ^= x >> 15;
    x *= 0x846CA68Bu;
    return x ^ x >> 16;
}

// A bijection of 32-bit words, `lowbias32` by C. Wellons: one changed bit flips every other one in half of all cases.
LTP_HD uint32_t mix32(uint32_t x) { return mix_folded(folded(x)); }

// The key of one step of a parameter, as `rounding_keys` of ltp_sparse/backends/rounding.py.
LTP_HD uint32_t rounding_key_of(uint64_t seed, uint64_t step, uint64_t number) {
    uint32_t key = mix32(uint32_t(seed));
    const uint32_t words[] = {uint32_t(seed >> 32), uint32_t(step), uint32_t(number)};
    for (const uint32_t word : words) key = mix32(key + word * 0x9E3779B9u);
    return key;
}

// The key of a tile, all of whose indices have the same upper 32 bits: `tiles_have_keys` of rounding.py checks shards.
LTP_HD uint32_t tile_key(uint32_t rounding_key, int64_t start) {
    return mix32(rounding_key + uint32_t(start >> 32) * 0x9E3779B9u);
}

// 16 random bits for the entry with this flat index.
LTP_HD uint32_t random16(uint32_t tile_key, uint32_t index) { return mix32(tile_key ^ index) >> 16; }

// The key of a tile's 8-bit moments, whose bits are independent of those of its weights.
LTP_HD uint32_t moment_key(uint32_t tile_key) { return mix32(tile_key + 0x9E3779B9u); }

// 32 random bits for the moments of the entry with this flat index; the upper half is for the first moment.
LTP_HD uint32_t moment_bits(uint32_t moment_key, uint32_t index) { return mix32(moment_key ^ index); }

// Rounds up or down at random so that the mean is exact. Infinity stays, as its lower bits are zeros, and so does NaN.
LTP_HD BFloat16 round_stochastically(float value, uint32_t random16) {
    return {uint16_t((value != value ? 0x7FC00000 : bits_of_float(value) + random16) >> 16)};
}

}  // namespace ltp
