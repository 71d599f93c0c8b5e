// INT4 codes to tensor-core fragments, for both 16-bit activation types.
//
// A word of the packed layout (kernels/int4_gemm/layout.py) holds the A fragment of one k16 step: nibbles r and r + 4
// are the two halves of fragment register r. A code c becomes a float without a conversion: OR it into the mantissa of
// 2^m where the spacing of numbers is 1 (128 for bf16, 1024 for f16), which reads as 2^m + c, then subtract 2^m + zero.
// Both steps are exact. Source of the trick: Kim et al., "Who Says Elephants Can't Run", 2022.
#pragma once
#include "ptx.cuh"

struct BFloat16 {
    static constexpr u32 MAGIC = 0x43004300u;  // 128 + code
    static constexpr u32 ONE = 0x3f803f80u;
    // fma with 1, because sm_80 and sm_89 have no bf16 add
    static DEV u32 subtract(u32 a, u32 negated) { return bf2_fma(a, ONE, negated); }
    static DEV u32 multiply(u32 a, u32 b) { return bf2_mul(a, b); }  // sm_90 and later
    static DEV u32 pack(float low, float high) { return pack_bf16(low, high); }
    static DEV float widen(u32 low) { return bf2f(low); }
    static DEV void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { mma_m16n8k16_bf16(d, a, b); }
    template <int N>
    static DEV void wgmma(float (&d)[N / 2], const u32 (&a)[4], u64 b) {
        wgmma_rs_bf16<N>(d, a, b, 1);
    }
};

struct Float16 {
    static constexpr u32 MAGIC = 0x64006400u;  // 1024 + code
    static constexpr u32 ONE = 0x3c003c00u;
    static DEV u32 subtract(u32 a, u32 negated) { return h2_fma(a, ONE, negated); }
    static DEV u32 multiply(u32 a, u32 b) { return h2_mul(a, b); }
    static DEV u32 pack(float low, float high) { return pack_f16(low, high); }
    static DEV float widen(u32 low) { return h2f(low); }
    static DEV void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { mma_m16n8k16_f16(d, a, b); }
    template <int N>
    static DEV void wgmma(float (&d)[N / 2], const u32 (&a)[4], u64 b) {
        wgmma_rs_f16<N>(d, a, b, 1);
    }
};

// The two output features whose fragment rows a thread holds (lane / 4 and lane / 4 + 8).
struct RowPair {
    u32 first, second;
};

// Both halves of a word hold the same 16 bits.
DEV u32 twice(u32 low) { return low * 0x10001u; }

// -(2^m + zero point) in both halves, for the two rows of a thread.
template <class T>
DEV RowPair negated_zero_points(u32 first, u32 second) {
    return {twice(first) | T::MAGIC | 0x80008000u, twice(second) | T::MAGIC | 0x80008000u};
}

// code - zero, exactly: four fragment registers of one k16 step; registers 0 and 2 belong to the first row.
template <class T>
DEV void unpack_fragment(u32 (&fragment)[4], u32 word, RowPair negated_zero) {
#pragma unroll
    for (int r = 0; r < 4; r++) {
        const u32 lifted = lop3<0xEA>(word >> (4 * r), 0x000f000fu, T::MAGIC);  // (word & mask) | magic
        fragment[r] = T::subtract(lifted, r & 1 ? negated_zero.second : negated_zero.first);
    }
}

// (code - zero) * scale, rounded once to T; scales are in both halves of their words.
template <class T>
DEV void unpack_fragment(u32 (&fragment)[4], u32 word, RowPair negated_zero, RowPair scale) {
    unpack_fragment<T>(fragment, word, negated_zero);
#pragma unroll
    for (int r = 0; r < 4; r++) fragment[r] = T::multiply(fragment[r], r & 1 ? scale.second : scale.first);
}
