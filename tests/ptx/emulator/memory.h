// Device memory: what posix_memalign gives, which torch's allocator for the CPU calls, is known by its exact bytes.
#pragma once

#include <cstddef>
#include <mutex>

#include "order.h"

struct Buffer {
    uintptr_t start = 0;
    size_t bytes = 0;

    bool holds(uintptr_t address, size_t n) const { return address >= start && address + n <= start + bytes; }
};

// The buffer that holds these bytes, or null.
const Buffer* buffer_of(uintptr_t address, size_t bytes);

// What is known of a byte of a buffer; what of 32 bytes: the launches that last read and wrote there.
Cell& cell_of(uintptr_t address);
u32& sector_read(uintptr_t address);
u32& sector_written(uintptr_t address);

std::mutex& memory_lock();
