// What instructions make of numbers. A form that is not known is a Fault.
#pragma once

#include <stdexcept>

#include "ptx.h"

// A launch that cannot go on.
struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

[[noreturn]] void unknown(const Instruction& in);

// Of an arithmetic instruction, from the values of its operands behind the destination.
u64 result_of(const Instruction& in, const u64* values);

// setp
bool holds(const Instruction& in, u64 a, u64 b);

// cvt; b: the second of two; a signed result fills its register
u64 converted(const Instruction& in, u64 a, u64 b);
