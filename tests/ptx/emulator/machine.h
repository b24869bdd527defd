// Executes a launch thread by thread, and checks every access to memory: bounds, alignment, shared memory that nothing
// has written, races (order.h), and loads through ld.global.nc of what the launch writes. Also lanes that a collective
// leaves out, threads of a warp at different barriers, deadlocks, and traps.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "arithmetic.h"

struct Config {
    u64 seed = 1;
    int random = 0;    // 0: the lanes of a warp in lockstep, which counts; 1: threads at random, in bursts
    int burst = 64;    // instructions of one, at most
    int resident = 3;  // blocks that run at a time
    int races = 1;     // 0: not looked for
    int sm = 90;       // whose PTX serves CUDA
    int processors = 132;
    int shared = 232448;                      // bytes of shared memory that a block can opt in to
    u64 first_block = 0, last_block = ~0ull;  // of a launch, that run
};

// A kind of report and the instruction -> how often, and the first of them in full.
struct Report {
    u64 count = 0;
    std::string first;
};

struct Statistics {
    u64 launches = 0, blocks = 0, threads = 0, warp_instructions = 0, sectors_read = 0, sectors_written = 0;
    u64 sectors = 0, requests = 0, wavefronts = 0, fewest_wavefronts = 0;
    u32 shared = 0;
};

extern Config config;
std::map<std::string, Report>& reports();
std::map<std::string, Statistics>& statistics();  // by the kernel's name

// Throws a Fault for a launch that cannot go on; what it found is reported, too.
void launch(Kernel& kernel, const u32 (&grid)[3], const u32 (&block)[3], u32 dynamic_shared, std::vector<u8> params);
