// Numeric conversions and packed arithmetic with the hardware's rounding, for device code and for the emulator itself.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#include "dialect.h"

DEV float __uint_as_float(u32 bits) { return __builtin_bit_cast(float, bits); }
DEV u32 __float_as_uint(float value) { return __builtin_bit_cast(u32, value); }
DEV float __int_as_float(int bits) { return __builtin_bit_cast(float, bits); }
DEV int __float_as_int(float value) { return __builtin_bit_cast(int, value); }

// ---- scalar conversions; narrow values live in the low bits of a word ------------------------------------------------
DEV float bf2f(u32 low) { return __uint_as_float(low << 16); }
DEV float h2f(u32 low) { return _cvtsh_ss((unsigned short)low); }

namespace emulator {
inline u32 to_bf16(float value) {
    const u32 bits = __float_as_uint(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;  // NaN is canonical on the device
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline u32 to_f16(float value) { return value != value ? 0x7fff : _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }

// OCP "FP8 formats for deep learning": 4 exponent bits with bias 7, no infinity, 0x7f is NaN, largest 448.
inline float from_e4m3(u32 byte) {
    const u32 exponent = byte >> 3 & 15, mantissa = byte & 7;
    float magnitude;
    if ((byte & 0x7f) == 0x7f)
        magnitude = __uint_as_float(0x7fc00000);
    else if (exponent == 0)
        magnitude = (float)mantissa / 512;
    else
        magnitude = std::ldexp(1.f + (float)mantissa / 8, (int)exponent - 7);
    return byte & 0x80 ? -magnitude : magnitude;
}
// Nearest even, saturating to +-448.
inline u32 to_e4m3(float value) {
    if (value != value) return 0x7f;
    const u32 sign = std::signbit(value) ? 0x80 : 0;
    const float magnitude = std::fabs(value);
    if (magnitude >= 448.f) return sign | 0x7e;
    int exponent = magnitude > 0 ? std::ilogb(magnitude) : -6;
    if (exponent < -6) exponent = -6;                                           // subnormals share the last exponent
    const int steps = (int)std::nearbyint(std::ldexp(magnitude, 3 - exponent));  // 8..16, or 0..8 when subnormal
    return sign | (u32)(steps + (exponent + 6) * 8);                            // 16 steps carry into the exponent
}

// a * b + c rounded to odd: exact enough that one more rounding, to bf16 or f16, is the only one that shows.
// The product is exact in double; what the sum loses is found by Knuth's two-sum and kept in the last bit.
inline float fma_round_to_odd(float a, float b, float c) {
    const double product = (double)a * b, sum = product + c;
    const double part = sum - product, lost = (product - (sum - part)) + (c - part);
    const auto towards_odd = [](auto value, auto& bits, bool overshot) {
        memcpy(&bits, &value, sizeof bits);
        bits = (bits - overshot) | 1;
        memcpy(&value, &bits, sizeof bits);
        return value;
    };
    u64 wide;
    const double odd = std::isfinite(sum) && lost != 0 ? towards_odd(sum, wide, (lost < 0) == (sum > 0)) : sum;
    const float rounded = (float)odd;
    if (!std::isfinite(rounded) || (double)rounded == odd) return rounded;
    u32 narrow;
    return towards_odd(rounded, narrow, std::fabs((double)rounded) > std::fabs(odd));
}

template <class Unpack, class Pack, class Op>
DEV u32 on_halves(u32 a, u32 b, Unpack unpack, Pack pack, Op op) {
    return pack(op(unpack(a & 0xffff), unpack(b & 0xffff))) | pack(op(unpack(a >> 16), unpack(b >> 16))) << 16;
}
// PTX max/min: the other operand when one is NaN, and -0 < +0.
DEV float maximum(float x, float y) { return x == y ? (std::signbit(x) ? y : x) : std::fmax(x, y); }
DEV float minimum(float x, float y) { return x == y ? (std::signbit(x) ? x : y) : std::fmin(x, y); }
}  // namespace emulator

#define EMULATOR_PAIR(name, unpack, pack, expression) \
    inline u32 name(u32 a, u32 b) {                   \
        return emulator::on_halves(a, b, unpack, pack, [](float x, float y) { return expression; }); \
    }
EMULATOR_PAIR(bf2_add, bf2f, emulator::to_bf16, x + y)
EMULATOR_PAIR(bf2_sub, bf2f, emulator::to_bf16, x - y)
EMULATOR_PAIR(bf2_mul, bf2f, emulator::to_bf16, x * y)
EMULATOR_PAIR(bf2_max, bf2f, emulator::to_bf16, emulator::maximum(x, y))
EMULATOR_PAIR(bf2_min, bf2f, emulator::to_bf16, emulator::minimum(x, y))
EMULATOR_PAIR(h2_add, h2f, emulator::to_f16, x + y)
EMULATOR_PAIR(h2_sub, h2f, emulator::to_f16, x - y)
EMULATOR_PAIR(h2_mul, h2f, emulator::to_f16, x * y)
EMULATOR_PAIR(h2_max, h2f, emulator::to_f16, emulator::maximum(x, y))
EMULATOR_PAIR(h2_min, h2f, emulator::to_f16, emulator::minimum(x, y))
#undef EMULATOR_PAIR

inline u32 bf2_fma(u32 a, u32 b, u32 c) {
    auto one = [](u32 x, u32 y, u32 z) { return emulator::to_bf16(emulator::fma_round_to_odd(bf2f(x), bf2f(y), bf2f(z))); };
    return one(a & 0xffff, b & 0xffff, c & 0xffff) | one(a >> 16, b >> 16, c >> 16) << 16;
}
inline u32 h2_fma(u32 a, u32 b, u32 c) {
    auto one = [](u32 x, u32 y, u32 z) { return emulator::to_f16(emulator::fma_round_to_odd(h2f(x), h2f(y), h2f(z))); };
    return one(a & 0xffff, b & 0xffff, c & 0xffff) | one(a >> 16, b >> 16, c >> 16) << 16;
}

inline u32 pack_bf16(float low, float high) { return emulator::to_bf16(low) | emulator::to_bf16(high) << 16; }
inline u32 pack_f16(float low, float high) { return emulator::to_f16(low) | emulator::to_f16(high) << 16; }
inline u32 pack_e4m3(float low, float high) { return emulator::to_e4m3(low) | emulator::to_e4m3(high) << 8; }
inline u32 unpack_e4m3(u32 pair) {
    return pack_f16(emulator::from_e4m3(pair & 0xff), emulator::from_e4m3(pair >> 8 & 0xff));
}

// ---- words ---------------------------------------------------------------------------------------------------------
template <int LUT>
DEV u32 lop3(u32 a, u32 b, u32 c) {
    u32 r = 0;
    for (int i = 0; i < 8; i++)
        if (LUT >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return r;
}
inline u32 prmt(u32 a, u32 b, u32 selector) {
    const u64 bytes = (u64)b << 32 | a;
    u32 r = 0;
    for (int i = 0; i < 4; i++) {
        const u32 nibble = selector >> (4 * i) & 15, byte = (u32)(bytes >> (8 * (nibble & 7))) & 255;
        r |= (nibble & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
    }
    return r;
}
inline u32 __byte_perm(u32 a, u32 b, u32 selector) { return prmt(a, b, selector & 0x7777); }
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 32; i += 8) c += (int)(int8_t)(a >> i) * (int)(int8_t)(b >> i);
    return c;
}
DEV int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
DEV int __ffs(int v) { return __builtin_ffs(v); }
DEV int __popc(unsigned v) { return __builtin_popcount(v); }
inline unsigned __brev(unsigned v) {
    unsigned r = 0;
    for (int i = 0; i < 32; i++) r |= (v >> i & 1) << (31 - i);
    return r;
}
DEV u32 __funnelshift_l(u32 low, u32 high, u32 shift) { return (u32)(((u64)high << 32 | low) << (shift & 31) >> 32); }
DEV u32 __funnelshift_r(u32 low, u32 high, u32 shift) { return (u32)(((u64)high << 32 | low) >> (shift & 31)); }

// ---- float functions -------------------------------------------------------------------------------------------------
DEV float exp2_approx(float x) { return std::exp2(x); }
DEV float rcp_approx(float x) { return 1.f / x; }
DEV float __expf(float x) { return std::exp(x); }
DEV float __logf(float x) { return std::log(x); }
DEV float __log2f(float x) { return std::log2(x); }
DEV float __fdividef(float x, float y) { return x / y; }
DEV float __frcp_rn(float x) { return 1.f / x; }
DEV float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
DEV float __fmul_rn(float x, float y) { return x * y; }
DEV float __fadd_rn(float x, float y) { return x + y; }
DEV float rsqrtf(float x) { return 1.f / std::sqrt(x); }
DEV float __saturatef(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }
// cvt.rni.s32.f32 saturates, and NaN becomes 0.
inline int __float2int_rn(float x) {
    if (x != x) return 0;
    if (x >= 2147483648.f) return INT32_MAX;
    return x <= -2147483648.f ? INT32_MIN : (int)std::nearbyint(x);
}
DEV float __int2float_rn(int x) { return (float)x; }
#define EMULATOR_MIN_MAX(type)                                 \
    DEV type min(type a, type b) { return b < a ? b : a; }     \
    DEV type max(type a, type b) { return a < b ? b : a; }
EMULATOR_MIN_MAX(int)
EMULATOR_MIN_MAX(unsigned)
EMULATOR_MIN_MAX(long long)
EMULATOR_MIN_MAX(unsigned long long)
#undef EMULATOR_MIN_MAX
DEV float min(float a, float b) { return std::fmin(a, b); }
DEV float max(float a, float b) { return std::fmax(a, b); }
