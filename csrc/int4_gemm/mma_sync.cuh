// INT4 GEMM for few tokens and for every GPU from sm_80: cp.async feeds mma.sync m16n8k16, weights as operand A.
//
// Decoding is bound by the weights' bytes. Each of the 256 threads streams the 16 bytes that are its own fragments
// (evict-first: nobody reads them again), eight stages ahead; the tokens' tile is shared through swizzled shared memory.
// Codes minus zero points are exact in 16 bits, so a group's products are summed first and its scale is applied to the
// float32 sum: fewer instructions than scaling weights, and no rounding of weights at all.
//
//   grid (Np/128, ceil(M/TOKENS), splits), 256 threads: warp w owns output features 16w..16w+15 of the CTA
#pragma once
#include "tiles.cuh"
#include "../launch.cuh"

template <class F, int TOKENS, int STAGES>
struct MmaSyncSmem {
    static constexpr int TOKEN_BYTES = TOKENS * TILE_DEPTH * 2;
    static constexpr int STRIDE = TOKEN_BYTES + F::BYTES;
    static constexpr int OUT_PITCH = TILE_ROWS * 2 + 16;  // bytes; 16 more, so that rows start in different banks
    static constexpr int BYTES = STAGES * STRIDE + 16;    // one word at the end
    static_assert(TOKENS * OUT_PITCH <= STAGES * STRIDE, "the epilogue's tile lies over the stages");
};

template <class F, int TOKENS, int STAGES>
__global__ void __launch_bounds__(COMPUTE_THREADS)
    int4_gemm_mma_sync(const uint16_t* x, int64_t x_stride, const PackedWeight weight, uint16_t* y, int64_t y_stride,
                       float* workspace, u32* tickets, int M, int N, int K, int tiles_per_split) {
    using T = typename F::T;
    using Smem = MmaSyncSmem<F, TOKENS, STAGES>;
    DYN_SMEM(smem);
    const int thread = threadIdx.x, warp = thread / 32, lane = thread & 31, row = warp * 16 + lane / 4;
    const int block = blockIdx.x, first_token = blockIdx.y * TOKENS, first_tile = blockIdx.z * tiles_per_split;
    const int tiles = min(tiles_per_split, weight.tiles - first_tile);
    const u32 base = smem_u32(smem);
    const u64 evict_first = cache_evict_first();

    // Chunk c (16 bytes) of token t lies at chunk c ^ (t & 7) of its row: ldmatrix then reads eight different banks.
    auto load = [&](int i) {
        const u32 stage = base + i % STAGES * Smem::STRIDE, to = stage + Smem::TOKEN_BYTES;
        const int tile = first_tile + i;
        cp_async16_hint(to + thread * 16, weight.words_of(block, tile) + thread * 16, evict_first);
        if (thread * 16 < F::SCALE_BYTES)
            cp_async16(to + WORD_BYTES + thread * 16, weight.scales_of<F>(block, tile) + thread * 16);
        if (thread * 16 < F::ZERO_BYTES)
            cp_async16(to + WORD_BYTES + F::SCALE_BYTES + thread * 16, weight.zeros_of<F>(block, tile) + thread * 16);
#pragma unroll
        for (int c = thread; c < TOKENS * 8; c += COMPUTE_THREADS) {
            const int token = c / 8, chunk = c % 8, k = tile * TILE_DEPTH + chunk * 8;
            const int left = first_token + token < M ? min(max(2 * (K - k), 0), 16) : 0;  // bytes that exist
            const uint16_t* from = left ? x + (first_token + token) * x_stride + k : x;
            cp_async16(stage + token * 128 + ((chunk ^ (token & 7)) << 4), from, left);
        }
    };

    // Weights do not depend on the grid before this one: with a dependent launch they reach L2 while it ends.
    for (int i = 0; i < min(tiles, STAGES - 1); i++)
        if (thread < WORD_BYTES / 128) prefetch_l2(weight.words_of(block, first_tile + i) + thread * 128);
    griddep_wait();
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        if (i < tiles) load(i);
        cp_async_commit();  // also when empty: the wait below counts groups
    }

    float sum[TOKENS / 2];
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) sum[i] = 0;
    for (int i = 0; i < tiles; i++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();  // stage i is complete; nobody reads stage i - 1, which is filled next
        if (i + STAGES - 1 < tiles) load(i + STAGES - 1);
        cp_async_commit();

        const char* tile = smem + i % STAGES * Smem::STRIDE + Smem::TOKEN_BYTES;
        const u32 tokens = base + i % STAGES * Smem::STRIDE;
        const uint4 words = *(const uint4*)(tile + thread * 16);
        const u32 word[4] = {words.x, words.y, words.z, words.w};
        float part[TOKENS / 8][4];
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {  // of k16 steps: one ldmatrix.x4, and a whole group if groups are fine
            const int group = F::FINE ? pair : 0;
            const RowPair zero = tile_zero_points<F>(tile, group, row);
            u32 first[4], second[4];
            unpack_fragment<T>(first, word[2 * pair], zero);
            unpack_fragment<T>(second, word[2 * pair + 1], zero);
            const RowPair scale = tile_scales<F>(tile, group, row);
            const float scales[2] = {T::widen(scale.first), T::widen(scale.second)};
#pragma unroll
            for (int j = 0; j < TOKENS / 8; j++) {
                const int token = 8 * j + (lane & 7), chunk = 4 * pair + lane / 8;
                u32 b[4];
                ldsm_x4(b, tokens + token * 128 + ((chunk ^ (token & 7)) << 4));
                if (pair == 0 || F::FINE) part[j][0] = part[j][1] = part[j][2] = part[j][3] = 0;
                const u32 b_first[2] = {b[0], b[1]}, b_second[2] = {b[2], b[3]};
                T::mma(part[j], first, b_first);
                T::mma(part[j], second, b_second);
                if (pair == 1 || F::FINE)
#pragma unroll
                    for (int r = 0; r < 4; r++) sum[4 * j + r] += scales[r / 2] * part[j][r];
            }
        }
    }
    griddep_launch();

    if (gridDim.z > 1) {
        const int output_tile = blockIdx.y * gridDim.x + blockIdx.x;
        float* partials = workspace + (size_t)output_tile * gridDim.z * (TOKENS / 2) * COMPUTE_THREADS;
        u32* shared = (u32*)(smem + STAGES * Smem::STRIDE);
        if (!sum_splits(sum, partials, tickets + output_tile, shared, blockIdx.z, gridDim.z, thread)) return;
    }

    // Through shared memory: a thread holds single features of a token, memory wants rows of them.
    __syncthreads();  // the last stage has been read
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i += 2) {
        const int token = i / 4 * 8 + lane % 4 * 2, feature = row + i % 4 / 2 * 8;
        const u32 packed = T::pack(sum[i], sum[i + 1]);  // two tokens of one feature
        *(uint16_t*)(smem + token * Smem::OUT_PITCH + feature * 2) = (uint16_t)packed;
        *(uint16_t*)(smem + (token + 1) * Smem::OUT_PITCH + feature * 2) = (uint16_t)(packed >> 16);
    }
    __syncthreads();
    for (int c = thread; c < TOKENS * 16; c += COMPUTE_THREADS) {
        const int token = c / 16, feature = block * TILE_ROWS + c % 16 * 8;
        if (first_token + token >= M) continue;
        const char* from = smem + token * Smem::OUT_PITCH + c % 16 * 16;
        uint16_t* to = y + (first_token + token) * y_stride + feature;
        if (feature + 8 <= N)
            *(uint4*)to = *(const uint4*)from;
        else
            for (int r = 0; feature + r < N; r++) to[r] = ((const uint16_t*)from)[r];
    }
}

template <class F, int TOKENS, int STAGES>
int launch_mma_sync(const Int4GemmArguments& a, Stream stream) {
    const int per_split = (a.tiles + a.splits - 1) / a.splits, splits = (a.tiles + per_split - 1) / per_split;
    LaunchConfig config;
    config.grid = dim3((a.N + TILE_ROWS - 1) / TILE_ROWS, (a.M + TOKENS - 1) / TOKENS, splits);
    config.block = dim3(COMPUTE_THREADS);
    config.dynamic_smem = MmaSyncSmem<F, TOKENS, STAGES>::BYTES;
    config.stream = stream;
    config.dependent = a.dependent;
    return launch(int4_gemm_mma_sync<F, TOKENS, STAGES>, config, (const uint16_t*)a.x, a.x_stride, packed_weight(a),
                  (uint16_t*)a.y, a.y_stride, a.workspace, a.tickets, a.M, a.N, a.K, per_split);
}
