// A row of the tile table.
#pragma once

#include "platform.h"

namespace ltp {

struct TileRow {
    int64_t param, start, length, active, slot, index;
    Encoding encoding;
    int64_t block;
};
static_assert(sizeof(TileRow) == 8 * sizeof(int64_t), "a row of the tile table has 8 columns");

}  // namespace ltp
