// A row of the tile table, and the check that it stays inside the memory of the call.
#pragma once

#include <cstdint>

#include "platform.h"

namespace ltp {

struct TileRow {
    int64_t param, start, length, active, slot, index;
    Encoding encoding;
    int64_t block;
};
static_assert(sizeof(TileRow) == 8 * sizeof(int64_t), "a row of the tile table has 8 columns");

constexpr int64_t kNoLimit = INT64_MAX;

// The sizes of all arrays that the rows of a table refer to.
struct TileRoom {
    int64_t params, words, positions;
    int64_t slots, blocks;  // kNoLimit if no array is indexed by them
};

// Whether the items first .. first + count - 1 lie inside an array of `size` items.
LTP_HD bool lies_in(int64_t first, int64_t count, int64_t size) { return (first >= 0) & (first <= size - count); }

// size: entries of the row's parameter. Without branches, so that a GPU waits for the row only once.
LTP_HD bool lies_inside(const TileRow& row, const TileRoom& room, int64_t size) {
    const bool counts = (row.length >= 1) & (row.length <= kTile) & (row.active >= 1) & (row.active <= row.length);
    const int64_t length = counts ? row.length : 1, active = counts ? row.active : 1;
    const bool is_full = row.encoding == Encoding::kFull, is_bitmap = row.encoding == Encoding::kBitmap;
    const bool is_indexed =
        (is_bitmap | (row.encoding == Encoding::kList16)) &
        lies_in(row.index, is_bitmap ? 2 * ((length + 63) / 64) : active, is_bitmap ? room.words : room.positions);
    return counts & lies_in(row.param, 1, room.params) & lies_in(row.start, length, size) &
           lies_in(row.slot, active, room.slots) & lies_in(row.block, (active + 255) / 256, room.blocks) &
           (is_full ? active == length : is_indexed);
}

}  // namespace ltp
