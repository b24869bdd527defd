#include "arithmetic.h"

#include "numbers.h"

namespace {

u64 sign_bits(Type type) { return type == F16X2 || type == BF16X2 ? 0x80008000u : 0x8000u; }

// sqrt.approx.ftz: one of the values within the error that the manual allows, another for each x, so that results which
// depend on what a device gives here differ from those of the reference.
float approximate_root(float x) {
    if (std::fabs(x) < std::ldexp(1.0f, -126)) return std::copysign(0.0f, x);
    const double exact = std::sqrt(double(x));
    const float nearest = float(exact);
    const int way = int(bits_as<u32>(x) * 2654435761u >> 16) % 3 - 1;
    const float other = bits_as<float>(bits_as<u32>(nearest) + u32(way));
    return std::fabs(other - exact) <= std::ldexp(exact, -23) ? other : nearest;
}

u64 float_result(const Instruction& in, u64 a, u64 b, u64 c) {
    if (in.op == OP_neg) return a ^ 0x80000000u;
    if (in.op == OP_abs) return a & 0x7FFFFFFFu;
    const float x = f32(a), y = f32(b);
    if (in.op == OP_min) return raw(x != x ? y : y != y ? x : std::fmin(x, y));
    if (in.op == OP_max) return raw(x != x ? y : y != y ? x : std::fmax(x, y));
    if (in.op == OP_sqrt && in.rounding == R_APPROX && in.ftz) return raw(approximate_root(x));
    if (in.ftz || in.sat || (in.rounding != R_RN && in.rounding != R_NONE)) unknown(in);
    switch (in.op) {
        case OP_add:
            return raw(x + y);
        case OP_sub:
            return raw(x - y);
        case OP_mul:
            return raw(x * y);
        case OP_fma:
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
        case OP_min:
            return raw(x != x ? y : y != y ? x : std::fmin(x, y));
        case OP_max:
            return raw(x != x ? y : y != y ? x : std::fmax(x, y));
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
        case OP_sqrt:
            return raw(std::sqrt(x));
        case OP_rcp:  // approximately: what the upper half of the bits can say
            return raw(1.0 / x) & (in.rounding == R_APPROX ? ~0xFFFFFFFFull : ~0ull);
        default:
            unknown(in);
    }
}

// Of halves, too. v: the operands whole; a, b: the first two as wide as the type.
u64 integer_result(const Instruction& in, u64 a, u64 b, const u64* v) {
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
            if (b == 0) throw Fault("division by zero: " + in.text);
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
        case OP_bfind: {
            if (with_sign) unknown(in);
            if (a == 0) return 0xFFFFFFFF;
            const u64 zeros = u64(__builtin_clzll(a)) - (64 - bits);
            return in.shift_amount ? zeros : bits - 1 - zeros;
        }
        case OP_brev: {
            u64 reversed = 0;
            for (u64 i = 0; i < bits; ++i) reversed |= (a >> i & 1) << (bits - 1 - i);
            return reversed;
        }
        case OP_bfe: {
            const u64 from = v[1] & 255, length = v[2] & 255;
            if (length == 0) return 0;
            const u64 taken = length >= 64 ? ~0ull : (1ull << length) - 1;
            const u64 field = from >= bits ? 0 : a >> from & taken;
            const u64 last = from + length - 1 < bits ? from + length - 1 : bits - 1;  // with a sign, it goes on
            const u64 beyond = last >= from ? last - from + 1 : 0;
            return with_sign && a >> last & 1 ? field | (beyond >= 64 ? 0 : ~0ull << beyond) : field;
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
        default:
            unknown(in);
    }
}

bool compare_floats(Compare compare, double x, double y) {
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

double to_double(Type type, u64 bits) {
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

// To an integer, by one of the four modes.
double rounded(const Instruction& in, double x) {
    switch (in.rounding) {
        case R_RZI:
            return std::trunc(x);
        case R_RNI:
            return std::nearbyint(x);
        case R_RMI:
            return std::floor(x);
        case R_RPI:
            return std::ceil(x);
        default:
            unknown(in);
    }
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
    if (in.type == in.from) return in.type == F32 ? raw(float(rounded(in, x))) : raw(rounded(in, x));
    if (in.type == F64) return raw(x);
    if (in.type == F32) {
        if (in.from == F64 && !to_nearest) unknown(in);
        return in.from == BF16 ? v << 16 : raw(float(x));  // the bits of a bfloat16, NaN included, stay
    }
    if (!to_nearest || in.from != F32) unknown(in);
    return in.type == F16 ? to_half(float(x)) : to_bfloat16(float(x));
}

}  // namespace

void unknown(const Instruction& in) { throw Fault("the emulator does not know this form: " + in.text); }

u64 result_of(const Instruction& in, const u64* values) {
    const u64 mask = mask_of(width_of(in.type)), a = values[0] & mask, b = values[1] & mask;
    if (in.op == OP_selp) return values[2] ? a : b;
    if (in.type == F32) return float_result(in, a, b, values[2]);
    if (in.type == F64) return double_result(in, a, b, values[2]);
    return integer_result(in, a, b, values);
}

bool holds(const Instruction& in, u64 a, u64 b) {
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

u64 converted(const Instruction& in, u64 a, u64 b) {
    if (in.sat || in.ftz) unknown(in);
    if (in.type == F16X2 || in.type == BF16X2) {
        if (in.rounding != R_RN || in.from != F32) unknown(in);
        return in.type == F16X2 ? u64(to_half(f32(a))) << 16 | to_half(f32(b))
                                : u64(to_bfloat16(f32(a))) << 16 | to_bfloat16(f32(b));
    }
    const int bytes = width_of(in.type), from_bytes = width_of(in.from);
    const bool with_sign = is_signed(in.type);
    a &= mask_of(from_bytes);
    const auto widened = [&](u64 bits) { return with_sign ? u64(extended(bits, bytes)) : bits & mask_of(bytes); };
    if (is_float(in.type)) return to_float(in, a);
    if (!is_float(in.from)) return widened(is_signed(in.from) ? u64(extended(a, from_bytes)) : a);
    const double x = rounded(in, to_double(in.from, a));
    const u64 largest = mask_of(bytes) >> with_sign;
    const double beyond = std::ldexp(1.0, 8 * bytes - with_sign);
    if (x != x) return 0;
    if (x >= beyond) return largest;
    if (x < (with_sign ? -beyond : 0)) return with_sign ? ~largest : 0;
    return with_sign ? u64(s64(x)) : u64(x);
}
