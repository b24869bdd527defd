// The tile kernels, compiled once per instruction set from the same sources, and the choice among them.
#pragma once

#include <cstdint>
#include <string>

#include "../common/adamw.h"
#include "../common/digest.h"
#include "../common/dtypes.h"
#include "../common/update.h"

namespace ltp {

// Which entries of one tile of one tensor are active. Addresses are already resolved to the tile.
struct TileIndex {
    Encoding encoding;
    int64_t start, length;      // entries of the tensor before the tile, and in it, 1 .. kTile
    int64_t active;             // active entries, 1 .. length
    const int32_t* words;       // kBitmap: [2 * ceil(length / 64)]
    const uint16_t* positions;  // kList16: [active] ascending
};

// One tile of one parameter, addresses already resolved to its first entry, slot or block.
struct AdamWTile : TileIndex, PackedState {
    void* param;       // [length] of param_dtype, updated at active entries only
    const void* grad;  // [length] of grad_dtype, or packed: [active] float32
    Dtype param_dtype, grad_dtype;
    bool packed;
    bool stochastic;  // rounds bfloat16 parameters stochastically
    uint32_t key;     // of the random bits, see rounding.h
    AdamWCoefficients coefficients;
};

// What becomes of the active entries of a tensor and of their slots.
enum class Copy { kGather, kScatter, kSwap };

// One tile of a tensor whose active entries are copied.
struct EntryTile : TileIndex {
    void* items;         // [length]
    void* slots;         // [active]
    int64_t item_bytes;  // 1, 2, 4 or 8
    Copy how;
};

// One tile of a pair of tensors to compare. `initial` null: the key is that of |tuned|.
struct DeltaTile {
    const void* initial;  // [length] of initial_dtype, from `start` on
    const void* tuned;    // [length] of tuned_dtype, from `start` on
    Dtype initial_dtype, tuned_dtype;
    int64_t length;  // entries, 1 .. kTile
};

constexpr int64_t kHighBins = 32768, kLowBins = 65536;

struct BandCounts {
    int64_t above, inside;  // entries in either bitmap
    int32_t largest;        // largest key seen
};

struct Kernels {
    const char* name;

    // Whether the tile's list or bitmap has `active` entries, and none beyond its end. The one look at an index before
    // it is followed.
    bool (*fits)(const TileIndex& tile);

    // Updates the tile's active entries and their state.
    void (*adamw)(const AdamWTile& tile);

    // Sum over the active entries, in a fixed order that depends on neither encoding nor instruction set, of the
    // squared effective gradient. Reads param, grad and anchor only.
    double (*sum_squares)(const AdamWTile& tile);

    // Copies the active entries of grad to out [active], or adds them.
    void (*pack)(const AdamWTile& tile, float* out, bool accumulate);

    // Copies the active entries to their slots, back, or exchanges them; every other entry keeps its bits.
    void (*copy)(const EntryTile& tile);

    // Adds the tile's keys, zero keys excepted, to bins[kHighBins] by key >> 16. Returns the largest key.
    int32_t (*histogram_high)(const DeltaTile& tile, uint32_t* bins);

    // Adds the keys with key >> 16 == prefix, zero keys excepted, to bins[kLowBins] by key & 0xFFFF. Returns the
    // largest key.
    int32_t (*histogram_low)(const DeltaTile& tile, int32_t prefix, uint32_t* bins);

    // Writes two bitmaps of ceil(length / 64) groups of 64 entries: key > upper to `words`, lower < key <= upper to
    // `inside`; bits past length are 0.
    BandCounts (*band)(const DeltaTile& tile, int32_t lower, int32_t upper, int32_t* words, uint64_t* inside);

    // Stores key and position of every entry whose bit is set in `selected`, ascending.
    void (*collect)(const DeltaTile& tile, const uint64_t* selected, int32_t* keys, uint16_t* positions);

    // Stores the key of every entry.
    void (*all_keys)(const DeltaTile& tile, int32_t* keys);

    // Of a tile of 1 byte or more.
    Digest (*digest)(const void* bytes, int64_t nbytes);
};

// The kernels in use: the newest instruction set this machine runs, or the one asked for by LTP_SPARSE_ISA or use_isa.
const Kernels& kernels();

// Switches to "generic", "avx2" or "avx512"; throws std::invalid_argument if unknown or not supported here.
void use_isa(const std::string& name);

}  // namespace ltp
