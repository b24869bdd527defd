// What a launch consists of while it runs.
#pragma once

#include <memory>
#include <vector>

#include "order.h"

enum class State : u8 { kRuns, kAtBarrier, kAtCollective, kDone };

struct Thread {
    u32 at = 0;  // the next instruction
    State state = State::kRuns;
    u16 number = 0;
    u16 warp_barriers = 0, releases = 0;
    u32 members = 0;           // of the collective that it waits in
    u64* registers = nullptr;  // number n is at 32 n
    std::unique_ptr<Synchronisation> synchronisation;
};

struct Block {
    u32 number = 0, barriers = 0;
    u32 index[3] = {};
    std::vector<Thread> threads;
    std::vector<u64> registers;
    std::vector<u8> shared, written;
    std::vector<Cell> cells;
    u32 done = 0, waiting = 0;
    bool reported_exits = false;
    Synchronisation synchronisation;  // of all its threads
};
