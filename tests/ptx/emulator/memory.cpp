#include "memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <new>
#include <vector>

namespace {

constexpr size_t kArena = size_t(64) << 30;  // of addresses: what is not touched takes no memory
constexpr size_t kRedZone = 256;             // before and behind every buffer
constexpr size_t kFilled = size_t(128) << 20;

template <class T>
T* zeros(size_t count) {
    void* p =
        mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) abort();
    return static_cast<T*>(p);
}

struct Memory {
    u8* start;
    size_t size;
};

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// Never destroyed: memory is freed after the destructors of static objects have run.
struct Arena {
    std::mutex lock;
    u8* const base = zeros<u8>(kArena);
    Cell* const cells = zeros<Cell>(kArena);  // old entries are told by their block, so that none is ever cleared
    u32* const read = zeros<u32>(kArena / 32);
    u32* const written = zeros<u32>(kArena / 32);
    size_t used = 0;
    std::map<uintptr_t, Buffer> buffers;
    std::map<uintptr_t, Memory> memory;           // that of each buffer
    std::map<size_t, std::vector<u8*>> returned;  // by size

    bool holds(const void* p) const { return p >= base && p < base + kArena; }
};

Arena& arena() {
    alignas(Arena) static u8 room[sizeof(Arena)];
    static Arena* const made = new (room) Arena();
    return *made;
}

bool started = false;  // `free` is called before the first buffer, and by the C library's own start

}  // namespace

std::mutex& memory_lock() { return arena().lock; }

const Buffer* buffer_of(uintptr_t address, size_t bytes) {
    const std::map<uintptr_t, Buffer>& buffers = arena().buffers;
    auto next = buffers.upper_bound(address);
    if (next == buffers.begin()) return nullptr;
    const Buffer& found = (--next)->second;
    return found.holds(address, bytes) ? &found : nullptr;
}

Cell& cell_of(uintptr_t address) { return arena().cells[address - uintptr_t(arena().base)]; }
u32& sector_read(uintptr_t address) { return arena().read[(address - uintptr_t(arena().base)) / 32]; }
u32& sector_written(uintptr_t address) { return arena().written[(address - uintptr_t(arena().base)) / 32]; }

extern "C" {

int posix_memalign(void** out, size_t align, size_t bytes) {
    Arena& a = arena();
    started = true;
    const std::lock_guard<std::mutex> guard(a.lock);
    const size_t size = round_up(bytes, 512) + 2 * kRedZone + (align > kRedZone ? align : 0);
    u8* block = a.base + a.used;
    if (std::vector<u8*>& returned = a.returned[size]; !returned.empty()) {
        block = returned.back();
        returned.pop_back();
    } else if (a.used + size > kArena) {
        return 12;  // ENOMEM
    } else {
        a.used += round_up(size, 512);
    }
    const uintptr_t start = round_up(uintptr_t(block) + kRedZone, align);
    // What is read before it is written shows; buffers beyond this size are taken for their addresses only.
    if (bytes <= kFilled) memset(reinterpret_cast<void*>(start), 0xA5, bytes);
    a.buffers[start] = {start, bytes};
    a.memory[start] = {block, size};
    *out = reinterpret_cast<void*>(start);
    return 0;
}

void __libc_free(void*);

void free(void* p) {
    if (!started || !arena().holds(p)) return __libc_free(p);
    Arena& a = arena();
    const std::lock_guard<std::mutex> guard(a.lock);
    const uintptr_t start = uintptr_t(p);
    const Memory memory = a.memory.at(start);
    a.returned[memory.size].push_back(memory.start);
    a.buffers.erase(start);
    a.memory.erase(start);
}

}  // extern "C"
