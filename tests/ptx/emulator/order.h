// Which accesses are ordered, by the memory model of PTX: what the race rule of the machine goes by.
//
// Inside a block: accesses of one thread; accesses with a bar.sync of the block between them; accesses of one warp with
// a bar.warp.sync between them. Shuffles and votes order nothing.
//
// Between blocks of a launch: what a thread has seen or done before it releases is ordered before what comes after
// another thread acquires it. A release is a fence of device scope followed by an atomic or another strong store of
// device scope by the same thread, or a store of that kind with .release; an acquire is a strong load or an atomic that
// sees it, followed by a fence, or one with .acquire. Between fence and atomic, barriers of the block may hand over to
// another thread if the fences on both sides are sequentially consistent, as membar is: they have one order, which the
// atomic decides. bar.sync hands on inside a block what one of its threads has acquired, and what the block has done to
// the thread that releases it. Nothing else orders two blocks.
#pragma once

#include <algorithm>
#include <map>

#include "ptx.h"

// An access to a byte, with the counts of its thread at that time: enough to say later what it is ordered with.
struct Access {
    u32 block = 0;          // number of the block, of all launches; those of earlier launches are smaller
    u32 barriers = 0;       // of the block
    u16 warp_barriers = 0;  // of the thread
    u16 releases = 0;       // of the thread
    u16 instruction = 0;
    u16 thread : 14, kind : 2;

    Access() : thread(0), kind(0) {}
};

enum AccessKind : u8 { READ = 1, WRITE = 2, READ_WRITE = 3 };

// The last accesses to a byte: of several readers two, of several blocks' atomics the last of two blocks.
struct Cell {
    Access write, other_write, read, other_read;
    u32 constant = 0;  // the launch that read it through ld.global.nc
};

// What is over of a block's accesses: those before a barrier of the block, a release of a thread, a barrier of a warp.
struct Progress {
    u32 barriers = 0;
    std::map<u16, u16> releases, warp_barriers;
};

inline void raise(std::map<u16, u16>& counts, u16 key, u16 count) {
    u16& present = counts[key];
    present = std::max(present, count);
}

// What a thread knows to be over in other blocks.
struct Knowledge {
    std::map<u32, Progress> blocks;
    std::map<u64, u64> places;  // of atomics: how many accesses to the place are over

    bool empty() const { return blocks.empty() && places.empty(); }

    void learn(const Knowledge& other) {
        for (const auto& [block, progress] : other.blocks) {
            Progress& own = blocks[block];
            own.barriers = std::max(own.barriers, progress.barriers);
            for (const auto& [thread, count] : progress.releases) raise(own.releases, thread, count);
            for (const auto& [warp, count] : progress.warp_barriers) raise(own.warp_barriers, warp, count);
        }
        for (const auto& [place, count] : other.places) places[place] = std::max(places[place], count);
    }

    bool covers(const Access& a) const {
        const auto block = blocks.find(a.block);
        if (block == blocks.end()) return false;
        const Progress& p = block->second;
        if (a.barriers < p.barriers) return true;
        const auto thread = p.releases.find(a.thread);
        if (thread != p.releases.end() && a.releases < thread->second) return true;
        const auto warp = p.warp_barriers.find(a.thread / 32);
        return warp != p.warp_barriers.end() && a.warp_barriers < warp->second;
    }
};

// What a thread has from fences and strong accesses, a block from those of all its threads before the last barrier.
struct Synchronisation {
    Knowledge known;
    Knowledge observed;  // by strong loads and atomics; the thread's next fence makes it known
    Knowledge released;  // by the last fence; the thread's next strong store publishes it
    // the same by fences that are sequentially consistent, across barriers
    Knowledge observed_in_order, released_in_order;

    void learn(const Synchronisation& other) {
        known.learn(other.known);
        observed_in_order.learn(other.observed_in_order);
        released_in_order.learn(other.released_in_order);
    }
};

// A place in memory that threads release to.
struct Place {
    Knowledge released, released_in_order;
    u64 accesses = 0;
};
