// The race rule: accesses to a byte, one of them a write, that order.h does not order.
#pragma once

#include <optional>
#include <string>

#include "state.h"

struct Race {
    std::string kind, with;
};

class Races {
  public:
    // launch: its number; first_block: the number of its first block
    Races(const Kernel& kernel, u32 launch, u32 first_block) : k_(kernel), launch_(launch), first_block_(first_block) {}

    // Records an access to n bytes, and says which earlier one it races with, if any. place: the address; after: the
    // bytes that a write leaves where `before` are.
    std::optional<Race> access(Cell* cells, size_t n, AccessKind kind, const Instruction& in, const Block& b,
                               const Thread& t, u64 place, bool shared, const u8* before, const u8* after);

    void fence(Block& b, Thread& t, const Instruction& in);

    // Before a store or atomic that may release.
    void release(Block& b, Thread& t, const Instruction& in);

    // After a barrier of these threads of a warp; some may be missing.
    void meet(const std::vector<Thread*>& lanes);

    // After a strong access to global memory.
    void synchronise(Block& b, Thread& t, const Instruction& in, u64 place);

  private:
    bool ordered(const Access& a, const Block& b, const Thread& t, u64 place) const;
    bool over(const Knowledge& known, const Access& a, u64 place) const;
    std::optional<Race> race(const Access& a, const Access& own, const Instruction& in, const Block& b, const Thread& t,
                             u64 place, bool shared, bool equal) const;

    const Kernel& k_;
    const u32 launch_, first_block_;
    std::map<u64, Place> places_;
};
