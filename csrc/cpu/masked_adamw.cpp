#include "masked_adamw.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "../common/rounding.h"
#include "kernels.h"
#include "thread_pool.h"
#include "tile_queue.h"

namespace ltp {
namespace {

bool has_gradient(const HostUpdate& update, const TileRow& row) {
    return update.packed || update.grads[row.param] != 0;
}

// The entries of a row's parameter; one without a gradient is not touched.
int64_t size_of(const HostUpdate& update, const TileRow& row) {
    if (!lies_in(row.param, 1, update.room.params)) return 0;
    return has_gradient(update, row) ? update.sizes[row.param] : kNoLimit;
}

// Checks the table and queues its tiles.
void queue_tiles(const HostUpdate& update, TileQueue& queue) {
    for (int64_t t = 0; t < update.n_tiles; ++t) {
        const TileRow row = update.tiles[t];
        if (!lies_inside(row, update.room, size_of(update, row))) {
            throw std::invalid_argument("row " + std::to_string(t) +
                                        " of the tile table is not a tile of the parameters and state given");
        }
        // each entry of a list costs a cache line
        queue.add(row.encoding == Encoding::kList16 ? std::min(row.length, 16 * row.active) : row.length);
    }
}

// Which entries of the tile are active.
TileIndex resolve_index(const HostUpdate& update, const TileRow& row) {
    TileIndex tile = {row.encoding, row.start, row.length, row.active, nullptr, nullptr};
    if (row.encoding == Encoding::kBitmap) tile.words = update.words + row.index;
    if (row.encoding == Encoding::kList16) tile.positions = update.positions + row.index;
    return tile;
}

// The active entries of a tile, and the address of its gradients.
AdamWTile resolve_gradients(const HostUpdate& update, const TileRow& row) {
    AdamWTile tile = {};
    static_cast<TileIndex&>(tile) = resolve_index(update, row);
    tile.param_dtype = update.param_dtype;
    tile.packed = update.packed;
    tile.grad_dtype = update.packed ? Dtype::kFloat32 : update.grad_dtype;
    const uintptr_t grad = update.packed ? update.grads[0] + 4 * row.slot
                                         : update.grads[row.param] + bytes_of(update.grad_dtype) * row.start;
    tile.grad = reinterpret_cast<const void*>(grad);
    return tile;
}

AdamWTile resolve(const HostUpdate& update, const TileRow& row) {
    AdamWTile tile = resolve_gradients(update, row);
    tile.param = reinterpret_cast<void*>(update.params[row.param] + bytes_of(update.param_dtype) * row.start);
    static_cast<PackedState&>(tile) = update.state.of_tile(row, update.state.scales != nullptr ? 1 : 4);
    tile.coefficients = CoefficientRow(update.coefficients, row.param).rounded(update.clip);
    return tile;
}

// Calls body(number, row) for every tile, on `threads` threads. Skips tiles whose index does not fit, and then throws.
template <class Body>
void for_each_tile(const HostUpdate& update, int64_t threads, Body body) {
    TileQueue queue;
    queue_tiles(update, queue);
    const auto fits = kernels().fits;
    std::atomic<int64_t> wrong{-1};
    run_parallel(queue.split(threads), [&](int64_t worker) {
        queue.for_each(worker, [&](int64_t t) {
            const TileRow row = update.tiles[t];
            if (fits(resolve_index(update, row))) {
                body(t, row);
            } else {
                wrong = t;
            }
        });
    });
    if (wrong >= 0) {
        throw std::invalid_argument("row " + std::to_string(wrong) +
                                    " of the tile table does not fit its list or bitmap; its tile was left as it was");
    }
}

}  // namespace

void masked_adamw_(const HostUpdate& update, int64_t threads) {
    const auto run = kernels().adamw;
    for_each_tile(update, threads, [&](int64_t, const TileRow& row) {
        const CoefficientRow coefficients(update.coefficients, row.param);
        if (!has_gradient(update, row) || !coefficients.applies()) return;
        AdamWTile tile = resolve(update, row);
        tile.stochastic = update.stochastic;
        tile.key = tile_key(coefficients.rounding_key(), row.start);
        run(tile);
    });
}

void masked_sum_squares(const HostUpdate& update, double* out, int64_t threads) {
    const auto sum_squares = kernels().sum_squares;
    for_each_tile(update, threads, [&](int64_t t, const TileRow& row) {
        out[t] = has_gradient(update, row) ? sum_squares(resolve(update, row)) : 0.0;
    });
}

void gradient_norm(const HostUpdate& update, const Total& total, int64_t threads) {
    masked_sum_squares(update, total.sums + total.first, threads);
    if (total.first + update.n_tiles != total.tiles) return;
    double squares = 0.0;
    for (int64_t t = 0; t < total.tiles; ++t) squares += total.sums[t];
    total.finish(squares);
}

void masked_pack_(const HostUpdate& update, float* out, bool accumulate, int64_t threads) {
    const auto pack = kernels().pack;
    for_each_tile(update, threads, [&](int64_t, const TileRow& row) {
        if (has_gradient(update, row)) pack(resolve_gradients(update, row), out + row.slot, accumulate);
    });
}

void masked_copy(const HostUpdate& entries, void* slots, int64_t item_bytes, Copy how, int64_t threads) {
    const auto run = kernels().copy;
    for_each_tile(entries, threads, [&](int64_t, const TileRow& row) {
        EntryTile tile = {};
        static_cast<TileIndex&>(tile) = resolve_index(entries, row);
        tile.items = reinterpret_cast<void*>(entries.grads[row.param] + item_bytes * row.start);
        tile.slots = static_cast<char*>(slots) + item_bytes * row.slot;
        tile.item_bytes = item_bytes;
        tile.how = how;
        run(tile);
    });
}

}  // namespace ltp
