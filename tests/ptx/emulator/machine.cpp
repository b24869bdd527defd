#include "machine.h"

#include <cxxabi.h>

#include <deque>
#include <memory>
#include <set>
#include <sstream>

#include "arithmetic.h"
#include "memory.h"

Config config;

std::map<std::string, Report>& reports() {
    static std::map<std::string, Report> all;
    return all;
}

std::map<std::string, Statistics>& statistics() {
    static std::map<std::string, Statistics> all;
    return all;
}

namespace {

constexpr u64 kSharedWindow = 0x7000000000000000ull;  // generic addresses of shared memory
constexpr u64 kMostSteps = 40'000'000'000ull;
constexpr u64 kUnwritten = 0xA5A5A5A5A5A5A5A5ull;  // in registers

class Random {
  public:
    explicit Random(u64 seed) : state_(seed * 0x9E3779B97F4A7C15ull + 88172645463325252ull) {}

    u32 below(u32 n) {
        state_ ^= state_ << 13;
        state_ ^= state_ >> 7;
        state_ ^= state_ << 17;
        return u32((state_ >> 11) % n);
    }

  private:
    u64 state_;
};

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

std::string name_of(const Kernel& kernel) {
    int status;
    char* const name = abi::__cxa_demangle(kernel.name.c_str(), nullptr, nullptr, &status);
    std::string found = status == 0 ? name : kernel.name;
    std::free(name);
    const size_t parameters = found.rfind('(');
    if (status == 0 && parameters != 0) found.resize(std::min(parameters, found.size()));
    for (const char* noise : {"void ", "ltp::", "(anonymous namespace)::"}) {
        for (size_t at; (at = found.find(noise)) != std::string::npos;) found.erase(at, std::string(noise).size());
    }
    return found;
}

class Machine {
  public:
    Machine(Kernel& kernel, const u32 (&grid)[3], const u32 (&block)[3], u32 dynamic_shared, std::vector<u8> params)
        : k_(kernel), name_(name_of(kernel)), params_(std::move(params)), random_(config.seed) {
        std::copy(grid, grid + 3, grid_);
        std::copy(block, block + 3, block_);
        n_threads_ = block[0] * block[1] * block[2];
        n_warps_ = (n_threads_ + 31) / 32;
        shared_bytes_ = dynamic_shared ? k_.dynamic_base + dynamic_shared : k_.static_shared;
        number_ = ++launches_;
    }

    void run() {
        std::vector<u32> order = shuffled_blocks();
        first_ = next_block_;
        std::deque<std::unique_ptr<Block>> resident;
        for (size_t next = 0; next < order.size() || !resident.empty();) {
            while (int(resident.size()) < config.resident && next < order.size())
                resident.push_back(start(order[next++]));
            const u32 chosen = random_.below(u32(resident.size()));
            b_ = resident[chosen].get();
            const bool advanced = config.random ? advance_threads() : advance_warps();
            if (b_->done == n_threads_) {
                resident.erase(resident.begin() + chosen);
            } else if (!advanced) {
                for (const Thread& t : b_->threads) {
                    if (t.state != State::kDone) report("deadlock", k_.code[t.at], t, "");
                }
                throw Fault("deadlock in " + name_);
            }
            if (steps_ > kMostSteps) throw Fault("more than the limit of instructions: " + name_);
        }
    }

    // What the launch adds to the counts of its kernel.
    void count(Statistics& s) const {
        s.launches += 1;
        s.blocks += u64(grid_[0]) * grid_[1] * grid_[2];
        s.threads = n_threads_;
        s.shared = std::max(s.shared, shared_bytes_);
        s.warp_instructions += counted_.warp_instructions;
        s.sectors_read += counted_.sectors_read;
        s.sectors_written += counted_.sectors_written;
        s.sectors += counted_.sectors;
        s.requests += counted_.requests;
        s.wavefronts += counted_.wavefronts;
        s.fewest_wavefronts += counted_.fewest_wavefronts;
    }

  private:
    // --- scheduling ---

    std::vector<u32> shuffled_blocks() {
        const u64 all = u64(grid_[0]) * grid_[1] * grid_[2], first = std::min(config.first_block, all);
        std::vector<u32> order;
        for (u64 i = first; i < all && i <= config.last_block; ++i) order.push_back(u32(i));
        for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_.below(u32(i))]);
        return order;
    }

    std::unique_ptr<Block> start(u32 id) {
        auto b = std::make_unique<Block>();
        b->number = next_block_++;
        b->index[0] = id % grid_[0];
        b->index[1] = id / grid_[0] % grid_[1];
        b->index[2] = id / (grid_[0] * grid_[1]);
        const size_t n_registers = k_.register_bytes.size();
        b->registers.assign(size_t(n_warps_) * 32 * n_registers, kUnwritten);
        b->threads.resize(n_threads_);
        for (u32 i = 0; i < n_threads_; ++i) {
            b->threads[i].number = u16(i);
            b->threads[i].registers = &b->registers[size_t(i / 32) * 32 * n_registers + i % 32];
        }
        b->shared.assign(shared_bytes_, 0x5A);
        b->written.assign(shared_bytes_, 0);
        if (config.races) b->cells.resize(shared_bytes_);
        return b;
    }

    bool advance_threads() {
        const u32 from = random_.below(n_threads_);
        for (u32 i = 0; i < n_threads_; ++i) {
            Thread& t = b_->threads[(from + i) % n_threads_];
            if (t.state != State::kRuns) continue;
            for (u32 left = 1 + random_.below(u32(config.burst)); left > 0 && t.state == State::kRuns; --left) {
                Instruction& in = k_.code[t.at];
                ++in.ran;
                ++steps_;
                step(t, in);
            }
            return true;
        }
        return false;
    }

    bool advance_warps() {
        const u32 from = random_.below(n_warps_);
        for (u32 i = 0; i < n_warps_; ++i) {
            if (advance_warp((from + i) % n_warps_, 1 + random_.below(8 * u32(config.burst)))) return true;
        }
        return false;
    }

    // The lanes at the lowest instruction go first.
    bool advance_warp(u32 warp, u32 budget) {
        Thread* const first = &b_->threads[32 * warp];
        Thread* const last = first + std::min(32u, n_threads_ - 32 * warp);
        bool advanced = false;
        for (; budget > 0; --budget) {
            u32 at = ~0u;
            for (Thread* t = first; t < last; ++t) {
                if (t->state == State::kRuns) at = std::min(at, t->at);
            }
            if (at == ~0u) break;
            advanced = true;
            Thread* lanes[32];
            u32 n = 0;
            for (Thread* t = first; t < last; ++t) {
                if (t->state == State::kRuns && t->at == at) lanes[n++] = t;
            }
            Instruction& in = k_.code[at];
            for (u32 i = 0; i < n; ++i) step(*lanes[i], in);
            in.ran += n;
            counted_.warp_instructions += 1;
            steps_ += n;
            if (!requests_.empty()) count_request(in);
        }
        return advanced;
    }

    // --- reports ---

    void report(const std::string& kind, const Instruction& in, const Thread& t, const std::string& more) {
        const std::string place = "line " + std::to_string(in.line) + ": " + in.text;
        Report& r = reports()[kind + " | " + name_ + " | " + place];
        if (r.count++ > 0) return;
        std::ostringstream first;
        first << "block " << b_->index[0] << " thread " << t.number << " of " << name_ << ", " << place << " -- "
              << more;
        r.first = first.str();
    }

    [[noreturn]] void stop(const std::string& kind, const Instruction& in, const Thread& t, const std::string& more) {
        report(kind, in, t, more);
        throw Fault(kind + " in " + name_ + ", line " + std::to_string(in.line) + ": " + in.text + " -- " + more);
    }

    [[noreturn]] void unknown(const Instruction& in) {
        throw Fault("the emulator does not know this form: " + in.text);
    }

    // --- races ---

    bool live(const Access& a) const { return a.kind && a.block >= first_; }

    bool ordered(const Access& a, const Thread& t, u64 place) const {
        if (a.block < first_ || a.kind == 0) return true;
        if (a.block != b_->number) {
            if (places_.empty()) return false;  // nothing was released
            return over(b_->synchronisation.known, a, place) ||
                   (t.synchronisation && over(t.synchronisation->known, a, place));
        }
        return a.thread == t.number || a.barriers != b_->barriers ||
               (a.thread / 32 == t.number / 32 && a.warp_barriers != t.warp_barriers);
    }

    bool over(const Knowledge& known, const Access& a, u64 place) const {
        if (known.covers(a)) return true;
        if (a.kind != READ_WRITE) return false;
        const auto seen = known.places.find(place);
        return seen != known.places.end() && seen->second == places_.at(place).accesses;
    }

    // Whether both may be at a place at the same time: strong ones of a scope that holds both threads.
    bool strong_together(const Access& a, const Instruction& in) const {
        const Instruction& other = k_.code[a.instruction];
        return other.strong && in.strong && (a.block == b_->number || (other.wide && in.wide));
    }

    bool race(const Access& a, AccessKind kind, const Instruction& in, const Thread& t, u64 place, bool shared,
              bool equal) {
        if (ordered(a, t, place) || strong_together(a, in)) return false;
        std::ostringstream more;
        const Instruction& other = k_.code[a.instruction];
        more << (shared ? "shared" : "global") << " memory at " << std::hex << place << std::dec << ", against thread "
             << a.thread << (a.block == b_->number ? " of the same block" : " of another block") << ", line "
             << other.line << ": " << other.text;
        std::string what = equal && a.kind == WRITE && kind == WRITE ? "benign: equal bytes written twice" : "race";
        what += shared ? " in shared memory" : a.block == b_->number ? " in global memory" : " between blocks";
        report(what, in, t, more.str());
        return true;
    }

    // place: the address; before, after: the bytes that a write finds and leaves.
    void look_for_races(Cell* cells, size_t n, AccessKind kind, const Instruction& in, const Thread& t, u64 place,
                        bool shared, const u8* before, const u8* after) {
        Access own;
        own.block = b_->number;
        own.barriers = b_->barriers;
        own.warp_barriers = t.warp_barriers;
        own.releases = t.releases;
        own.instruction = u16(&in - k_.code.data());
        own.thread = t.number;
        own.kind = kind;
        bool told = false;
        for (size_t i = 0; i < n; ++i) {
            Cell& c = cells[i];
            const bool equal = before && before[i] == after[i];
            told = told || race(c.write, kind, in, t, place, shared, equal);
            told = told || race(c.other_write, kind, in, t, place, shared, equal);
            if (kind == READ) {
                if (in.constant) {
                    c.constant = number_;
                    if (!told && live(c.write))
                        told = true, report("constant load of memory that the launch writes", in, t, "");
                }
                if (ordered(c.read, t, place)) {
                    c.read = own;
                } else if (c.read.thread != own.thread &&
                           (ordered(c.other_read, t, place) || c.other_read.thread / 32 == c.read.thread / 32)) {
                    c.other_read = own;
                }
                continue;
            }
            told = told || race(c.read, kind, in, t, place, shared, false);
            told = told || race(c.other_read, kind, in, t, place, shared, false);
            if (!told && c.constant == number_) told = true, report("write to memory of constant loads", in, t, "");
            if (kind == WRITE) {
                c.other_write = Access();
            } else if (live(c.write) && c.write.kind == READ_WRITE && c.write.block != own.block) {
                c.other_write = c.write;
            }
            c.write = own;
        }
    }

    // --- what orders blocks ---

    Synchronisation& synchronisation_of(Thread& t) {
        if (!t.synchronisation) t.synchronisation = std::make_unique<Synchronisation>();
        return *t.synchronisation;
    }

    // All that the thread has done or seen until now.
    Knowledge knowledge_of(Thread& t) {
        if (t.releases == 0xFFFF) throw Fault("more releases of a thread than the race rule counts: " + name_);
        t.releases += 1;
        Knowledge all = b_->synchronisation.known;
        all.learn(synchronisation_of(t).known);
        Progress& own = all.blocks[b_->number];
        own.barriers = std::max(own.barriers, b_->barriers);
        raise(own.releases, t.number, t.releases);
        raise(own.warp_barriers, t.number / 32, t.warp_barriers);
        return all;
    }

    void fence(Thread& t, const Instruction& in) {
        if (!in.wide) return;
        Synchronisation& s = synchronisation_of(t);
        if (in.acquires) s.known.learn(s.observed);
        if (in.sequential) {
            s.known.learn(s.observed_in_order);
            s.known.learn(b_->synchronisation.observed_in_order);
        }
        if (in.releases) s.released = knowledge_of(t);
        if (in.sequential) s.released_in_order.learn(s.released);
    }

    // After a strong access to global memory.
    void synchronise(Thread& t, const Instruction& in, u64 place) {
        const bool reads = in.op == OP_atom || in.op == OP_ld, writes = in.op != OP_ld;
        const Synchronisation& block = b_->synchronisation;
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
            const u64 accesses = p.accesses + 1;
            if (in.op == OP_st) p = Place();
            p.accesses = accesses;
            p.released.learn(s.released);
            p.released_in_order.learn(s.released_in_order);
            p.released_in_order.learn(block.released_in_order);
        }
        if (!reads) return;
        for (Knowledge* learns : {in.acquires ? &s.known : &s.observed, &s.observed_in_order}) {
            learns->learn(learns == &s.observed_in_order ? seen.released_in_order : seen.released);
            learns->places[place] = p.accesses;
        }
    }

    // --- memory ---

    u8* global_memory(u64 address, size_t n, AccessKind kind, const Instruction& in, const Thread& t, const u8* after) {
        if (!buffer_ || !buffer_->holds(address, n)) {
            buffer_ = buffer_of(address, n);
            if (!buffer_) stop("out of bounds", in, t, std::to_string(n) + " bytes " + nearest(address));
        }
        if (address % n) stop("misaligned", in, t, std::to_string(address % 64) + " mod 64");
        u8* const p = reinterpret_cast<u8*>(address);
        if (config.races)
            look_for_races(&cell_of(address), n, kind, in, t, address, false, kind == WRITE ? p : nullptr, after);
        if (!config.random) {
            if (kind != WRITE && sector_read(address) != number_)
                sector_read(address) = number_, ++counted_.sectors_read;
            if (kind != READ && sector_written(address) != number_) {
                sector_written(address) = number_, ++counted_.sectors_written;
            }
        }
        return p;
    }

    static std::string nearest(u64 address) {
        for (u64 back : {0, 1, 16, 64, 255}) {
            if (const Buffer* b = buffer_of(address - back, 1)) {
                return std::to_string(s64(address - b->start) - s64(b->bytes)) +
                       " bytes behind the end of a buffer of " + std::to_string(b->bytes);
            }
        }
        return "in no buffer";
    }

    u8* shared_memory(u64 offset, size_t n, AccessKind kind, const Instruction& in, const Thread& t, const u8* after) {
        if (offset + n > shared_bytes_) stop("out of bounds of shared memory", in, t, std::to_string(offset));
        if (offset % n) stop("misaligned in shared memory", in, t, std::to_string(offset));
        u8* const p = &b_->shared[offset];
        if (kind != WRITE && std::find(&b_->written[offset], &b_->written[offset] + n, 0) != &b_->written[offset] + n) {
            report("uninitialised shared memory", in, t, "offset " + std::to_string(offset));
        }
        if (kind != READ) std::fill_n(&b_->written[offset], n, 1);
        if (config.races)
            look_for_races(&b_->cells[offset], n, kind, in, t, offset, true, kind == WRITE ? p : nullptr, after);
        return p;
    }

    u8* memory(const Instruction& in, u64 address, size_t n, AccessKind kind, const Thread& t,
               const u8* after = nullptr) {
        if (!config.random) requests_.push_back({address, u32(n)});
        if (in.space == SHARED) return shared_memory(address, n, kind, in, t, after);
        if (in.space == GENERIC && address >= kSharedWindow) {
            return shared_memory(address - kSharedWindow, n, kind, in, t, after);
        }
        return global_memory(address, n, kind, in, t, after);
    }

    static bool is_shared(const Instruction& in, u64 address) {
        return in.space == SHARED || (in.space == GENERIC && address >= kSharedWindow);
    }

    void count_request(const Instruction& in) {
        if (!is_shared(in, requests_[0].address)) {
            std::set<u64> sectors;
            for (const Request& r : requests_) {
                for (u64 s = r.address / 32; s <= (r.address + r.bytes - 1) / 32; ++s) sectors.insert(s);
            }
            counted_.sectors += sectors.size();
            counted_.requests += 1;
        } else {
            // so many lanes at a time that each bank could serve one word
            const size_t phase = 32 / std::max(1u, requests_[0].bytes / 4);
            const bool atomic = in.op == OP_atom || in.op == OP_red;
            for (size_t first = 0; first < requests_.size(); first += phase) {
                std::set<u64> seen;
                u32 banks[32] = {}, worst = 0;
                for (size_t i = first; i < std::min(requests_.size(), first + phase); ++i) {
                    const Request& r = requests_[i];
                    for (u64 word = r.address / 4; word <= (r.address + r.bytes - 1) / 4; ++word) {
                        if (atomic || seen.insert(word).second) worst = std::max(worst, ++banks[word % 32]);
                    }
                }
                counted_.wavefronts += worst;
                counted_.fewest_wavefronts += 1;
            }
        }
        requests_.clear();
    }

    // --- operands ---

    u64 special(u32 which, const Thread& t) const {
        const u32 lane = t.number % 32;
        switch (which) {
            case TID_X:
                return t.number % block_[0];
            case TID_Y:
                return t.number / block_[0] % block_[1];
            case TID_Z:
                return t.number / (block_[0] * block_[1]);
            case LANEID:
                return lane;
            case WARPID:
                return t.number / 32;
            case LANEMASK_LT:
                return (1u << lane) - 1;
            case LANEMASK_LE:
                return u32((2ull << lane) - 1);
            case LANEMASK_GT:
                return u32(~((2ull << lane) - 1));
            case LANEMASK_GE:
                return u32(~((1ull << lane) - 1));
            case LANEMASK_EQ:
                return 1u << lane;
            default:
                break;
        }
        if (which >= NCTAID_X) return grid_[which - NCTAID_X];
        if (which >= CTAID_X) return b_->index[which - CTAID_X];
        return block_[which - NTID_X];
    }

    u64 value(const Operand& o, const Thread& t) const {
        if (o.kind == REGISTER) return t.registers[size_t(o.reg) * 32];
        return o.kind == IMMEDIATE ? o.imm : special(o.reg, t);
    }

    void write(const Operand& o, Thread& t, u64 v) const {
        if (o.kind != SINK) t.registers[size_t(o.reg) * 32] = v & mask_of(k_.register_bytes[o.reg]);
    }

    u64 address(const Instruction& in, const Operand& o, const Thread& t) const {
        const u64 a = o.kind == REGISTER ? t.registers[size_t(o.reg) * 32] + o.imm : o.imm;
        return in.space == SHARED ? u32(a) : a;
    }

    // --- one instruction of one thread ---

    void step(Thread& t, Instruction& in) {
        if (in.predicate >= 0 && bool(t.registers[size_t(in.predicate) * 32]) == in.negated) {
            ++t.at;
            return;
        }
        switch (in.op) {
            case OP_bra:
                t.at = u32(in.target);
                return;
            case OP_ret:
                t.state = State::kDone;
                ++b_->done;
                end_of_barrier();
                return;
            case OP_bar:
                if (in.mode == WARP) return arrive(t, u32(value(in.operands[0], t)));
                if (in.operands.size() > 1 || value(in.operands[0], t) != 0) unknown(in);
                t.state = State::kAtBarrier;
                ++b_->waiting;
                end_of_barrier();
                return;
            case OP_shfl:
                return arrive(t, u32(value(in.operands[4], t)));
            case OP_redux:
            case OP_vote:
                return arrive(t, u32(value(in.operands[2], t)));
            case OP_ldmatrix:
                return arrive(t, ~0u);
            case OP_fence:
                fence(t, in);
                break;
            case OP_trap:
                stop("trap", in, t, "");
            case OP_ld:
                load(t, in);
                break;
            case OP_st:
                store(t, in);
                break;
            case OP_atom:
            case OP_red:
                atomic(t, in);
                break;
            case OP_mov:
                move(t, in);
                break;
            case OP_cvta: {
                const u64 a = value(in.operands[1], t), base = in.space == SHARED ? kSharedWindow : 0;
                write(in.operands[0], t, in.to ? a - base : a + base);
                break;
            }
            case OP_setp: {
                const bool holds = compare(in, value(in.operands[1], t), value(in.operands[2], t));
                write(in.operands[0], t, holds);
                if (in.second.kind != ABSENT) write(in.second, t, !holds);
                break;
            }
            case OP_cvt:
                convert(t, in);
                break;
            default: {
                const u64 mask = mask_of(width_of(in.type));
                u64 v[4] = {};
                for (size_t i = 1; i < in.operands.size(); ++i) v[i - 1] = value(in.operands[i], t);
                const u64 a = v[0] & mask, b = v[1] & mask;
                if (in.type == F32) {
                    write(in.operands[0], t, in.op == OP_selp ? (v[2] ? a : b) : float_result(in, t, a, b, v[2]));
                } else if (in.type == F64) {
                    write(in.operands[0], t, in.op == OP_selp ? (v[2] ? a : b) : double_result(in, a, b, v[2]));
                } else {
                    write(in.operands[0], t, integer_result(in, t, a, b, v));
                }
            }
        }
        ++t.at;
    }

    u64 float_result(const Instruction& in, const Thread& t, u64 a, u64 b, u64 c) {
        if (in.op == OP_neg) return a ^ 0x80000000u;
        if (in.op == OP_abs) return a & 0x7FFFFFFFu;
        const float x = f32(a), y = f32(b);
        if (in.op == OP_min) return raw(x != x ? y : y != y ? x : std::fmin(x, y));
        if (in.op == OP_max) return raw(x != x ? y : y != y ? x : std::fmax(x, y));
        if (in.ftz || in.sat || (in.rounding != R_RN && in.rounding != R_NONE)) unknown(in);
        switch (in.op) {
            case OP_add:
                return raw(x + y);
            case OP_sub:
                return raw(x - y);
            case OP_mul:
                return raw(x * y);
            case OP_fma:
                report("fused multiply-add", in, t, "its bits differ from those of the CPU");
                return raw(std::fmaf(x, y, f32(c)));
            default:
                break;
        }
        if (in.rounding != R_RN) unknown(in);
        switch (in.op) {
            case OP_div:
                return raw(x / y);
            case OP_sqrt:
                return raw(std::sqrt(x));
            case OP_rcp:
                return raw(1.0f / x);
            default:
                unknown(in);
        }
    }

    u64 double_result(const Instruction& in, u64 a, u64 b, u64 c) {
        const double x = f64(a), y = f64(b);
        switch (in.op) {
            case OP_neg:
                return a ^ 1ull << 63;
            case OP_abs:
                return a & ~(1ull << 63);
            case OP_add:
                return raw(x + y);
            case OP_sub:
                return raw(x - y);
            case OP_mul:
                return raw(x * y);
            case OP_fma:
                return raw(std::fma(x, y, f64(c)));
            case OP_div:
                return raw(x / y);
            default:
                unknown(in);
        }
    }

    // Of halves, too. v: the operands whole; a, b: the first two as wide as the type.
    u64 integer_result(const Instruction& in, const Thread& t, u64 a, u64 b, const u64* v) {
        const int bytes = width_of(in.type);
        const u64 mask = mask_of(bytes), bits = u64(8 * bytes);
        const bool with_sign = is_signed(in.type);
        const s64 x = extended(a, bytes), y = extended(b, bytes);
        switch (in.op) {
            case OP_add:
                return (a + b) & mask;
            case OP_sub:
                return (a - b) & mask;
            case OP_mul:
            case OP_mad: {
                const auto product = with_sign ? __int128(x) * y : __int128((unsigned __int128)a * b);
                const u64 wide = in.part == WIDE ? mask_of(2 * bytes) : mask;
                const u64 part = u64(in.part == HIGH ? product >> bits : product);
                return (part + (in.op == OP_mad ? v[2] : 0)) & wide;
            }
            case OP_div:
            case OP_rem: {
                if (b == 0) stop("division by zero", in, t, "");
                const bool quotient = in.op == OP_div;
                if (!with_sign) return quotient ? a / b : a % b;
                if (y == -1) return (quotient ? 0 - u64(x) : 0) & mask;
                return u64(quotient ? x / y : x % y) & mask;
            }
            case OP_min:
                return (with_sign ? x < y : a < b) ? a : b;
            case OP_max:
                return (with_sign ? x > y : a > b) ? a : b;
            case OP_neg:
                return in.type >= F16 ? a ^ sign_bits(in.type) : (0 - a) & mask;
            case OP_abs:
                return in.type >= F16 ? a & ~sign_bits(in.type) : u64(x < 0 ? -x : x) & mask;
            case OP_and:
                return a & b;
            case OP_or:
                return a | b;
            case OP_xor:
                return a ^ b;
            case OP_not:
                return in.type == PRED ? !a : ~a & mask;
            case OP_shl:
                return u32(v[1]) >= bits ? 0 : (a << u32(v[1])) & mask;
            case OP_shr:
                if (with_sign) return u64(x >> std::min<u64>(u32(v[1]), 63)) & mask;
                return u32(v[1]) >= bits ? 0 : a >> u32(v[1]);
            case OP_popc:
                return u64(__builtin_popcountll(a));
            case OP_clz:
                return a ? u64(__builtin_clzll(a)) - (64 - bits) : bits;
            case OP_brev: {
                u64 reversed = 0;
                for (u64 i = 0; i < bits; ++i) reversed |= (a >> i & 1) << (bits - 1 - i);
                return reversed;
            }
            case OP_bfe: {
                if (with_sign) unknown(in);
                const u64 from = v[1] & 255, length = v[2] & 255;
                return from >= bits || length == 0 ? 0 : a >> from & (length >= 64 ? ~0ull : (1ull << length) - 1);
            }
            case OP_bfi: {
                const u64 to = v[2] & 255, length = v[3] & 255;
                if (to >= 64) return b;
                const u64 field = (length >= 64 ? ~0ull : (1ull << length) - 1) << to & mask;
                return (b & ~field) | (a << to & field);
            }
            case OP_prmt: {
                const u64 pool = u64(u32(a)) | u64(u32(b)) << 32;
                u64 result = 0;
                for (int i = 0; i < 4; ++i) {
                    const u64 choice = v[2] >> (4 * i) & 15;
                    u64 byte = pool >> (8 * (choice & 7)) & 255;
                    if (choice & 8) byte = byte & 128 ? 255 : 0;
                    result |= byte << (8 * i);
                }
                return result;
            }
            case OP_selp:
                return v[2] ? a : b;
            default:
                unknown(in);
        }
    }

    static u64 sign_bits(Type type) { return type == F16X2 || type == BF16X2 ? 0x80008000u : 0x8000u; }

    bool compare(const Instruction& in, u64 a, u64 b) {
        if (is_float(in.type)) return compare_floats(in.compare, to_double(in.type, a), to_double(in.type, b));
        const int bytes = width_of(in.type);
        a &= mask_of(bytes);
        b &= mask_of(bytes);
        const bool less = is_signed(in.type) ? extended(a, bytes) < extended(b, bytes) : a < b;
        switch (in.compare) {
            case EQ:
                return a == b;
            case NE:
                return a != b;
            case LT:
                return less;
            case LE:
                return less || a == b;
            case GT:
                return !less && a != b;
            case GE:
                return !less;
            default:
                unknown(in);
        }
    }

    static bool compare_floats(Compare compare, double x, double y) {
        const bool nan = x != x || y != y;
        switch (compare) {
            case EQ:
                return x == y;
            case NE:
                return !nan && x != y;
            case LT:
                return x < y;
            case LE:
                return x <= y;
            case GT:
                return x > y;
            case GE:
                return x >= y;
            case EQU:
                return nan || x == y;
            case NEU:
                return nan || x != y;
            case LTU:
                return nan || x < y;
            case LEU:
                return nan || x <= y;
            case GTU:
                return nan || x > y;
            case GEU:
                return nan || x >= y;
            case NUM:
                return !nan;
            default:
                return nan;
        }
    }

    static double to_double(Type type, u64 bits) {
        switch (type) {
            case F64:
                return f64(bits);
            case F32:
                return f32(bits);
            case F16:
                return from_half(u16(bits));
            default:
                return from_bfloat16(u16(bits));
        }
    }

    void move(Thread& t, const Instruction& in) {
        const int n = int(in.members.size()), part = n ? width_of(in.type) / n : 0;
        u64 v = 0;
        if (n == 0) {
            v = value(in.operands[1], t);
            write(in.operands[0], t, in.type == PRED ? v & 1 : v);
        } else if (in.vector_at == 0) {
            v = value(in.operands[1], t);
            for (int i = 0; i < n; ++i) write(in.members[i], t, v >> (8 * part * i) & mask_of(part));
        } else {
            for (int i = 0; i < n; ++i) v |= (value(in.members[i], t) & mask_of(part)) << (8 * part * i);
            write(in.operands[0], t, v);
        }
    }

    void convert(Thread& t, const Instruction& in) {
        const Operand& out = in.operands[0];
        if (in.sat || in.ftz) unknown(in);
        if (in.type == F16X2 || in.type == BF16X2) {
            if (in.rounding != R_RN || in.from != F32) unknown(in);
            const auto rounded = [&](u64 bits) {
                return in.type == F16X2 ? to_half(f32(bits)) : to_bfloat16(f32(bits));
            };
            const u64 upper = rounded(value(in.operands[1], t)), lower = rounded(value(in.operands[2], t));
            return write(out, t, upper << 16 | lower);
        }
        const int bytes = width_of(in.type), from_bytes = width_of(in.from), room = k_.register_bytes[out.reg];
        const u64 v = value(in.operands[1], t) & mask_of(from_bytes);
        const auto widened = [&](u64 bits) {  // a signed result fills its register
            return is_signed(in.type) && room > bytes ? u64(extended(bits, bytes)) : bits & mask_of(bytes);
        };
        if (is_float(in.type)) return write(out, t, to_float(in, v));
        if (!is_float(in.from)) return write(out, t, widened(is_signed(in.from) ? u64(extended(v, from_bytes)) : v));
        double x = to_double(in.from, v);
        switch (in.rounding) {
            case R_RZI:
                x = std::trunc(x);
                break;
            case R_RNI:
                x = std::nearbyint(x);
                break;
            case R_RMI:
                x = std::floor(x);
                break;
            case R_RPI:
                x = std::ceil(x);
                break;
            default:
                unknown(in);
        }
        if (x != x) return write(out, t, 0);
        const double high = std::ldexp(1.0, 8 * bytes - is_signed(in.type));
        if (!is_signed(in.type)) return write(out, t, x >= high ? mask_of(bytes) : x <= 0 ? 0 : u64(x));
        const u64 largest = mask_of(bytes) >> 1;
        write(out, t, widened(x >= high ? largest : x < -high ? ~largest : u64(s64(x))));
    }

    u64 to_float(const Instruction& in, u64 v) {
        const bool to_nearest = in.rounding == R_RN;
        if (!is_float(in.from)) {
            if (!to_nearest || (in.type != F32 && in.type != F64)) unknown(in);
            const s64 x = extended(v, width_of(in.from));
            if (in.type == F32) return is_signed(in.from) ? raw(float(x)) : raw(float(v));
            return is_signed(in.from) ? raw(double(x)) : raw(double(v));
        }
        const double x = to_double(in.from, v);
        if (in.type == F64) return raw(x);
        if (in.type == F32) {
            if (in.from == F64 && !to_nearest) unknown(in);
            return in.from == BF16 ? v << 16 : raw(float(x));  // the bits of a bfloat16, NaN included, stay
        }
        if (!to_nearest || in.from != F32) unknown(in);
        return in.type == F16 ? to_half(float(x)) : to_bfloat16(float(x));
    }

    void load(Thread& t, const Instruction& in) {
        const size_t bytes = size_t(width_of(in.type)), n = bytes * in.vector;
        const u64 a = address(in, in.operands[1], t);
        const u8* p;
        if (in.space == PARAM) {
            if (a + n > params_.size()) stop("out of bounds of the parameters", in, t, std::to_string(a));
            p = &params_[a];
        } else {
            p = memory(in, a, n, READ, t);
            if (in.strong && !is_shared(in, a)) synchronise(t, in, a);
        }
        for (int i = 0; i < in.vector; ++i) {
            u64 v = 0;
            memcpy(&v, p + i * bytes, bytes);
            if (is_signed(in.type)) v = u64(extended(v, int(bytes)));
            write(in.vector > 1 ? in.members[i] : in.operands[0], t, v);
        }
    }

    void store(Thread& t, const Instruction& in) {
        const size_t bytes = size_t(width_of(in.type)), n = bytes * in.vector;
        const u64 a = address(in, in.operands[0], t);
        u8 after[32];
        for (int i = 0; i < in.vector; ++i) {
            const u64 v = value(in.vector > 1 ? in.members[i] : in.operands[1], t);
            memcpy(after + i * bytes, &v, bytes);
        }
        if (in.releases && in.wide) synchronisation_of(t).released = knowledge_of(t);
        memcpy(memory(in, a, n, WRITE, t, after), after, n);
        if (in.strong && in.wide && !is_shared(in, a)) synchronise(t, in, a);
    }

    void atomic(Thread& t, const Instruction& in) {
        const size_t first = in.op == OP_atom ? 1 : 0;  // of the operands
        const int bytes = width_of(in.type);
        const u64 mask = mask_of(bytes), a = address(in, in.operands[first], t);
        if (in.releases && in.wide) synchronisation_of(t).released = knowledge_of(t);
        u8* const p = memory(in, a, size_t(bytes), READ_WRITE, t);
        u64 old = 0;
        memcpy(&old, p, size_t(bytes));
        const u64 given = value(in.operands[first + 1], t) & mask;
        u64 now = given;
        const bool less = is_signed(in.type) ? extended(old, bytes) < extended(given, bytes) : old < given;
        if (is_float(in.type)) unknown(in);
        switch (in.atomic) {
            case A_ADD:
                now = old + given;
                break;
            case A_INC:
                now = old >= given ? 0 : old + 1;
                break;
            case A_OR:
                now = old | given;
                break;
            case A_AND:
                now = old & given;
                break;
            case A_XOR:
                now = old ^ given;
                break;
            case A_MIN:
                now = less ? old : given;
                break;
            case A_MAX:
                now = less ? given : old;
                break;
            case A_EXCH:
                break;
            case A_CAS:
                now = old == given ? value(in.operands[first + 2], t) & mask : old;
                break;
        }
        memcpy(p, &now, size_t(bytes));
        if (in.op == OP_atom) write(in.operands[0], t, old);
        if (in.wide && !is_shared(in, a)) synchronise(t, in, a);
    }

    // --- barriers and collectives ---

    void end_of_barrier() {
        Block& b = *b_;
        if (b.waiting == 0 || b.waiting + b.done < n_threads_) return;
        const Thread* of_warp = nullptr;
        for (const Thread& t : b.threads) {
            if (t.number % 32 == 0) of_warp = nullptr;
            if (t.state != State::kAtBarrier) continue;
            if (b.done && !b.reported_exits) {
                b.reported_exits = true;
                report("barrier after other threads have left", k_.code[t.at], t, std::to_string(b.done));
            }
            if (of_warp && of_warp->at != t.at) {
                report("threads of a warp at different barriers", k_.code[t.at], t, k_.code[of_warp->at].text);
            }
            of_warp = &t;
        }
        for (Thread& t : b.threads) {
            if (t.synchronisation) b.synchronisation.learn(*t.synchronisation);
            if (t.state != State::kAtBarrier) continue;
            t.state = State::kRuns;
            ++t.at;
        }
        b.waiting = 0;
        ++b.barriers;
    }

    // The lanes of a warp that a collective waits for.
    std::vector<Thread*> members_of(const Thread& t, u32 mask) {
        const u32 first = t.number / 32u * 32u;
        std::vector<Thread*> found(32, nullptr);
        for (u32 i = 0; i < 32 && first + i < n_threads_; ++i) {
            Thread& other = b_->threads[first + i];
            if ((mask >> i & 1) && other.state != State::kDone) found[i] = &other;
        }
        return found;
    }

    void arrive(Thread& t, u32 mask) {
        Instruction& in = k_.code[t.at];
        if (!(mask >> t.number % 32 & 1)) stop("a collective leaves the lane out that runs it", in, t, "");
        t.state = State::kAtCollective;
        t.members = mask;
        const std::vector<Thread*> lanes = members_of(t, mask);
        for (const Thread* u : lanes) {
            if (u && (u->state != State::kAtCollective || u->at != t.at || u->members != mask)) return;
        }
        if (in.op == OP_shfl) shuffle(in, lanes);
        if (in.op == OP_redux) reduce(in, lanes);
        if (in.op == OP_vote) vote(in, lanes, mask);
        if (in.op == OP_ldmatrix) load_matrix(in, lanes);
        if (in.op == OP_bar) warp_barrier(lanes);
        for (Thread* u : lanes) {
            if (!u) continue;
            u->state = State::kRuns;
            ++u->at;
        }
    }

    void warp_barrier(const std::vector<Thread*>& lanes) {
        Synchronisation all;
        bool any = false;
        for (const Thread* t : lanes) {
            if (!t || !t->synchronisation) continue;
            any = true;
            all.learn(*t->synchronisation);
        }
        for (Thread* t : lanes) {
            if (!t) continue;
            if (++t->warp_barriers == 0) throw Fault("more barriers of a warp than the race rule counts: " + name_);
            if (any) synchronisation_of(*t).learn(all);
        }
    }

    void shuffle(const Instruction& in, const std::vector<Thread*>& lanes) {
        u64 results[32];
        bool in_range[32];
        for (u32 i = 0; i < 32; ++i) {
            if (!lanes[i]) continue;
            Thread& t = *lanes[i];
            const u32 b = u32(value(in.operands[2], t)) & 31, c = u32(value(in.operands[3], t));
            const u32 segment = c >> 8 & 31, last = (i & segment) | (c & 31 & ~segment);
            s32 from;
            switch (in.mode) {
                case UP:
                    from = s32(i) - s32(b);
                    break;
                case DOWN:
                    from = s32(i + b);
                    break;
                case BUTTERFLY:
                    from = s32(i ^ b);
                    break;
                default:
                    from = s32((i & segment) | (b & ~segment & 31));
                    break;
            }
            in_range[i] = in.mode == UP ? from >= s32(last) : from <= s32(last);
            if (!in_range[i]) from = s32(i);
            results[i] = 0;
            if (from > 31 || !lanes[from]) {
                report("shuffle from a lane that is not there", in, t, std::to_string(from));
            } else {
                results[i] = value(in.operands[1], *lanes[from]) & 0xFFFFFFFFu;
            }
        }
        for (u32 i = 0; i < 32; ++i) {
            if (!lanes[i]) continue;
            write(in.operands[0], *lanes[i], results[i]);
            if (in.second.kind != ABSENT) write(in.second, *lanes[i], in_range[i]);
        }
    }

    void reduce(const Instruction& in, const std::vector<Thread*>& lanes) {
        bool first = true;
        u32 result = 0;
        for (const Thread* t : lanes) {
            if (!t) continue;
            const u32 v = u32(value(in.operands[1], *t)), r = result;
            const bool less = is_signed(in.type) ? s32(v) < s32(r) : v < r;
            switch (in.atomic) {
                case A_ADD:
                    result = r + v;
                    break;
                case A_MAX:
                    result = less ? r : v;
                    break;
                case A_MIN:
                    result = less ? v : r;
                    break;
                case A_OR:
                    result = r | v;
                    break;
                case A_AND:
                    result = r & v;
                    break;
                case A_XOR:
                    result = r ^ v;
                    break;
                default:
                    unknown(in);
            }
            if (first) result = v;
            first = false;
        }
        for (Thread* t : lanes) {
            if (t) write(in.operands[0], *t, result);
        }
    }

    void vote(const Instruction& in, const std::vector<Thread*>& lanes, u32 mask) {
        u32 ballot = 0;
        for (u32 i = 0; i < 32; ++i) ballot |= u32(lanes[i] && value(in.operands[1], *lanes[i]) != 0) << i;
        const u32 result = in.mode == BALLOT ? ballot : in.mode == ANY ? ballot != 0 : ballot == mask;
        for (Thread* t : lanes) {
            if (t) write(in.operands[0], *t, result);
        }
    }

    void load_matrix(const Instruction& in, const std::vector<Thread*>& lanes) {
        u32 words[4][32];
        for (int matrix = 0; matrix < in.vector; ++matrix) {
            for (int row = 0; row < 8; ++row) {
                const Thread* t = lanes[8 * matrix + row];
                if (!t) unknown(in);
                memcpy(&words[matrix][4 * row], memory(in, address(in, in.operands[1], *t), 16, READ, *t), 16);
            }
        }
        for (int i = 0; i < 32; ++i) {
            for (int matrix = 0; matrix < in.vector; ++matrix) {
                const Operand& out = in.vector > 1 ? in.members[matrix] : in.operands[0];
                if (lanes[i]) write(out, *lanes[i], words[matrix][i]);
            }
        }
    }

    struct Request {
        u64 address;
        u32 bytes;
    };

    Kernel& k_;
    const std::string name_;
    const std::vector<u8> params_;
    Random random_;
    u32 grid_[3], block_[3];
    u32 n_threads_, n_warps_, shared_bytes_;
    u32 number_;     // of the launch
    u32 first_ = 0;  // the number of its first block
    Block* b_ = nullptr;
    const Buffer* buffer_ = nullptr;  // of the last access
    std::map<u64, Place> places_;
    std::vector<Request> requests_;  // of the warp's instruction
    u64 steps_ = 0;
    Statistics counted_;

    static u32 launches_, next_block_;
};

u32 Machine::launches_ = 0;
u32 Machine::next_block_ = 1;

void check_launch(const Kernel& k, const u32 (&grid)[3], const u32 (&block)[3], u32 dynamic_shared) {
    const u64 threads = u64(block[0]) * block[1] * block[2];
    const u32 shared = k.static_shared + dynamic_shared;
    std::string wrong;
    if (threads == 0 || threads > 1024) wrong = std::to_string(threads) + " threads in a block";
    if (k.max_threads && threads > k.max_threads) wrong = "more threads than .maxntid";
    if (k.exact_threads && threads != k.exact_threads) wrong = "threads other than .reqntid";
    if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0) wrong = "an empty grid";
    if (grid[0] > 0x7FFFFFFF || grid[1] > 65535 || grid[2] > 65535) wrong = "a grid that is too large";
    if (dynamic_shared > k.dynamic_limit) wrong = std::to_string(dynamic_shared) + " bytes of shared memory, no opt-in";
    if (shared > u32(config.shared)) wrong = std::to_string(shared) + " bytes of shared memory, the device has fewer";
    if (k.static_shared > 49152) wrong = "more than 48 KB of static shared memory";
    if (wrong.empty()) return;
    wrong = "launch with " + wrong + ": " + name_of(k);
    reports()[wrong].count += 1;
    throw Fault(wrong);
}

}  // namespace

void launch(Kernel& kernel, const u32 (&grid)[3], const u32 (&block)[3], u32 dynamic_shared, std::vector<u8> params) {
    check_launch(kernel, grid, block, dynamic_shared);
    const std::lock_guard<std::mutex> guard(memory_lock());
    Machine machine(kernel, grid, block, dynamic_shared, std::move(params));
    machine.run();
    machine.count(statistics()[name_of(kernel)]);
}
