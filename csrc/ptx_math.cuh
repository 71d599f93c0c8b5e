// Arithmetic on packed registers. Included by ptx.cuh.
#pragma once

// lop3.b32: any boolean function of three words; LUT is its truth table (0xEA: a & b | c, 0x96: a ^ b ^ c).
template <int LUT>
DEV u32 lop3(u32 a, u32 b, u32 c) {
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(r) : "r"(a), "r"(b), "r"(c), "n"(LUT));
    return r;
}
// prmt.b32: byte i of the result is byte (selector >> 4i & 7) of b:a, or its sign if bit 3 of the nibble is set.
DEV u32 prmt(u32 a, u32 b, u32 selector) {
    u32 r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
    return r;
}

// Two bf16 (bf2_) or two f16 (h2_) in a word, each result rounded once to nearest even.
#define PTX_PAIR(name, instruction)                                      \
    DEV u32 name(u32 a, u32 b) {                                         \
        u32 r;                                                           \
        asm(instruction " %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));      \
        return r;                                                        \
    }
PTX_PAIR(bf2_add, "add.rn.bf16x2")
PTX_PAIR(bf2_sub, "sub.rn.bf16x2")
PTX_PAIR(bf2_mul, "mul.rn.bf16x2")
PTX_PAIR(bf2_max, "max.bf16x2")
PTX_PAIR(bf2_min, "min.bf16x2")
PTX_PAIR(h2_add, "add.rn.f16x2")
PTX_PAIR(h2_sub, "sub.rn.f16x2")
PTX_PAIR(h2_mul, "mul.rn.f16x2")
PTX_PAIR(h2_max, "max.f16x2")
PTX_PAIR(h2_min, "min.f16x2")
#undef PTX_PAIR
DEV u32 bf2_fma(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}
DEV u32 h2_fma(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

// float -> packed pairs: the first argument goes to the low half. e4m3: saturates to +-448; two bytes in 16 bits.
DEV u32 pack_bf16(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
DEV u32 pack_f16(float low, float high) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
DEV u32 pack_e4m3(float low, float high) {
    uint16_t r;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
    return r;
}
// Two e4m3 in the low 16 bits -> two f16 (exact).
DEV u32 unpack_e4m3(u32 pair) {
    u32 r;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"((uint16_t)pair));
    return r;
}
// The bf16 / f16 in the low half of a word as float (exact).
DEV float bf2f(u32 low) { return __uint_as_float(low << 16); }
DEV float h2f(u32 low) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"((uint16_t)low));
    return r;
}
// ex2.approx.ftz, rcp.approx.ftz: within 2 ulp of 2^x and 1 ulp of 1/x.
DEV float exp2_approx(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
DEV float rcp_approx(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
// 16 bytes of read-only global memory that will not be read again: past L1.
DEV uint4 ldg_stream(const void* p) {
    uint4 r;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
                 : "l"(__cvta_generic_to_global(p)));
    return r;
}
