// The walk over the active entries of a tile, for all encodings and storage types.
//
// Active entries are processed in pieces of three phases: copy the values and gradients of the piece to float32 buffers
// in the L1 cache, update these as a dense array, copy the new values back. So the compiler vectorises the update, with
// square roots and divisions for active entries only. Updating in place, one vector at a time, is slower: each masked
// load would wait for the masked store before it. Pieces are small, so that the processor loads the next piece while it
// still computes this one.
#pragma once

#include <cstring>
#include <type_traits>

#include "../common/quantization.h"
#include "../common/rounding.h"
#include "kernels.h"

#define LTP_INLINE inline __attribute__((always_inline))

namespace ltp {
namespace {

constexpr int64_t kPackedPiece = 192;  // active entries, at most
constexpr int64_t kListPiece = 16;
constexpr int64_t kListAhead = 64;  // entries between a piece and the one that is prefetched meanwhile

// A bitmap with at least this many entries per active one is sparse. It is turned into a list, so that cache lines
// without active entries are not read. For denser bitmaps, reading all lines costs less than skipping some.
constexpr int64_t kSparse = 24;

enum class Access { kUpdate, kReadGrads, kReadBoth };

inline uint64_t load_group(const int32_t* words, int64_t group) {
    uint64_t bits;
    memcpy(&bits, words + 2 * group, sizeof bits);
    return bits;
}

// Writes the positions of all active entries of a bitmap.
inline void decode_tile(const TileIndex& tile, uint16_t* positions) {
    for (int64_t group = 0; 64 * group < tile.length; ++group) {
        const uint64_t bits = load_group(tile.words, group);
        if (bits != 0) positions += decode(bits, uint16_t(64 * group), positions);
    }
}

// Looks for the largest position instead of taking the last one, so that a list in any order is safe.
bool fits(const TileIndex& tile) {
    if (tile.encoding == Encoding::kList16) {
        uint16_t largest = 0;
        for (int64_t i = 0; i < tile.active; ++i) {
            largest = tile.positions[i] > largest ? tile.positions[i] : largest;
        }
        return largest < tile.length;
    }
    if (tile.encoding != Encoding::kBitmap) return true;
    int64_t active = 0;
    for (int64_t group = 0; 64 * group < tile.length; ++group) active += count_bits(load_group(tile.words, group));
    const int64_t rest = tile.length % 64;
    return active == tile.active && (rest == 0 || load_group(tile.words, tile.length / 64) >> rest == 0);
}

// The walk for parameters of type Param and gradients of type Grad, or, with PACKED, packed gradients in float32.
template <class Param, class Grad, bool PACKED>
class Walk {
  public:
    // Calls body(values, grads, rank, count, positions) for pieces of active entries in order: `count` entries from the
    // tile's active entry number `rank` on, at these positions in the tile; null stands for rank, rank + 1 and so on.
    // With 8-bit moments each piece is one of their blocks. With kUpdate, body leaves the new values in `values`, which
    // are rounded into the parameters. With kReadGrads, `values` must not be read.
    template <Access ACCESS, class Body>
    void for_each_piece(const AdamWTile& tile, Body body) const {
        const bool lanes = kPacksBoth && kSparse * tile.active > tile.length;
        const bool listed = tile.encoding == Encoding::kList16;
        // random bits depend on positions
        const bool random = ACCESS == Access::kUpdate && (tile.scales != nullptr || tile.stochastic);
        uint16_t decoded[kTile + 64];
        if (tile.encoding == Encoding::kBitmap && (random || !lanes)) decode_tile(tile, decoded);
        const uint16_t* const positions = listed ? tile.positions : decoded;
        if (tile.encoding == Encoding::kFull) return for_each_full_piece<ACCESS>(tile, body);
        if (listed || !lanes) return for_each_listed_piece<ACCESS>(tile, positions, body);
        if constexpr (kPacksBoth) {
            if (ACCESS == Access::kUpdate && tile.scales != nullptr) {
                for_each_packed_piece<ACCESS, true>(tile, positions, body);
            } else {
                for_each_packed_piece<ACCESS, false>(tile, positions, body);
            }
        }
    }

  private:
    static constexpr bool kPlainParam = std::is_same_v<Param, float>;
    static constexpr bool kPlainGrad = std::is_same_v<Grad, float>;
    // Whether the instruction set has lanes for items of this type; other types go by lists.
    template <class Storage>
    static constexpr bool kPacks = sizeof(Storage) == 4 ? kPacksLanes : sizeof(Storage) == 2 && kPacksHalf;
    static constexpr bool kPacksBoth = kPacks<Param> && kPacks<Grad>;
    static constexpr int64_t kLargestPiece = 256;
    static_assert(kStateBlock <= kLargestPiece && kPackedPiece <= kLargestPiece);

    struct Buffers {
        // a piece, the rests of the groups at its ends, and 64 items behind them that the primitives may touch
        static constexpr int64_t kSize = kLargestPiece + 3 * 64;
        alignas(64) float values[kSize];
        alignas(64) float grads[kSize];
        alignas(64) Param params[kSize];
        alignas(64) Grad raw_grads[kSize];

        Param* rounded() {
            if constexpr (kPlainParam)
                return values;
            else
                return params;
        }

        // Moves the items from `first` to `end` to the front.
        void drop(int64_t first, int64_t end) {
            const auto move = [&](auto* items) { memmove(items, items + first, size_t(end - first) * sizeof *items); };
            if (kPlainParam) move(values);
            if (!kPlainParam) move(params);
            if (kPlainGrad && !PACKED) move(grads);
            if (!kPlainGrad && !PACKED) move(raw_grads);
        }
    };

    static Param* params_of(const AdamWTile& tile) { return static_cast<Param*>(tile.param); }
    static const Grad* grads_of(const AdamWTile& tile) { return static_cast<const Grad*>(tile.grad); }

    // The values of a piece for body: in the master, or copied to the buffer.
    template <Access ACCESS, class Bring>
    static float* values_of(const AdamWTile& tile, int64_t rank, Buffers& buffers, Bring bring) {
        if (tile.master != nullptr) return tile.master + rank;
        if (ACCESS != Access::kReadGrads) bring();
        return buffers.values;
    }

    template <class Bring>
    static const float* grads_of(const AdamWTile& tile, int64_t rank, Buffers& buffers, Bring bring) {
        if (PACKED) return static_cast<const float*>(tile.grad) + rank;
        bring();
        return buffers.grads;
    }

    template <class Storage>
    static void widen(const Storage* from, int64_t count, float* to) {
        for (int64_t i = 0; i < count; ++i) to[i] = to_float32(from[i]);
    }

    // Rounds the values of a piece; position(i) is the position of the i-th value in the tile.
    template <class Position>
    static void round_piece(const AdamWTile& tile, const float* values, int64_t count, Position position, Param* to) {
        if constexpr (std::is_same_v<Param, BFloat16>) {
            if (tile.stochastic) {
                for (int64_t i = 0; i < count; ++i) {
                    to[i] = round_stochastically(values[i], random16(tile.key, uint32_t(tile.start + position(i))));
                }
                return;
            }
        }
        for (int64_t i = 0; i < count; ++i) round_to(values[i], to[i]);
    }

    template <Access ACCESS, class Body>
    static void for_each_full_piece(const AdamWTile& tile, Body body) {
        Param* const params = params_of(tile);
        if constexpr (kPlainParam && (kPlainGrad || PACKED)) {
            if (tile.scales == nullptr && tile.master == nullptr) {
                body(params, static_cast<const float*>(tile.grad), 0, tile.length, nullptr);
                return;
            }
        }
        Buffers buffers;
        for (int64_t first = 0; first < tile.length; first += kLargestPiece) {
            const int64_t left = tile.length - first, count = left < kLargestPiece ? left : kLargestPiece;
            float* values =
                values_of<ACCESS>(tile, first, buffers, [&] { widen(params + first, count, buffers.values); });
            const float* grads =
                grads_of(tile, first, buffers, [&] { widen(grads_of(tile) + first, count, buffers.grads); });
            body(values, grads, first, count, nullptr);
            if (ACCESS == Access::kUpdate) {
                round_piece(tile, values, count, [&](int64_t i) { return first + i; }, params + first);
            }
        }
    }

    template <Access ACCESS, class Body>
    static void for_each_listed_piece(const AdamWTile& tile, const uint16_t* positions, Body body) {
        if constexpr (ACCESS == Access::kUpdate) {
            if (tile.scales != nullptr) return for_each_listed_piece_of<ACCESS, kStateBlock>(tile, positions, body);
        }
        for_each_listed_piece_of<ACCESS, kListPiece>(tile, positions, body);
    }

    template <Access ACCESS, int64_t SIZE, class Body>
    static void for_each_listed_piece_of(const AdamWTile& tile, const uint16_t* positions, Body body) {
        Buffers buffers;
        int64_t rank = 0;
        fetch_listed<ACCESS>(tile, positions, kListAhead < tile.active ? kListAhead : tile.active);
        // the compiler knows the size of every piece except the last
        for (; rank + SIZE <= tile.active; rank += SIZE) {
            listed_piece<ACCESS>(tile, positions, rank, std::integral_constant<int64_t, SIZE>(), buffers, body);
        }
        if (rank < tile.active) listed_piece<ACCESS>(tile, positions, rank, tile.active - rank, buffers, body);
    }

    // Entries of a list are far apart in memory, and a gather alone keeps too few loads in flight. They are asked for
    // early and into the second cache, which waits for more of them at a time than the first.
    template <Access ACCESS>
    LTP_INLINE static void fetch_listed(const AdamWTile& tile, const uint16_t* positions, int64_t count) {
        const bool touches_params =
            ACCESS == Access::kUpdate || (ACCESS == Access::kReadBoth && tile.master == nullptr);
        for (int64_t i = 0; i < count; ++i) {
            if (touches_params) __builtin_prefetch(params_of(tile) + positions[i], 0, 1);
            if (!PACKED) __builtin_prefetch(grads_of(tile) + positions[i], 0, 1);
        }
    }

    // Count: int64_t, or a std::integral_constant of it.
    template <Access ACCESS, class Count, class Body>
    LTP_INLINE static void listed_piece(const AdamWTile& tile, const uint16_t* positions, int64_t rank, Count count,
                                        Buffers& buffers, Body body) {
        Param* const params = params_of(tile);
        const uint16_t* const piece = positions + rank;
        const int64_t left = tile.active - rank - kListAhead, fetched = left < count ? left : int64_t(count);
        fetch_listed<ACCESS>(tile, piece + kListAhead, fetched);
        float* values = values_of<ACCESS>(tile, rank, buffers, [&] {
            for (int64_t i = 0; i < count; ++i) buffers.values[i] = to_float32(params[piece[i]]);
        });
        const float* grads = grads_of(tile, rank, buffers, [&] {
            for (int64_t i = 0; i < count; ++i) buffers.grads[i] = to_float32(grads_of(tile)[piece[i]]);
        });
        body(values, grads, rank, count, piece);
        if (ACCESS == Access::kUpdate) {
            if constexpr (kPlainParam) {
                for (int64_t i = 0; i < count; ++i) params[piece[i]] = values[i];
            } else {
                round_piece(tile, values, count, [&](int64_t i) { return int64_t(piece[i]); }, buffers.params);
                for (int64_t i = 0; i < count; ++i) params[piece[i]] = buffers.params[i];
            }
        }
    }

    // With BLOCKS, pieces are blocks of 8-bit moments, which can end inside a group; otherwise whole groups of 64
    // entries.
    template <Access ACCESS, bool BLOCKS, class Body>
    static void for_each_packed_piece(const AdamWTile& tile, const uint16_t* positions, Body body) {
        constexpr int64_t kEnough = BLOCKS ? kStateBlock : kPackedPiece - 63;
        Buffers buffers;
        const bool reads_params = ACCESS != Access::kReadGrads && tile.master == nullptr;
        const int64_t groups = (tile.length + 63) / 64;
        int64_t brought = 0, back = 0;           // groups copied to the buffers, and copied back
        int64_t held = 0, worked = 0, rank = 0;  // entries in the buffers, updated ones of these, and of the whole tile
        while (rank < tile.active) {
            for (; brought < groups && held - worked < kEnough; ++brought) {
                const uint64_t bits = load_group(tile.words, brought);
                if (reads_params) {
                    bring_group(params_of(tile), tile.length, brought, bits, buffers.params, buffers.values, held);
                }
                if (!PACKED) {
                    bring_group(grads_of(tile), tile.length, brought, bits, buffers.raw_grads, buffers.grads, held);
                }
                held += count_bits(bits);
            }
            const int64_t left = held - worked, count = BLOCKS && left > kStateBlock ? kStateBlock : left;
            float* values = values_of<ACCESS>(tile, rank, buffers, [&] {
                if constexpr (!kPlainParam) widen(buffers.params + worked, count, buffers.values + worked);
            });
            if (tile.master == nullptr) values += worked;
            const float* grads = grads_of(tile, rank, buffers, [&] {
                if constexpr (!kPlainGrad) widen(buffers.raw_grads + worked, count, buffers.grads + worked);
            });
            if (!PACKED) grads += worked;
            body(values, grads, rank, count, positions + rank);
            rank += count;
            if (ACCESS == Access::kUpdate) {
                if constexpr (kPlainParam) {
                    if (tile.master != nullptr) memcpy(buffers.values + worked, values, size_t(count) * sizeof(float));
                } else {
                    round_piece(
                        tile, values, count, [&](int64_t i) { return int64_t(positions[rank - count + i]); },
                        buffers.params + worked);
                }
                worked += count;
                int64_t done = 0;
                for (; back < brought; ++back) {
                    const uint64_t bits = load_group(tile.words, back);
                    const int64_t entries = count_bits(bits);
                    if (BLOCKS && done + entries > worked) break;
                    put_back_group(tile, back, bits, buffers.rounded() + done);
                    done += entries;
                }
                if (BLOCKS) buffers.drop(done, held);
                held -= done;
                worked -= done;
            } else {
                held = 0;
            }
        }
    }

    // Copies the active items of a group to the buffer of their type, from its item number `at` on.
    template <class Storage>
    static void bring_group(const Storage* from, int64_t length, int64_t group, uint64_t bits, Storage* stored,
                            float* floats, int64_t at) {
        Storage* to;
        if constexpr (std::is_same_v<Storage, float>) {
            to = floats + at;
        } else {
            to = stored + at;
        }
        from += 64 * group;
        if (64 * group + 64 <= length) return pack(from, bits, to);
        // vectors would reach past the end of the tensor
        for (; bits != 0; bits &= bits - 1) *to++ = from[__builtin_ctzll(bits)];
    }

    static void put_back_group(const AdamWTile& tile, int64_t group, uint64_t bits, const Param* from) {
        Param* const to = params_of(tile) + 64 * group;
        if (64 * group + 64 <= tile.length) return unpack(from, bits, to);
        for (; bits != 0; bits &= bits - 1) to[__builtin_ctzll(bits)] = *from++;
    }
};

// Calls body(walk) with the walk for the tile's storage types.
template <class Body>
void with_walk(const AdamWTile& tile, Body body) {
    with_storage_types(tile.param_dtype, tile.grad_dtype, tile.packed, [&](auto param, auto grad, auto packed) {
        body(Walk<decltype(param), decltype(grad), decltype(packed)::value>());
    });
}

}  // namespace
}  // namespace ltp
