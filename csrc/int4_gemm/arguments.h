// What the launchers of the INT4 GEMM take: plain C, shared by nvcc, the emulator, the torch binding and ctypes.
//
//   y [M, N] = x [M, K] W [K, N],  W in the packed layout of kernels/int4_gemm/layout.py
#pragma once
#include <stdint.h>

enum Int4GemmType { INT4_GEMM_FLOAT16 = 0, INT4_GEMM_BFLOAT16 = 1 };

// Refusals of a launcher, beyond the CUDA error codes (which come back negated; emulated: the number of reports).
enum Int4GemmError {
    INT4_GEMM_BAD_SIZE = -1001,       // a size is negative, zero K or N, or does not fit the packed buffer
    INT4_GEMM_BAD_ALIGNMENT = -1002,  // a pointer is not 16-byte aligned or a row stride is not a multiple of 8
    INT4_GEMM_BAD_TILE = -1003,       // token_tile is not one that this build compiled
    INT4_GEMM_BAD_GROUP = -1004,      // group_rows is not 32, 64 times a power of two, or at least K
    INT4_GEMM_BAD_SPLITS = -1005,     // splits is not in 1..tiles, or workspace or tickets are missing
    INT4_GEMM_BAD_MAP = -1006         // the driver refused a tensor map
};

typedef struct Int4GemmArguments {
    const void* x;       // [M, K], row stride x_stride elements
    const void* words;   // [Np/128, tiles, 256, 4] 32-bit words
    const void* scales;  // [Np/128, groups, 128], type of x
    const void* zeros;   // [Np/128, groups, 128] bytes, or null: zero point 8
    void* y;             // [M, N], row stride y_stride elements, type of x
    float* workspace;    // splits * ceil(M/token_tile) * token_tile * Np floats when splits > 1
    uint32_t* tickets;   // ceil(M/token_tile) * Np/128 zeros when splits > 1; zeros again afterwards
    int64_t x_stride;    // elements, a multiple of 8
    int64_t y_stride;    // elements, a multiple of 8
    int32_t M, N, K;     // K: columns of x; the packed rows beyond it meet zeros
    int32_t tiles;       // Kp/64
    int32_t group_rows;  // packed rows that share a scale
    int32_t type;        // Int4GemmType
    int32_t token_tile;  // rows of x of one CTA
    int32_t splits;      // CTAs that share one output tile's K; the sum has a fixed order
    int32_t dependent;   // 1: programmatic dependent launch, weights are fetched before the grid before has ended
} Int4GemmArguments;

#ifdef __cplusplus
extern "C" {
#endif
// TMA, mbarriers and wgmma (sm_90a): token_tile 64, 128 or 256. `stream` is a cudaStream_t.
int tokenmill_int4_gemm_sm90(const Int4GemmArguments* arguments, void* stream);
// cp.async and mma.sync (sm_80 and later): token_tile 8, 16, 32 or 64.
int tokenmill_int4_gemm_mma_sync(const Int4GemmArguments* arguments, void* stream);
#ifdef __cplusplus
}
#endif
