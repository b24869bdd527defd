#include "masked_adamw.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "thread_pool.h"
#include "tile_queue.h"

namespace ltp {
namespace {

// A row of the tile table.
struct TileRow {
    int64_t param, start, length, active, slot, index;
    Encoding encoding;
};
static_assert(sizeof(TileRow) == 7 * sizeof(int64_t), "a row of the tile table has 7 columns");

TileRow row_of(const MaskedAdamW& table, int64_t t) { return reinterpret_cast<const TileRow*>(table.tiles)[t]; }

// Checks the table and queues its tiles.
void queue_tiles(const MaskedAdamW& table, TileQueue& queue) {
    for (int64_t t = 0; t < table.n_tiles; ++t) {
        const TileRow row = row_of(table, t);
        const bool known =
            row.encoding == Encoding::kFull || row.encoding == Encoding::kBitmap || row.encoding == Encoding::kList16;
        if (row.param < 0 || row.param >= int64_t(table.params.size()) || row.start < 0 || row.length < 1 ||
            row.length > kTile || row.active < 1 || row.active > row.length || row.slot < 0 || row.index < 0 ||
            !known || (row.encoding == Encoding::kFull && row.active != row.length)) {
            throw std::invalid_argument("masked_adamw_: row " + std::to_string(t) +
                                        " of the tile table is not a tile of " + std::to_string(table.params.size()) +
                                        " parameters");
        }
        // An entry of a list costs a cache line.
        queue.add(row.encoding == Encoding::kList16 ? std::min(row.length, 16 * row.active) : row.length);
    }
}

AdamWTile resolve(const MaskedAdamW& table, const TileRow& row) {
    AdamWTile tile = {};
    tile.encoding = row.encoding;
    tile.length = row.length;
    tile.active = row.active;
    tile.param = reinterpret_cast<float*>(table.params[row.param]) + row.start;
    tile.grad = reinterpret_cast<const float*>(table.grads[row.param]) + row.start;
    if (table.anchor != nullptr) tile.anchor = table.anchor + row.slot;
    if (row.encoding == Encoding::kBitmap) tile.words = table.words + row.index;
    if (row.encoding == Encoding::kList16) tile.positions = table.positions + row.index;
    tile.coefficients = AdamWCoefficients::from_row(table.coefficients + AdamWCoefficients::kColumns * row.param);
    return tile;
}

// Calls body(number, row) for every tile, on `threads` threads.
template <class Body>
void for_each_tile(const MaskedAdamW& table, int64_t threads, Body body) {
    TileQueue queue;
    queue_tiles(table, queue);
    run_parallel(queue.split(threads), [&](int64_t worker) {
        for (int64_t begin, end; queue.take(worker, begin, end);) {
            for (int64_t t = begin; t < end; ++t) body(t, row_of(table, t));
        }
    });
}

}  // namespace

void masked_adamw_(const MaskedAdamW& table, float* exp_avg, float* exp_avg_sq, int64_t threads) {
    const auto update = kernels().adamw;
    for_each_tile(table, threads, [&](int64_t, const TileRow& row) {
        const double* coefficients = table.coefficients + AdamWCoefficients::kColumns * row.param;
        if (table.grads[row.param] == 0 || !AdamWCoefficients::applies(coefficients)) return;
        AdamWTile tile = resolve(table, row);
        tile.exp_avg = exp_avg + row.slot;
        tile.exp_avg_sq = exp_avg_sq + row.slot;
        update(tile);
    });
}

void masked_sum_squares(const MaskedAdamW& table, double* out, int64_t threads) {
    const auto sum_squares = kernels().sum_squares;
    for_each_tile(table, threads, [&](int64_t t, const TileRow& row) {
        out[t] = table.grads[row.param] == 0 ? 0.0 : sum_squares(resolve(table, row));
    });
}

}  // namespace ltp
