// The active entries that one thread block works on, and how its threads read and write them.
//
// Everything is a template over a `Threads` policy, so that the same code runs on a GPU and, one thread after the
// other, in the emulation that tests it without one:
//   each(f)                    calls f(thread) on every thread of the block; its writes are visible to other threads
//                              after sync()
//   load(p), store(p, v)       access global memory, 1 to 16 bytes aligned to their size, or a struct of such; the
//                              compiler does not move loads
//   largest_of_warp(v)         replaces a number of each thread by the largest of its warp; synchronises the warp
//   sum(v)                     the sum of a number of each thread, on thread 0; synchronises
//   scan(v)                    replaces a number of each thread by the sum over earlier threads, and returns the sum
//                              over all; synchronises
//   scan_lanes(v, t)           replaces a number of each thread by the sum over earlier lanes of its warp; t: over all
//   last(c, n)                 whether this is the last of n thread blocks to call it; its threads then see all that
//                              the other blocks have written. The counter c is 0 before and after; synchronises
//   from_lane_xor(v, mask, r)  sets r of every thread to v of the lane whose number differs in the bits of mask
//   count(c), add(c, v)        atomically adds 1 in shared memory, or v in global memory and returns the old value
//   set_bits(w, b)             atomically sets bits of a word
//   trap()                     ends the kernel with an error: the table does not fit the memory of the call
//   PerThread<T>               a variable of every thread that lives longer than each()
#pragma once

#include "../common/dtypes.h"
#include "../common/rounding.h"
#include "../common/tile.h"
#include "masked_adamw.h"

namespace ltp {

constexpr int kThreads = 128;
constexpr int kWarp = 32;

struct Index {
    const int32_t* words;       // the tile's bitmap
    const uint16_t* ranks;      // active entries of the tile before each 64-entry group of it
    const uint16_t* positions;  // the tile's list

    LTP_HD const Vector<uint32_t, 2>* groups() const { return reinterpret_cast<const Vector<uint32_t, 2>*>(words); }
};

LTP_HD int count_bits(uint32_t word) {
#if defined(__CUDA_ARCH__)
    return __popc(word);
#else
    return __builtin_popcount(word);
#endif
}

LTP_HD int lowest_bit(uint32_t word) {
#if defined(__CUDA_ARCH__)
    return __ffs(word) - 1;
#else
    return __builtin_ctz(word);
#endif
}

LTP_HD int least(int a, int b) { return a < b ? a : b; }

// base + i, for at most kTile items: the hardware adds a 32-bit offset without an instruction of its own.
template <class T>
LTP_HD T* at(T* base, uint32_t i) {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(base) + i * uint32_t(sizeof(T)));
}

// Whether a tile has `active` entries by its list or directory, and the last of them lies in it. One block per tile
// asks.
template <class Threads>
LTP_HD bool ends_inside(const TileRow& tile, const Index& index, Threads& threads) {
    if (tile.encoding == Encoding::kFull) return true;
    if (tile.encoding == Encoding::kList16) return threads.load(index.positions + tile.active - 1) < tile.length;
    const int last = int((tile.length - 1) / 64), rest = int(tile.length - 64 * last);  // 1 .. 64 entries
    const Vector<uint32_t, 2> group = threads.load(index.groups() + last);
    const int rank = threads.load(index.ranks + last);
    const uint32_t low = group.item[0], high = group.item[1];
    const uint32_t beyond_low = rest < 32 ? low >> rest : 0;
    const uint32_t beyond_high = rest <= 32 ? high : rest < 64 ? high >> (rest - 32) : 0;
    return (beyond_low | beyond_high) == 0 && rank + count_bits(low) + count_bits(high) == tile.active;
}

// Whether an item is one of the tile. Items are made by the library, so that only their own numbers are checked.
LTP_HD bool lies_inside(const WorkItem& item, const TileRow& tile) {
    return lies_in(item.first, 1, tile.active) && item.first % kWorkItem == 0 &&
           (tile.encoding != Encoding::kBitmap ||
            (item.group >= 0 && item.group < item.end_group && item.end_group <= (tile.length + 63) / 64));
}

// The positions in the tile of the active entries of an item, in shared memory.
class Listed {
  public:
    LTP_HD uint16_t& operator[](int i) { return entries_[kSpare + i]; }
    LTP_HD uint16_t operator[](int i) const { return entries_[kSpare + i]; }

    // with room for the groups at both ends, which may also hold entries of other items
    LTP_HD uint16_t* from(int i) { return entries_ + kSpare + least(i < -kSpare ? -kSpare : i, kWorkItem + 32); }

  private:
    static constexpr int kSpare = 64;
    uint16_t entries_[kWorkItem + 2 * kSpare];
};

// Lists up to `count` active entries, from number item.first + `done` on.
template <class Threads>
LTP_HD void list_entries(const TileRow& tile, const Index& index, const WorkItem& item, int done, int count,
                         Listed& listed, Threads& threads) {
    static_assert(kThreads % 2 == 0, "a thread has the lower words of groups, or the upper ones");
    constexpr int kWords = 4, kPositions = 8;  // loads of a thread in flight
    switch (tile.encoding) {
        case Encoding::kFull:
            threads.each([&](int thread) {
                LTP_KEEP_LOOP
                for (int i = done + thread; i < count; i += kThreads) listed[i] = uint16_t(item.first + i);
            });
            break;
        case Encoding::kBitmap:
            threads.each([&](int thread) {
                const int end = 2 * item.end_group;
                LTP_KEEP_LOOP
                for (int word = 2 * item.group + thread; word < end; word += kWords * kThreads) {
                    Vector<uint32_t, 2> group[kWords];
                    int rank[kWords];
                    for (int j = 0; j < kWords; ++j) {
                        const int own = word + j * kThreads < end ? word + j * kThreads : word;
                        group[j] = threads.load(index.groups() + own / 2);
                        rank[j] = threads.load(index.ranks + own / 2);
                    }
                    uint32_t bits[kWords];
                    for (int j = 0; j < kWords; ++j) {
                        const uint32_t low = group[j].item[0], high = group[j].item[1];
                        bits[j] = word + j * kThreads >= end ? 0 : word % 2 == 0 ? low : high;
                        rank[j] += word % 2 == 0 ? 0 : count_bits(low);
                    }
                    for (int j = 0; j < kWords; ++j) {
                        uint16_t* to = listed.from(rank[j] - item.first);
                        for (; bits[j] != 0; bits[j] &= bits[j] - 1) {
                            *to++ = uint16_t(32 * (word + j * kThreads) + lowest_bit(bits[j]));
                        }
                    }
                }
            });
            break;
        case Encoding::kList16:
            threads.each([&](int thread) {
                LTP_KEEP_LOOP
                for (int i = thread; i < count; i += kPositions * kThreads) {
                    // beyond the end, the last positions are copied again, without a branch
                    uint16_t position[kPositions];
                    int own[kPositions];
                    for (int j = 0; j < kPositions; ++j) {
                        own[j] = i + j * kThreads < count ? i + j * kThreads : i;
                        position[j] = threads.load(index.positions + item.first + own[j]);
                    }
                    for (int j = 0; j < kPositions; ++j) listed[own[j]] = position[j];
                }
            });
            break;
    }
    threads.sync();
}

// A batch: active entries of a thread whose loads are in flight together. Arrays with a number for each entry of the
// tile are read by entry, arrays with a number for each active entry by rank. `Numbers` are those of a batch, as
// loaded; [j] is one of them in float32.

// N active entries that are `STRIDE` apart in the list, so that neighbouring threads take neighbouring ones. Beyond the
// end of the list, the first one is read again and nothing is stored.
template <int N, int STRIDE>
struct Scattered {
    static constexpr int kCount = N;
    uint32_t entry[N], rank[N];
    bool there[N];

    template <class T>
    struct Numbers {
        T item[N];
        LTP_HD float operator[](int j) const { return to_float32(item[j]); }
    };

    // place: the place of the first one, inside the list; first: the rank of listed[0]
    LTP_HD Scattered(const Listed& listed, int place, int count, int first) {
        for (int j = 0; j < N; ++j) {
            there[j] = place + j * STRIDE < count;
            const int own = there[j] ? place + j * STRIDE : place;
            entry[j] = listed[own];
            rank[j] = uint32_t(first + own);
        }
    }

    LTP_HD bool has(int j) const { return there[j]; }

    // For each entry visit(j, key ^ folded(index)). start: the index of the tile's first entry
    template <class Threads, class Visit>
    LTP_HD void for_each_index(Threads&, uint32_t key, uint32_t start, Visit visit) const {
        for (int j = 0; j < N; ++j) visit(j, key ^ folded(start + entry[j]));
    }

    template <class T, class Threads>
    LTP_HD void load_by_entry(Threads& threads, const T* from, Numbers<T>& to) const {
        for (int j = 0; j < N; ++j) to.item[j] = threads.load(at(from, entry[j]));
    }

    template <class T, class Threads>
    LTP_HD void load_by_rank(Threads& threads, const T* from, Numbers<T>& to) const {
        for (int j = 0; j < N; ++j) to.item[j] = threads.load(at(from, rank[j]));
    }

    template <class T, class Threads>
    LTP_HD void store_by_entry(Threads& threads, T* to, const T (&from)[N]) const {
        for (int j = 0; j < N; ++j) {
            if (there[j]) threads.store(at(to, entry[j]), from[j]);
        }
    }

    template <class T, class Threads>
    LTP_HD void store_by_rank(Threads& threads, T* to, const T (&from)[N]) const {
        for (int j = 0; j < N; ++j) {
            if (there[j]) threads.store(at(to, rank[j]), from[j]);
        }
    }
};

// N entries of a FULL tile, in vectors of four that are `STRIDE` entries apart. Neighbouring threads take neighbouring
// vectors, so that every request is for whole cache lines, for any size of an entry.
template <int N, int STRIDE>
struct Neighbours {
    static constexpr int kCount = N, kVector = 4;
    uint32_t entry[N];

    template <class T>
    struct Numbers {
        Vector<T, kVector> vector[N / kVector];
        LTP_HD float operator[](int j) const { return to_float32(vector[j / kVector], j % kVector); }
    };

    LTP_HD explicit Neighbours(int first) {
        for (int j = 0; j < N; ++j) entry[j] = uint32_t(first + j / kVector * STRIDE + j % kVector);
    }

    LTP_HD bool has(int) const { return true; }

    // The indices of a vector differ in their last two bits.
    template <class Threads, class Visit>
    LTP_HD void for_each_index(Threads& threads, uint32_t key, uint32_t start, Visit visit) const {
        for (int j = 0; j < N; j += kVector) {
            const uint32_t first = threads.keep(key ^ folded(start + entry[j]));
            for (int i = 0; i < kVector; ++i) visit(j + i, first ^ uint32_t(i));
        }
    }

    template <class T, class Threads>
    LTP_HD void load_by_entry(Threads& threads, const T* from, Numbers<T>& to) const {
        for (int j = 0; j < N; j += kVector) {
            to.vector[j / kVector] = threads.load(reinterpret_cast<const Vector<T, kVector>*>(place(from, j)));
        }
    }

    template <class T, class Threads>
    LTP_HD void load_by_rank(Threads& threads, const T* from, Numbers<T>& to) const {
        load_by_entry(threads, from, to);
    }

    template <class T, class Threads>
    LTP_HD void store_by_entry(Threads& threads, T* to, const T (&from)[N]) const {
        for (int j = 0; j < N; j += kVector) {
            Vector<T, kVector> vector;
            for (int i = 0; i < kVector; ++i) vector.item[i] = from[j + i];
            threads.store(reinterpret_cast<Vector<T, kVector>*>(place(to, j)), vector);
        }
    }

    template <class T, class Threads>
    LTP_HD void store_by_rank(Threads& threads, T* to, const T (&from)[N]) const {
        store_by_entry(threads, to, from);
    }

    template <class T>
    static LTP_HD bool can_read(const T* from) {
        return reinterpret_cast<uintptr_t>(from) % sizeof(Vector<T, kVector>) == 0;
    }

  private:
    // The distance from the first vector is part of the instruction.
    template <class T>
    LTP_HD T* place(T* base, int j) const {
        return at(base, entry[0]) + j / kVector * STRIDE;
    }
};

}  // namespace ltp
