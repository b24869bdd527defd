// PTX text as instructions: what nvcc and Triton emit for the kernels of this project, by the manual of the PTX ISA.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

// clang-format off
enum Type : u8 {
    NONE, PRED, B8, B16, B32, B64, U8, U16, U32, U64, S8, S16, S32, S64, F16, BF16, F32, F64, F16X2, BF16X2,
};
// clang-format on

int width_of(Type type);  // bytes; of predicates 1
inline bool is_signed(Type type) { return type >= S8 && type <= S64; }
inline bool is_float(Type type) { return type >= F16 && type <= F64; }

// clang-format off
#define LTP_PTX_OPCODES(X) \
    X(add) X(sub) X(mul) X(mad) X(fma) X(div) X(rem) X(min) X(max) X(neg) X(abs) X(and) X(or) X(xor) X(not) X(shl) X(shr) \
    X(popc) X(clz) X(bfind) X(brev) X(bfe) X(bfi) X(prmt) X(selp) X(setp) X(mov) X(cvt) X(cvta) X(ld) X(st) X(atom) X(red) X(bar) \
    X(shfl) X(vote) X(redux) X(bra) X(ret) X(sqrt) X(rcp) X(ldmatrix) X(fence) X(trap)
enum Opcode : u8 {
#define X(name) OP_##name,
    LTP_PTX_OPCODES(X)
#undef X
};
enum Special : u32 {
    TID_X, TID_Y, TID_Z, NTID_X, NTID_Y, NTID_Z, CTAID_X, CTAID_Y, CTAID_Z, NCTAID_X, NCTAID_Y, NCTAID_Z, LANEID, WARPID,
    LANEMASK_LT, LANEMASK_LE, LANEMASK_GT, LANEMASK_GE, LANEMASK_EQ,
};
enum Compare : u8 { EQ, NE, LT, LE, GT, GE, EQU, NEU, LTU, LEU, GTU, GEU, NUM, NAN_ };
enum AtomicOp : u8 { A_ADD, A_INC, A_OR, A_AND, A_XOR, A_MIN, A_MAX, A_EXCH, A_CAS };
enum Rounding : u8 { R_NONE, R_RN, R_RZ, R_RM, R_RP, R_RNI, R_RZI, R_RMI, R_RPI, R_APPROX };
// clang-format on
enum OperandKind : u8 { ABSENT, REGISTER, IMMEDIATE, SPECIAL, SINK };
enum Space : u8 { GENERIC, GLOBAL, SHARED, PARAM };
enum Part : u8 { WHOLE, LOW, HIGH, WIDE };
enum Mode : u8 { UP, DOWN, BUTTERFLY, INDEX, ALL, ANY, BALLOT, WARP };

struct Operand {
    OperandKind kind = ABSENT;
    u32 reg = 0;  // the number of a register, or a Special
    u64 imm = 0;  // a value; of an address, the offset
};

struct Instruction {
    Opcode op = OP_mov;
    Type type = NONE, from = NONE;
    Part part = WHOLE;
    Rounding rounding = R_NONE;
    Compare compare = EQ;
    AtomicOp atomic = A_ADD;
    Space space = GENERIC;
    Mode mode = UP;
    u8 vector = 1;
    bool constant = false, to = false, ftz = false, sat = false, shift_amount = false;
    // strong: the other threads of `wide` (device) or narrow (block) scope may access the place at the same time
    bool strong = false, wide = true, acquires = false, releases = false, sequential = false;
    s32 predicate = -1;
    bool negated = false;
    std::vector<Operand> operands;  // destinations first
    std::vector<Operand> members;   // of the operand that is a vector
    u8 vector_at = 0;               // which operand that is
    Operand second;                 // destination, after |
    s32 target = -1;
    u32 line = 0;
    std::string text;
    u64 ran = 0;  // by so many threads
};

struct Parameter {
    std::string name;
    u32 offset, size, align;
};

struct Kernel {
    std::string name;
    std::vector<Parameter> params;
    u32 param_bytes = 0;
    std::vector<Instruction> code;
    std::vector<u8> register_bytes;
    u32 static_shared = 0, dynamic_base = 0;
    u32 max_threads = 0, exact_threads = 0;
    u32 dynamic_limit = 49152;  // until the host opts in to more
};

struct Module {
    std::string target;  // sm_90
    std::map<std::string, Kernel> kernels;
};

Module parse_ptx(
    const std::string& text);  // throws std::runtime_error: an instruction it does not know is never guessed
