// A row of the tile table, and the memory that it must lead to.
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

// How much there is of all that the rows of a table lead to.
struct TileRoom {
    int64_t params, words, positions;
    int64_t slots, blocks;  // kNoLimit where nothing is kept by them
};

// Whether `count` items from `first` on lie in `size` of them.
LTP_HD bool lies_in(int64_t first, int64_t count, int64_t size) { return first >= 0 && first <= size - count; }

// size: entries of the row's parameter
LTP_HD bool lies_inside(const TileRow& row, const TileRoom& room, int64_t size) {
    if (row.length < 1 || row.length > kTile || row.active < 1 || row.active > row.length ||
        !lies_in(row.param, 1, room.params) || !lies_in(row.start, row.length, size) ||
        !lies_in(row.slot, row.active, room.slots) || !lies_in(row.block, (row.active + 255) / 256, room.blocks)) {
        return false;
    }
    switch (row.encoding) {
        case Encoding::kFull:
            return row.active == row.length;
        case Encoding::kBitmap:
            return lies_in(row.index, 2 * ((row.length + 63) / 64), room.words);
        case Encoding::kList16:
            return lies_in(row.index, row.active, room.positions);
    }
    return false;
}

}  // namespace ltp
