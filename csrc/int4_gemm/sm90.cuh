// INT4 GEMM for Hopper: TMA and mbarriers feed two consumer warpgroups, wgmma takes the weights from registers.
//
// A CTA computes y^T for 128 output features x TOKENS tokens. Each warpgroup owns 64 of the features: it turns packed
// codes into its own wgmma A fragments, while B is the tokens' tile in shared memory as TMA laid it (128-byte swizzle).
// Dequantising stage i runs under the matrix product of stage i-1: fragments alternate between two register sets, and a
// stage is given back when the wgmmas *after* it have been issued.
//
//   grid (Np/128, ceil(M/TOKENS), splits), 384 threads: warpgroup 0 produces, 1 and 2 consume
#pragma once
#include "tiles.cuh"
#include "../launch.cuh"

template <class F, int TOKENS, int STAGES>
struct Sm90Smem {
    static constexpr int TOKEN_BYTES = TOKENS * TILE_DEPTH * 2;
    static constexpr int STAGE_BYTES = TOKEN_BYTES + F::BYTES;            // what arrives in one phase
    static constexpr int STRIDE = (STAGE_BYTES + 1023) / 1024 * 1024;     // swizzle atoms start at multiples of 1024
    static constexpr int BARRIERS = STAGES * STRIDE;                      // full and empty barriers, then one word
    static constexpr int BYTES = 1024 + BARRIERS + 16 * STAGES + 16;      // the first term: aligning the start
};

template <class F, int TOKENS, int STAGES>
__global__ void __launch_bounds__(384, 1)
    int4_gemm_sm90(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap y_map,
                   const __grid_constant__ PackedWeight weight, float* workspace, u32* tickets, int tiles_per_split) {
    using T = typename F::T;
    using Smem = Sm90Smem<F, TOKENS, STAGES>;
    DYN_SMEM(unaligned);
    char* const smem = unaligned + ((1024 - (smem_u32(unaligned) & 1023)) & 1023);
    const u32 base = smem_u32(smem), full = base + Smem::BARRIERS, empty = full + 8 * STAGES;
    const int warpgroup = threadIdx.x / 128, block = blockIdx.x, first_token = blockIdx.y * TOKENS;
    const int first_tile = blockIdx.z * tiles_per_split;
    const int tiles = min(tiles_per_split, weight.tiles - first_tile);

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            mbar_init(full + 8 * s, 1);   // the producer's arrival; the copies' bytes do the rest
            mbar_init(empty + 8 * s, 8);  // one lane of each consumer warp
        }
        fence_mbar_init();
    }
    __syncthreads();

    if (warpgroup == 0) {
        setmaxnreg_dec<40>();
        if (threadIdx.x / 32 == 0 && elect_one()) {
            tma_prefetch(&x_map);
            // Weights do not depend on the grid before this one: with a dependent launch they arrive while it ends.
            auto load_weight = [&](int i) {
                const int s = i % STAGES, tile = first_tile + i;
                const u32 to = base + s * Smem::STRIDE + Smem::TOKEN_BYTES, bar = full + 8 * s;
                mbar_arrive_tx(bar, Smem::STAGE_BYTES);
                bulk_load(to, weight.words_of(block, tile), WORD_BYTES, bar);
                bulk_load(to + WORD_BYTES, weight.scales_of<F>(block, tile), F::SCALE_BYTES, bar);
                if constexpr (F::ZEROS)
                    bulk_load(to + WORD_BYTES + F::SCALE_BYTES, weight.zeros_of<F>(block, tile), F::ZERO_BYTES, bar);
            };
            auto load_tokens = [&](int i) {
                const int s = i % STAGES;
                tma_load_2d(base + s * Smem::STRIDE, &x_map, (first_tile + i) * TILE_DEPTH, first_token, full + 8 * s);
            };
            const int ahead = min(tiles, STAGES);
            for (int i = 0; i < ahead; i++) load_weight(i);
            griddep_wait();
            for (int i = 0; i < ahead; i++) load_tokens(i);
            for (int i = STAGES; i < tiles; i++) {
                mbar_wait(empty + 8 * (i % STAGES), (i / STAGES & 1) ^ 1);
                load_weight(i);
                load_tokens(i);
            }
        }
    } else {
        setmaxnreg_inc<232>();
        const int half = warpgroup - 1, thread = threadIdx.x - 128, lane = thread & 31, warp = thread / 32;
        const int row = warp * 16 + lane / 4;  // of the CTA's 128 features; the other one is row + 8
        float sum[TOKENS / 2];
#pragma unroll
        for (int i = 0; i < TOKENS / 2; i++) sum[i] = 0;

        auto release = [&](int i) {
            __syncwarp();  // every lane has read its codes
            if (lane == 0) mbar_arrive(empty + 8 * (i % STAGES));
        };
        auto multiply = [&](int i, u32(&fragments)[4][4]) {
            const int s = i % STAGES;
            mbar_wait(full + 8 * s, i / STAGES & 1);
            const char* tile = smem + s * Smem::STRIDE + Smem::TOKEN_BYTES;
            const uint4 words = *(const uint4*)(tile + thread * 16);
            const u32 word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
            for (int group = 0; group < F::GROUPS; group++) {
                const RowPair zero = tile_zero_points<F>(tile, group, row);
                const RowPair scale = tile_scales<F>(tile, group, row);
                const RowPair scales = {twice(scale.first), twice(scale.second)};
#pragma unroll
                for (int k = group * 4 / F::GROUPS; k < (group + 1) * 4 / F::GROUPS; k++)
                    unpack_fragment<T>(fragments[k], word[k], zero, scales);
            }
#pragma unroll
            for (int k = 0; k < 4; k++) pin(fragments[k]);
            wgmma_fence();
            const u64 tokens = desc_sw128(base + s * Smem::STRIDE);
#pragma unroll
            for (int k = 0; k < 4; k++) T::template wgmma<TOKENS>(sum, fragments[k], tokens + k * 2);  // 32 bytes a step
            wgmma_commit();
        };

        // ptxas serialises wgmmas (C7513) when a branch stands in the pipelined loop, so the first and the odd last
        // stage are peeled.
        u32 even[4][4], odd[4][4];
        multiply(0, even);
        int i = 1;
        for (; i + 1 < tiles; i += 2) {
            multiply(i, odd);
            wgmma_wait<1>(sum);
            release(i - 1);
            multiply(i + 1, even);
            wgmma_wait<1>(sum);
            release(i);
        }
        if (i < tiles) multiply(i, odd);
        wgmma_wait<0>(sum);
        griddep_launch();

        // No griddep_wait from here on: what was multiplied arrived after the producer's.
        if (gridDim.z > 1) {
            const int output_tile = blockIdx.y * gridDim.x + blockIdx.x;
            float* partials = workspace + (size_t)output_tile * gridDim.z * (TOKENS / 2) * COMPUTE_THREADS;
            u32* shared = (u32*)(smem + Smem::BARRIERS + 16 * STAGES);
            if (!sum_splits(sum, partials, tickets + output_tile, shared, blockIdx.z, gridDim.z, thread)) return;
        }

        // Through shared memory, because a thread holds single features of a token while TMA stores rows of them and
        // clips the ragged edges. Warpgroup h uses stage h.
        named_bar_sync(1, COMPUTE_THREADS);  // both warpgroups are past their last wgmma
        const u32 out = base + half * Smem::STRIDE;
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j += 2) {
            const u32 packed[4] = {T::pack(sum[4 * j], sum[4 * j + 1]), T::pack(sum[4 * j + 2], sum[4 * j + 3]),
                                   T::pack(sum[4 * j + 4], sum[4 * j + 5]), T::pack(sum[4 * j + 6], sum[4 * j + 7])};
            const int token = 8 * (j + lane / 16) + (lane & 7), chunk = warp % 4 * 2 + (lane / 8 & 1);
            stsm_x4_t(out + swizzled(token * 128 + chunk * 16, Swizzle::b128), packed);
        }
        fence_proxy_async();
        named_bar_sync(2 + half, 128);
        if (thread % 128 == 0) {
            tma_store_2d(&y_map, out, block * TILE_ROWS + half * 64, first_token);
            bulk_commit();
            bulk_wait_read<0>();
        }
    }
}

template <class F, int TOKENS, int STAGES>
int launch_sm90(const Int4GemmArguments& a, Stream stream) {
    using Smem = Sm90Smem<F, TOKENS, STAGES>;
    const PackedWeight weight = packed_weight(a);
    const int per_split = (a.tiles + a.splits - 1) / a.splits, splits = (a.tiles + per_split - 1) / per_split;
    const TensorType type = a.type == INT4_GEMM_BFLOAT16 ? TensorType::bf16 : TensorType::f16;
    CUtensorMap x_map, y_map;
    if (make_tensor_map_2d(&x_map, a.x, type, a.K, a.M, a.x_stride * 2, TILE_DEPTH, TOKENS, Swizzle::b128) ||
        make_tensor_map_2d(&y_map, a.y, type, a.N, a.M, a.y_stride * 2, TILE_DEPTH, TOKENS, Swizzle::b128))
        return INT4_GEMM_BAD_MAP;
    LaunchConfig config;
    config.grid = dim3((a.N + TILE_ROWS - 1) / TILE_ROWS, (a.M + TOKENS - 1) / TOKENS, splits);
    config.block = dim3(384);
    config.dynamic_smem = Smem::BYTES;
    config.stream = stream;
    config.dependent = a.dependent;
    return launch(int4_gemm_sm90<F, TOKENS, STAGES>, config, x_map, y_map, weight, a.workspace, a.tickets, per_split);
}
