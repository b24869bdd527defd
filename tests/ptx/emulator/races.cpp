#include "races.h"

#include <sstream>

#include "arithmetic.h"

namespace {

Synchronisation& synchronisation_of(Thread& t) {
    if (!t.synchronisation) t.synchronisation = std::make_unique<Synchronisation>();
    return *t.synchronisation;
}

// All that the thread has done or seen until now, to be released.
Knowledge knowledge_of(const Block& b, Thread& t) {
    if (t.releases == 0xFFFF) throw Fault("more releases of a thread than the race rule counts");
    t.releases += 1;
    Knowledge all = b.synchronisation.known;
    all.learn(synchronisation_of(t).known);
    Progress& own = all.blocks[b.number];
    own.barriers = std::max(own.barriers, b.barriers);
    raise(own.releases, t.number, t.releases);
    raise(own.warp_barriers, t.number / 32, t.warp_barriers);
    return all;
}

}  // namespace

bool Races::ordered(const Access& a, const Block& b, const Thread& t, u64 place) const {
    if (a.block < first_block_ || a.kind == 0) return true;
    if (a.block != b.number) {
        if (places_.empty()) return false;  // nothing was released
        return over(b.synchronisation.known, a, place) ||
               (t.synchronisation && over(t.synchronisation->known, a, place));
    }
    return a.thread == t.number || a.barriers != b.barriers ||
           (a.thread / 32 == t.number / 32 && a.warp_barriers != t.warp_barriers);
}

bool Races::over(const Knowledge& known, const Access& a, u64 place) const {
    if (known.covers(a)) return true;
    if (a.kind != READ_WRITE) return false;
    const auto seen = known.places.find(place);
    return seen != known.places.end() && seen->second == places_.at(place).accesses;
}

std::optional<Race> Races::race(const Access& a, const Access& own, const Instruction& in, const Block& b,
                                const Thread& t, u64 place, bool shared, bool equal) const {
    // first of all: accesses of earlier launches are ordered, and the instructions they name are another kernel's
    if (ordered(a, b, t, place)) return {};
    const Instruction& other = k_.code[a.instruction];
    const bool same_block = a.block == own.block;
    // two strong accesses of a scope that holds both threads may be at a place at the same time
    if (other.strong && in.strong && (same_block || (other.wide && in.wide))) return {};
    std::ostringstream with;
    with << (shared ? "shared" : "global") << " memory at " << std::hex << place << std::dec << ", against thread "
         << a.thread << (same_block ? " of the same block" : " of another block") << ", line " << other.line << ": "
         << other.text;
    std::string kind = equal && a.kind == WRITE && own.kind == WRITE ? "benign: equal bytes written twice" : "race";
    kind += shared ? " in shared memory" : same_block ? " in global memory" : " between blocks";
    return Race{kind, with.str()};
}

std::optional<Race> Races::access(Cell* cells, size_t n, AccessKind kind, const Instruction& in, const Block& b,
                                  const Thread& t, u64 place, bool shared, const u8* before, const u8* after) {
    Access own;
    own.block = b.number;
    own.barriers = b.barriers;
    own.warp_barriers = t.warp_barriers;
    own.releases = t.releases;
    own.instruction = u16(&in - k_.code.data());
    own.thread = t.number;
    own.kind = kind;
    std::optional<Race> found;
    const auto look = [&](const Access& earlier, bool equal) {
        if (!found && earlier.kind) found = race(earlier, own, in, b, t, place, shared, equal);
    };
    for (size_t i = 0; i < n; ++i) {
        Cell& c = cells[i];
        const bool written = c.write.kind && c.write.block >= first_block_;  // by this launch
        const bool equal = kind == WRITE && before[i] == after[i];
        look(c.write, equal);
        look(c.other_write, equal);
        if (kind == READ) {
            if (in.constant) c.constant = launch_;
            if (!found && in.constant && written) found = Race{"constant load of memory that the launch writes", ""};
            if (ordered(c.read, b, t, place)) {
                c.read = own;
            } else if (c.read.thread != own.thread &&
                       (ordered(c.other_read, b, t, place) || c.other_read.thread / 32 == c.read.thread / 32)) {
                c.other_read = own;
            }
            continue;
        }
        look(c.read, false);
        look(c.other_read, false);
        if (!found && c.constant == launch_) found = Race{"write to memory of constant loads", ""};
        if (kind == WRITE) {
            c.other_write = Access();
        } else if (written && c.write.kind == READ_WRITE && c.write.block != own.block) {
            c.other_write = c.write;
        }
        c.write = own;
    }
    return found;
}

void Races::fence(Block& b, Thread& t, const Instruction& in) {
    if (!in.wide) return;
    Synchronisation& s = synchronisation_of(t);
    if (in.acquires) s.known.learn(s.observed);
    if (in.sequential) {
        s.known.learn(s.observed_in_order);
        s.known.learn(b.synchronisation.observed_in_order);
    }
    if (in.releases) s.released = knowledge_of(b, t);
    if (in.sequential) s.released_in_order.learn(s.released);
}

void Races::release(Block& b, Thread& t, const Instruction& in) {
    if (in.releases && in.wide) synchronisation_of(t).released = knowledge_of(b, t);
}

void Races::synchronise(Block& b, Thread& t, const Instruction& in, u64 place) {
    if (!in.strong || !in.wide) return;
    const bool reads = in.op == OP_atom || in.op == OP_ld, writes = in.op != OP_ld;
    const Synchronisation& block = b.synchronisation;
    const bool has_released = t.synchronisation && !t.synchronisation->released.empty();
    auto found = places_.find(place);
    if (found == places_.end()) {
        if (!writes || (!has_released && block.released_in_order.empty())) return;
        found = places_.emplace(place, Place()).first;
    }
    Place& p = found->second;
    Synchronisation& s = synchronisation_of(t);
    const Place seen = p;
    if (writes) {
        if (in.op == OP_st) p = {{}, {}, p.accesses};  // what an atomic leaves there it hands on
        p.accesses += 1;
        p.released.learn(s.released);
        p.released_in_order.learn(s.released_in_order);
        p.released_in_order.learn(block.released_in_order);
    }
    if (!reads) return;
    Knowledge& learns = in.acquires ? s.known : s.observed;
    learns.learn(seen.released);
    s.observed_in_order.learn(seen.released_in_order);
    learns.places[place] = s.observed_in_order.places[place] = p.accesses;
}

void Races::meet(const std::vector<Thread*>& lanes) {
    Synchronisation all;
    bool any = false;
    for (const Thread* t : lanes) {
        if (!t || !t->synchronisation) continue;
        any = true;
        all.learn(*t->synchronisation);
    }
    for (Thread* t : lanes) {
        if (t && any) synchronisation_of(*t).learn(all);
    }
}
