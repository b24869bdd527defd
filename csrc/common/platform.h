// Shared by all sources of the extensions: the marker for host and device, the tile size, the codes of encodings.
#pragma once

#include <cstdint>

// Marks a function of csrc/common. It is always inlined: otherwise the linker could keep the copy compiled for a newer
// instruction set and use it everywhere.
#if defined(__CUDACC__)
#define LTP_HD __host__ __device__ __forceinline__
#elif !defined(LTP_HD)  // tests define it as `inline`, to compile faster
#define LTP_HD inline __attribute__((always_inline))
#endif

// Before a loop whose body is long enough: unrolling it would only make more code.
#if defined(__CUDACC__)
#define LTP_KEEP_LOOP _Pragma("unroll 1")
#else
#define LTP_KEEP_LOOP
#endif

namespace ltp {

constexpr int64_t kTile = 65536;  // entries; a position inside a tile fits 16 bits

enum class Encoding : int64_t { kFull = 0, kBitmap = 1, kList16 = 2 };

}  // namespace ltp
