// The walk of one thread block over the active entries of its share of a tile.
//
// Everything is written over a `Threads` policy, so that the same code runs on a GPU and, thread by thread, in the
// emulation that tests it without one:
//   each(f)                    calls f(thread) on every thread of the block; what the threads did before is not visible
//                              to others until sync()
//   largest(v), sum(v)         of a number per thread, on all threads and on thread 0; synchronise
//   scan(v)                    replaces a number per thread by the sum of those of earlier threads, returns that of
//                              all; synchronises
//   scan_lanes(v, t)           replaces a number per thread by the sum of those of earlier lanes of its warp, t: of all
//   last(c, n)                 whether this is the last of n thread blocks to come here; all its threads see what the
//                              others have written before. c: 0 before and after; synchronises
//   from_lane_xor(v, mask, r)  r of every thread: v of the lane of its warp whose number differs in the bits of mask
//   count(c), add(c, v)        atomically adds 1 in shared, and v in global memory; the latter returns what was there
//   set_bits(w, b)             atomically sets bits of a word
//   trap()                     ends the kernel with an error: memory is not what the caller said
//   PerThread<T>               a variable of every thread that outlives each()
#pragma once

#include "../common/tile.h"

namespace ltp {

constexpr int kThreads = 128;
constexpr int kBatch = 4;             // entries that a thread has in flight
constexpr int kSubTile = 4096;        // entries of a bitmap whose positions are listed in shared memory at a time
constexpr int kStateBlockSize = 256;  // active entries of a block of 8-bit moments: two a thread

struct Index {
    const int32_t* words;       // the tile's bitmap
    const uint16_t* ranks;      // active entries of the tile before each 64-entry group of it
    const uint16_t* positions;  // the tile's list
};

LTP_HD int count_bits(uint32_t word) {
#if defined(__CUDA_ARCH__)
    return __popc(word);
#else
    return __builtin_popcount(word);
#endif
}

// Active entries of a bitmap tile before its 32-bit word number `word`.
LTP_HD int rank_before(const Index& index, int word) {
    const int rank = index.ranks[word / 2];
    return word % 2 == 0 ? rank : rank + count_bits(uint32_t(index.words[word - 1]));
}

// Where in a bitmap tile of so many 64-entry groups its active entry number `rank` stands.
LTP_HD int entry_of_rank(const Index& index, int groups, int rank) {
    int group = 0;  // the last one with at most `rank` active entries before it
    for (int step = 512; step > 0; step /= 2) {
        if (group + step < groups && index.ranks[group + step] <= rank) group += step;
    }
    int left = rank - index.ranks[group];
    int word = 2 * group;
    const int lower = count_bits(uint32_t(index.words[word]));
    if (left >= lower) {
        left -= lower;
        ++word;
    }
    uint32_t bits = uint32_t(index.words[word]);
    int bit = 0;
    for (int width = 16; width > 0; width /= 2) {
        const int below = count_bits(bits & ((1u << width) - 1));
        if (left >= below) {
            left -= below;
            bit += width;
            bits >>= width;
        }
    }
    return 32 * word + bit;
}

// Whether a tile has `active` entries by its list or rank directory, the last of them in it; once per tile, by its end.
LTP_HD bool ends_inside(const TileRow& tile, const Index& index) {
    if (tile.encoding == Encoding::kFull) return true;
    if (tile.encoding == Encoding::kList16) return index.positions[tile.active - 1] < tile.length;
    const int last = 2 * int((tile.length - 1) / 64), rest = int(tile.length - 32 * last);  // 1 .. 64 entries
    const uint32_t low = uint32_t(index.words[last]), high = uint32_t(index.words[last + 1]);
    const uint32_t beyond_low = rest < 32 ? low >> rest : 0;
    const uint32_t beyond_high = rest <= 32 ? high : rest < 64 ? high >> (rest - 32) : 0;
    return (beyond_low | beyond_high) == 0 && index.ranks[last / 2] + count_bits(low) + count_bits(high) == tile.active;
}

// Up to kBatch active entries of one thread: where they stand in the tile, and their number among its active entries.
// Numbers below 0 are no entries. `consecutive`: all there, side by side from a multiple of 4 on.
struct Batch {
    int entry[kBatch], rank[kBatch];
    bool consecutive;
};

// Calls visit(thread, batch) for the active entries of share `part` of `parts` of a tile.
template <class Threads, class Visit>
LTP_HD void for_each_batch(const TileRow& tile, const Index& index, int part, int parts, uint16_t* listed,
                           Threads& threads, Visit visit) {
    const int active = int(tile.active), length = int(tile.length);
    if (tile.encoding == Encoding::kBitmap) {
        const int words = 2 * ((length + 63) / 64);
        for (int first = part * kSubTile; first < length; first += parts * kSubTile) {
            const int first_word = first / 32, end_word = first_word + kSubTile / 32;
            const int base = rank_before(index, first_word);
            const int end = end_word < words ? rank_before(index, end_word) : active;
            threads.each([&](int thread) {
                const int word = first_word + thread;
                if (word >= words) return;
                int at = rank_before(index, word) - base;
                for (uint32_t bits = uint32_t(index.words[word]); bits != 0; bits &= bits - 1) {
                    listed[at++] = uint16_t(32 * word + count_bits((bits & (0u - bits)) - 1));
                }
            });
            threads.sync();
            threads.each([&](int thread) {
                for (int i = base + thread; i < end; i += kBatch * kThreads) {
                    Batch batch;
                    batch.consecutive = false;
                    for (int j = 0; j < kBatch; ++j) {
                        const int rank = i + j * kThreads;
                        batch.rank[j] = rank < end ? rank : -1;
                        batch.entry[j] = rank < end ? listed[rank - base] : 0;
                    }
                    visit(thread, batch);
                }
            });
            threads.sync();
        }
        return;
    }
    const bool is_list = tile.encoding == Encoding::kList16;
    threads.each([&](int thread) {
        for (int first = part * kBatch * kThreads; first < active; first += parts * kBatch * kThreads) {
            Batch batch;
            batch.consecutive = !is_list && first + kBatch * kThreads <= active;
            for (int j = 0; j < kBatch; ++j) {
                const int rank = batch.consecutive ? first + kBatch * thread + j : first + j * kThreads + thread;
                batch.rank[j] = rank < active ? rank : -1;
                batch.entry[j] = rank >= active ? 0 : is_list ? index.positions[rank] : rank;
            }
            visit(thread, batch);
        }
    });
}

// Calls visit(first) for the blocks of 256 active entries of share `part` of `parts`, with entry_of(rank) to find them.
template <class Visit>
LTP_HD void for_each_state_block(const TileRow& tile, int part, int parts, Visit visit) {
    for (int first = part * kStateBlockSize; first < tile.active; first += parts * kStateBlockSize) visit(first);
}

LTP_HD int entry_of(const TileRow& tile, const Index& index, int rank) {
    if (tile.encoding == Encoding::kFull) return rank;
    if (tile.encoding == Encoding::kList16) return index.positions[rank];
    return entry_of_rank(index, int((tile.length + 63) / 64), rank);
}

}  // namespace ltp
