// What every source of the extensions shares: the host/device marker, the tile size, the codes of encodings.
#pragma once

#include <cstdint>

// Marks a function of csrc/common. Always inlined: a copy compiled for a newer instruction set must never become the
// one the linker keeps for all objects.
#if defined(__CUDACC__)
#define LTP_HD __host__ __device__ __forceinline__
#elif !defined(LTP_HD)  // tests that compile much and run little say `inline`
#define LTP_HD inline __attribute__((always_inline))
#endif

// Before a loop: a turn has enough to do; several at once would only be more code.
#if defined(__CUDACC__)
#define LTP_KEEP_LOOP _Pragma("unroll 1")
#else
#define LTP_KEEP_LOOP
#endif

namespace ltp {

constexpr int64_t kTile = 65536;  // entries; a position inside a tile fits 16 bits

enum class Encoding : int64_t { kFull = 0, kBitmap = 1, kList16 = 2 };

}  // namespace ltp
