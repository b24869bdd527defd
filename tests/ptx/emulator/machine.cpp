#include "machine.h"

#include <cxxabi.h>

#include <deque>
#include <memory>
#include <set>
#include <sstream>

#include "memory.h"
#include "numbers.h"
#include "races.h"

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
        races_ = std::make_unique<Races>(k_, number_, next_block_);
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

    // --- memory ---

    void look_for_races(Cell* cells, size_t n, AccessKind kind, const Instruction& in, const Thread& t, u64 place,
                        bool shared, const u8* before, const u8* after) {
        const auto race = races_->access(cells, n, kind, in, *b_, t, place, shared, before, after);
        if (race) report(race->kind, in, t, race->with);
    }

    u8* global_memory(u64 address, size_t n, AccessKind kind, const Instruction& in, const Thread& t, const u8* after) {
        if (!buffer_ || !buffer_->holds(address, n)) {
            buffer_ = buffer_of(address, n);
            if (!buffer_) stop("out of bounds", in, t, std::to_string(n) + " bytes " + nearest(address));
        }
        if (address % n) stop("misaligned", in, t, std::to_string(address % 64) + " mod 64");
        u8* const p = reinterpret_cast<u8*>(address);
        if (config.races) look_for_races(&cell_of(address), n, kind, in, t, address, false, p, after);
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
        if (config.races) look_for_races(&b_->cells[offset], n, kind, in, t, offset, true, p, after);
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
                races_->fence(*b_, t, in);
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
                const bool result = holds(in, value(in.operands[1], t), value(in.operands[2], t));
                write(in.operands[0], t, result);
                if (in.second.kind != ABSENT) write(in.second, t, !result);
                break;
            }
            default: {
                u64 values[4] = {};
                for (size_t i = 1; i < in.operands.size(); ++i) values[i - 1] = value(in.operands[i], t);
                if (in.op == OP_fma && in.type == F32)
                    report("fused multiply-add", in, t, "its bits are not those of the CPU");
                const bool divides = (in.op == OP_div || in.op == OP_rem) && !is_float(in.type);
                if (divides && (values[1] & mask_of(width_of(in.type))) == 0) stop("division by zero", in, t, "");
                write(in.operands[0], t, in.op == OP_cvt ? converted(in, values[0], values[1]) : result_of(in, values));
            }
        }
        ++t.at;
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

    void load(Thread& t, const Instruction& in) {
        const size_t bytes = size_t(width_of(in.type)), n = bytes * in.vector;
        const u64 a = address(in, in.operands[1], t);
        const u8* p;
        if (in.space == PARAM) {
            if (a + n > params_.size()) stop("out of bounds of the parameters", in, t, std::to_string(a));
            p = &params_[a];
        } else {
            p = memory(in, a, n, READ, t);
            if (!is_shared(in, a)) races_->synchronise(*b_, t, in, a);
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
        races_->release(*b_, t, in);
        memcpy(memory(in, a, n, WRITE, t, after), after, n);
        if (!is_shared(in, a)) races_->synchronise(*b_, t, in, a);
    }

    void atomic(Thread& t, const Instruction& in) {
        const size_t first = in.op == OP_atom ? 1 : 0;  // of the operands
        const int bytes = width_of(in.type);
        const u64 mask = mask_of(bytes), a = address(in, in.operands[first], t);
        races_->release(*b_, t, in);
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
        if (!is_shared(in, a)) races_->synchronise(*b_, t, in, a);
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
        for (Thread* t : lanes) {
            if (t && ++t->warp_barriers == 0)
                throw Fault("more barriers of a warp than the race rule counts: " + name_);
        }
        races_->meet(lanes);
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
    u32 number_;  // of the launch
    std::unique_ptr<Races> races_;
    Block* b_ = nullptr;
    const Buffer* buffer_ = nullptr;  // of the last access
    std::vector<Request> requests_;   // of the warp's instruction
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
