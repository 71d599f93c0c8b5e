// ldmatrix, stmatrix and mma.sync: one warp. Included by ptx.cuh.
#pragma once

// ldmatrix / stmatrix: x1, x2 or x4 matrices of 8 x 8 16-bit elements. Lane 8q + r gives the shared address of row r of
// matrix q (16 bytes, aligned); lane l holds elements (l / 4, 2 (l % 4)) and the next of matrix q in r[q]. `_t`: transposed.
#define PTX_MATRIX(suffix, trans)                                                                                     \
    DEV void ldsm_x1##suffix(u32 (&r)[1], u32 address) {                                                              \
        asm volatile("ldmatrix.sync.aligned.m8n8.x1" trans ".shared.b16 {%0}, [%1];"                                  \
                     : "=r"(r[0])                                                                                     \
                     : "r"(address)                                                                                   \
                     : "memory");                                                                                     \
    }                                                                                                                 \
    DEV void ldsm_x2##suffix(u32 (&r)[2], u32 address) {                                                              \
        asm volatile("ldmatrix.sync.aligned.m8n8.x2" trans ".shared.b16 {%0, %1}, [%2];"                              \
                     : "=r"(r[0]), "=r"(r[1])                                                                         \
                     : "r"(address)                                                                                   \
                     : "memory");                                                                                     \
    }                                                                                                                 \
    DEV void ldsm_x4##suffix(u32 (&r)[4], u32 address) {                                                              \
        asm volatile("ldmatrix.sync.aligned.m8n8.x4" trans ".shared.b16 {%0, %1, %2, %3}, [%4];"                      \
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                                                 \
                     : "r"(address)                                                                                   \
                     : "memory");                                                                                     \
    }                                                                                                                 \
    DEV void stsm_x1##suffix(u32 address, const u32 (&r)[1]) {                                                        \
        asm volatile("stmatrix.sync.aligned.m8n8.x1" trans ".shared.b16 [%0], {%1};" ::"r"(address), "r"(r[0])        \
                     : "memory");                                                                                     \
    }                                                                                                                 \
    DEV void stsm_x2##suffix(u32 address, const u32 (&r)[2]) {                                                        \
        asm volatile("stmatrix.sync.aligned.m8n8.x2" trans ".shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(r[0]),   \
                     "r"(r[1])                                                                                        \
                     : "memory");                                                                                     \
    }                                                                                                                 \
    DEV void stsm_x4##suffix(u32 address, const u32 (&r)[4]) {                                                        \
        asm volatile("stmatrix.sync.aligned.m8n8.x4" trans ".shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),      \
                     "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])                                                       \
                     : "memory");                                                                                     \
    }
PTX_MATRIX(, "")
PTX_MATRIX(_t, ".trans")
#undef PTX_MATRIX

// mma.sync: d (16 x 8) += a (16 x K, row-major) * b (K x 8, column-major). With g = lane / 4 and t = lane % 4:
//   d[0], d[1]: row g, columns 2t and 2t + 1;  d[2], d[3]: row g + 8.
//   a[0]: row g, first half of K; a[1]: row g + 8; a[2], a[3]: second half.  b[0], b[1]: column g, halves of K.
//   A register holds consecutive k: 2 of 16 bits starting at 2t, or 4 of 8 bits starting at 4t.
#define PTX_MMA(name, shape, types, value, constraint)                                                                \
    DEV void name(value (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {                                              \
        asm volatile("mma.sync.aligned." shape ".row.col." types                                                      \
                     " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                               \
                     : "+" constraint(d[0]), "+" constraint(d[1]), "+" constraint(d[2]), "+" constraint(d[3])         \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                             \
    }
PTX_MMA(mma_m16n8k16_bf16, "m16n8k16", "f32.bf16.bf16.f32", float, "f")
PTX_MMA(mma_m16n8k16_f16, "m16n8k16", "f32.f16.f16.f32", float, "f")
PTX_MMA(mma_m16n8k32_e4m3, "m16n8k32", "f32.e4m3.e4m3.f32", float, "f")
PTX_MMA(mma_m16n8k32_s8, "m16n8k32", "s32.s8.s8.s32", int, "r")
#undef PTX_MMA
