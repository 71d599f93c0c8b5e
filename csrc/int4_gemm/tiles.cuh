// What both INT4 GEMM kernels share: the shape of a tile, what one costs in shared memory, the form of the weight,
// the host's checks, and the sum over the CTAs that split K.
#pragma once
#include "../int4_unpack.cuh"
#include "arguments.h"

constexpr int TILE_ROWS = 128;       // output features of a CTA
constexpr int TILE_DEPTH = 64;       // input features of a pipeline stage
constexpr int WORD_BYTES = 4096;     // codes of a tile
constexpr int COMPUTE_THREADS = 256; // eight warps, 16 output features each

// The static properties of a packed weight. FINE: two groups of 32 in a tile; else a tile lies in one group.
template <class T_, bool FINE_, bool ZEROS_>
struct WeightForm {
    using T = T_;
    static constexpr bool FINE = FINE_, ZEROS = ZEROS_;
    static constexpr int GROUPS = FINE ? 2 : 1;  // of a tile
    static constexpr int SCALE_BYTES = GROUPS * TILE_ROWS * 2;
    static constexpr int ZERO_BYTES = ZEROS ? GROUPS * TILE_ROWS : 0;
    static constexpr int BYTES = WORD_BYTES + SCALE_BYTES + ZERO_BYTES;  // of a tile in shared memory, in this order
};

// Pointers to a packed weight in global memory, and where the parts of one tile are.
struct PackedWeight {
    const char *words, *scales, *zeros;
    int tiles, groups, group_shift;  // groups: of a row block; the group of a coarse tile is tile >> group_shift

    DEV const char* words_of(int block, int tile) const {
        return words + ((size_t)block * tiles + tile) * WORD_BYTES;
    }
    template <class F>
    DEV size_t first_group(int block, int tile) const {
        return (size_t)block * groups + (F::FINE ? 2 * tile : tile >> group_shift);
    }
    template <class F>
    DEV const char* scales_of(int block, int tile) const {
        return scales + first_group<F>(block, tile) * (TILE_ROWS * 2);
    }
    template <class F>
    DEV const char* zeros_of(int block, int tile) const {
        return zeros + first_group<F>(block, tile) * TILE_ROWS;
    }
};

// Minus the lifted zero points of a thread's two rows, for one group of a tile in shared memory.
template <class F>
DEV RowPair tile_zero_points(const char* weight, int group, int row) {
    if constexpr (F::ZEROS) {
        const uint8_t* zeros = (const uint8_t*)(weight + WORD_BYTES + F::SCALE_BYTES) + group * TILE_ROWS;
        return negated_zero_points<typename F::T>(zeros[row], zeros[row + 8]);
    } else {
        return negated_zero_points<typename F::T>(8, 8);
    }
}

// The 16-bit scales of a thread's two rows, in the low halves.
template <class F>
DEV RowPair tile_scales(const char* weight, int group, int row) {
    const uint16_t* scales = (const uint16_t*)(weight + WORD_BYTES) + group * TILE_ROWS;
    return {scales[row], scales[row + 8]};
}

// Adds up the partial sums of the CTAs that split K. All of them call it; only the last one to arrive returns true, with
// the total, summed in the order of the splits whoever was last: the result is the same bits in every run.
//   partials: this output tile's part of the workspace, [splits][R][256];  ticket: zero before, zero afterwards
//   shared: one word of shared memory;  called by 256 threads, `thread` 0..255, with barrier 1 free
template <int R>
DEV bool sum_splits(float (&sum)[R], float* partials, u32* ticket, u32* shared, int split, int splits, int thread) {
    float* mine = partials + (size_t)split * R * COMPUTE_THREADS + thread;
#pragma unroll
    for (int i = 0; i < R; i++) mine[i * COMPUTE_THREADS] = sum[i];
    // The barrier puts all 256 threads' stores before thread 0's release; the acquire puts the other CTAs' stores
    // before it, and the second barrier hands that on to the threads that read them.
    named_bar_sync(1, COMPUTE_THREADS);
    if (thread == 0) *shared = atom_add_acq_rel(ticket, 1);
    named_bar_sync(1, COMPUTE_THREADS);
    if (*shared != (u32)splits - 1) return false;
    if (thread == 0) st_relaxed(ticket, 0);
#pragma unroll
    for (int i = 0; i < R; i++) sum[i] = 0;
    for (int s = 0; s < splits; s++) {
        const float* theirs = partials + (size_t)s * R * COMPUTE_THREADS + thread;
#pragma unroll
        for (int i = 0; i < R; i++) sum[i] += theirs[i * COMPUTE_THREADS];
    }
    return true;
}

// ---- host -------------------------------------------------------------------------------------------------------
// Checks all that does not depend on the kernel; 0 or an Int4GemmError.
inline int check_arguments(const Int4GemmArguments& a) {
    if (a.M < 0 || a.N < 1 || a.K < 1 || a.tiles < 1) return INT4_GEMM_BAD_SIZE;
    if (a.x_stride < a.K || a.y_stride < a.N) return INT4_GEMM_BAD_SIZE;
    const uintptr_t addresses = (uintptr_t)a.x | (uintptr_t)a.words | (uintptr_t)a.scales | (uintptr_t)a.zeros |
                                (uintptr_t)a.y | (uintptr_t)a.workspace;
    if (addresses % 16 || a.x_stride % 8 || a.y_stride % 8) return INT4_GEMM_BAD_ALIGNMENT;
    const int depth = a.tiles * TILE_DEPTH, group_tiles = a.group_rows / TILE_DEPTH;
    const bool coarse = group_tiles > 0 && a.group_rows % TILE_DEPTH == 0 && (group_tiles & (group_tiles - 1)) == 0;
    if (a.group_rows != 32 && a.group_rows < depth && !coarse) return INT4_GEMM_BAD_GROUP;
    if (a.splits < 1 || a.splits > a.tiles) return INT4_GEMM_BAD_SPLITS;
    if (a.splits > 1 && (!a.workspace || !a.tickets)) return INT4_GEMM_BAD_SPLITS;
    return 0;
}

inline PackedWeight packed_weight(const Int4GemmArguments& a) {
    const int depth = a.tiles * TILE_DEPTH;
    int shift = 0;
    while (((TILE_DEPTH << shift) < a.group_rows) && (TILE_DEPTH << shift) < depth) shift++;
    const int groups = a.group_rows == 32 ? 2 * a.tiles : (a.tiles + (1 << shift) - 1) >> shift;
    return {(const char*)a.words, (const char*)a.scales, (const char*)a.zeros, a.tiles, groups, shift};
}

// Calls run(WeightForm()) with the form of the arguments' weight.
template <class Run>
int with_weight_form(const Int4GemmArguments& a, Run run) {
#ifdef INT4_GEMM_NARROW  // one form only: what the mutation suite compiles
    if (a.type != INT4_GEMM_BFLOAT16 || a.group_rows != 32 || !a.zeros) return INT4_GEMM_BAD_GROUP;
    return run(WeightForm<BFloat16, true, true>());
#else
    const bool fine = a.group_rows == 32;
    if (a.type == INT4_GEMM_BFLOAT16) {
        if (fine) {
            if (a.zeros) return run(WeightForm<BFloat16, true, true>());
            return run(WeightForm<BFloat16, true, false>());
        }
        if (a.zeros) return run(WeightForm<BFloat16, false, true>());
        return run(WeightForm<BFloat16, false, false>());
    }
    if (fine) {
        if (a.zeros) return run(WeightForm<Float16, true, true>());
        return run(WeightForm<Float16, true, false>());
    }
    if (a.zeros) return run(WeightForm<Float16, false, true>());
    return run(WeightForm<Float16, false, false>());
#endif
}
