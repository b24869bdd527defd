#include "masked_adamw.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "../common/rounding.h"
#include "../common/tile.h"
#include "kernels.h"
#include "thread_pool.h"
#include "tile_queue.h"

namespace ltp {
namespace {

TileRow row_of(const MaskedAdamW& table, int64_t t) { return reinterpret_cast<const TileRow*>(table.tiles)[t]; }

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

bool has_gradient(const MaskedAdamW& table, const TileRow& row) { return table.packed || table.grads[row.param] != 0; }

// The entries of a row's parameter; where there is no gradient, nothing of it is touched.
int64_t size_of(const MaskedAdamW& table, const TileRow& row) {
    if (!lies_in(row.param, 1, table.room.params)) return 0;
    return has_gradient(table, row) ? table.sizes[row.param] : kNoLimit;
}

// Checks the table and queues its tiles.
void queue_tiles(const MaskedAdamW& table, TileQueue& queue) {
    for (int64_t t = 0; t < table.n_tiles; ++t) {
        const TileRow row = row_of(table, t);
        if (!lies_inside(row, table.room, size_of(table, row))) {
            throw std::invalid_argument("row " + std::to_string(t) +
                                        " of the tile table is not a tile of the parameters and state given");
        }
        // An entry of a list costs a cache line.
        queue.add(row.encoding == Encoding::kList16 ? std::min(row.length, 16 * row.active) : row.length);
    }
}

const double* coefficients_of(const MaskedAdamW& table, const TileRow& row) {
    return table.coefficients + AdamWCoefficients::kColumns * row.param;
}

// Which entries of the tile are active.
AdamWTile resolve_index(const MaskedAdamW& table, const TileRow& row) {
    AdamWTile tile = {};
    tile.encoding = row.encoding;
    tile.start = row.start;
    tile.length = row.length;
    tile.active = row.active;
    if (row.encoding == Encoding::kBitmap) tile.words = table.words + row.index;
    if (row.encoding == Encoding::kList16) tile.positions = table.positions + row.index;
    return tile;
}

// These, and where its gradients are.
AdamWTile resolve_gradients(const MaskedAdamW& table, const TileRow& row) {
    AdamWTile tile = resolve_index(table, row);
    tile.param_dtype = table.param_dtype;
    tile.packed = table.packed;
    tile.grad_dtype = table.packed ? Dtype::kFloat32 : table.grad_dtype;
    const uintptr_t grad =
        table.packed ? table.grads[0] + 4 * row.slot : table.grads[row.param] + bytes_of(table.grad_dtype) * row.start;
    tile.grad = reinterpret_cast<const void*>(grad);
    return tile;
}

AdamWTile resolve(const MaskedAdamW& table, const TileRow& row) {
    AdamWTile tile = resolve_gradients(table, row);
    tile.param = reinterpret_cast<void*>(table.params[row.param] + bytes_of(table.param_dtype) * row.start);
    if (table.anchor != nullptr) tile.anchor = table.anchor + row.slot;
    if (table.master != nullptr) tile.master = table.master + row.slot;
    tile.coefficients = AdamWCoefficients::from_row(coefficients_of(table, row));
    return tile;
}

// Calls body(number, row) for every tile, on `threads` threads; leaves out those whose index does not fit, and throws.
template <class Body>
void for_each_tile(const MaskedAdamW& table, int64_t threads, Body body) {
    TileQueue queue;
    queue_tiles(table, queue);
    const auto fits = kernels().fits;
    std::atomic<int64_t> wrong{-1};
    run_parallel(queue.split(threads), [&](int64_t worker) {
        for (int64_t begin, end; queue.take(worker, begin, end);) {
            for (int64_t t = begin; t < end; ++t) {
                const TileRow row = row_of(table, t);
                if (fits(resolve_index(table, row))) {
                    body(t, row);
                } else {
                    wrong = t;
                }
            }
        }
    });
    if (wrong >= 0) {
        throw std::invalid_argument("row " + std::to_string(wrong) +
                                    " of the tile table does not fit its list or bitmap; its tile was left as it was");
    }
}

}  // namespace

void masked_adamw_(const MaskedAdamW& table, const Moments& moments, bool stochastic, int64_t threads) {
    const auto update = kernels().adamw;
    const int64_t size = moments.scales != nullptr ? 1 : 4;
    for_each_tile(table, threads, [&](int64_t, const TileRow& row) {
        const double* coefficients = coefficients_of(table, row);
        if (!has_gradient(table, row) || !AdamWCoefficients::applies(coefficients)) return;
        AdamWTile tile = resolve(table, row);
        tile.exp_avg = reinterpret_cast<void*>(moments.exp_avg + size * row.slot);
        tile.exp_avg_sq = reinterpret_cast<void*>(moments.exp_avg_sq + size * row.slot);
        if (moments.scales != nullptr) tile.scales = moments.scales + 2 * row.block;
        tile.stochastic = stochastic;
        tile.key = tile_key(AdamWCoefficients::rounding_key(coefficients), row.start);
        update(tile);
    });
}

void masked_sum_squares(const MaskedAdamW& table, double* out, int64_t threads) {
    const auto sum_squares = kernels().sum_squares;
    for_each_tile(table, threads, [&](int64_t t, const TileRow& row) {
        out[t] = has_gradient(table, row) ? sum_squares(resolve(table, row)) : 0.0;
    });
}

void masked_pack_(const MaskedAdamW& table, float* out, bool accumulate, int64_t threads) {
    const auto pack = kernels().pack;
    for_each_tile(table, threads, [&](int64_t, const TileRow& row) {
        if (has_gradient(table, row)) pack(resolve_gradients(table, row), out + row.slot, accumulate);
    });
}

}  // namespace ltp
