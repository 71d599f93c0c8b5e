// Micro-tests of ldmatrix, stmatrix, mma.sync and wgmma on small integers, whose sums are exact.
#pragma once
#include "device.cuh"

__device__ inline int small(int i, int factor, int range) { return i * factor % range - range / 2; }
__device__ inline u32 small_pair(int i) { return pack_bf16((float)small(i, 7, 13), (float)small(i, 5, 17)); }

__global__ void matrix_moves(u32* out) {
    ALIGNED_SMEM(address, smem);
    u32* words = reinterpret_cast<u32*>(smem);
    const int l = threadIdx.x;
    for (int i = l; i < 128; i += 32) words[i] = (2 * i) | (2 * i + 1) << 16;
    __syncwarp();
    u32 r1[1], r2[2], r4[4];
    ldsm_x1(r1, address + 16 * (l % 8));
    ldsm_x2_t(r2, address + 16 * (l % 16));
    out[l] = r1[0];
    for (int i = 0; i < 2; i++) out[32 + i * 32 + l] = r2[i];
    ldsm_x4(r4, address + 16 * l);
    for (int i = 0; i < 4; i++) out[96 + i * 32 + l] = r4[i];
    ldsm_x4_t(r4, address + 16 * l);
    for (int i = 0; i < 4; i++) out[224 + i * 32 + l] = r4[i];
    __syncwarp();
    for (int i = 0; i < 4; i++) r4[i] = (l * 8 + i * 2) | (l * 8 + i * 2 + 1) << 16;
    stsm_x4(address + 1024 + 16 * l, r4);
    stsm_x4_t(address + 2048 + 16 * l, r4);
    __syncwarp();
    for (int i = l; i < 128; i += 32) {
        out[352 + i] = words[256 + i];
        out[480 + i] = words[512 + i];
    }
}

__global__ void mma_fragments(u32* out, int type) {
    const int l = threadIdx.x;
    u32 a[4], b[2];
    float d[4];
    int e[4];
    for (int i = 0; i < 4; i++) d[i] = (float)(e[i] = l * 4 + i);
    for (int i = 0; i < 6; i++) {
        const int seed = l * 3 + i * 11;
        u32 word = 0;
        for (int byte = 0; byte < 4; byte++) word |= (u32)(small(seed + byte * 29, 7, 31) & 255) << 8 * byte;
        if (type == 0) word = small_pair(seed);
        if (type == 1) word = pack_f16((float)small(seed, 7, 13), (float)small(seed, 5, 17));
        if (type == 2) word = pack_e4m3((float)small(seed, 3, 9), (float)small(seed, 2, 7)) | pack_e4m3((float)small(seed, 5, 9), (float)small(seed, 4, 11)) << 16;
        (i < 4 ? a[i] : b[i - 4]) = word;
    }
    if (type == 0) mma_m16n8k16_bf16(d, a, b);
    if (type == 1) mma_m16n8k16_f16(d, a, b);
    if (type == 2) mma_m16n8k32_e4m3(d, a, b);
    if (type == 3) mma_m16n8k32_s8(e, a, b);
    for (int i = 0; i < 4; i++) out[i * 32 + l] = type == 3 ? (u32)e[i] : __float_as_uint(d[i]);
}

// Layouts of a shared operand: element (mn, k) of a 16-bit matrix at the place that the descriptor describes.
struct Layout {
    int mode;                     // Swizzle
    int leading, stride;          // bytes
    bool transposed;
};
__device__ inline u32 place(const Layout& layout, int mn, int k) {
    const int pitch = layout.mode ? 16 << layout.mode : 16;
    u32 offset;
    if (!layout.transposed && !layout.mode) offset = mn / 8 * layout.stride + k / 8 * layout.leading + mn % 8 * 16 + k % 8 * 2;
    else if (!layout.transposed) offset = mn / 8 * layout.stride + mn % 8 * pitch + k * 2;
    else if (!layout.mode) offset = mn / 8 * layout.stride + k / 8 * layout.leading + k % 8 * 16 + mn % 8 * 2;
    else offset = mn / (pitch / 2) * layout.leading + mn % (pitch / 2) * 2 + k / 8 * layout.stride + k % 8 * pitch;
    return swizzled(offset, (Swizzle)layout.mode);
}

// One wgmma with B (and A, if shared) placed by plain stores; `step`: which 16 of the 64 (or 32, 16) k of a swizzle row.
template <int N, bool A_SHARED, int TRANS_A, int TRANS_B>
__global__ void __launch_bounds__(128) wgmma_bf16(u32* out, Layout la, Layout lb, int step) {
    ALIGNED_SMEM(address, smem);
    const int t = threadIdx.x;
    for (int i = t; i < 16384; i += 128) reinterpret_cast<u32*>(smem)[i] = 0;
    __syncthreads();
    const int k_row = TRANS_B ? 16 : lb.mode ? 8 << lb.mode : 16;
    for (int i = t; i < N * k_row; i += 128)
        *reinterpret_cast<uint16_t*>(smem + place(lb, i / k_row, i % k_row)) = (uint16_t)pack_bf16((float)small(i / k_row * 5 + i % k_row * 3, 1, 23), 0.f);
    for (int i = t; A_SHARED && i < 64 * 16; i += 128)
        *reinterpret_cast<uint16_t*>(smem + 32768 + place(la, i / 16, i % 16)) = (uint16_t)pack_bf16((float)small(i / 16 * 3 + i % 16 * 7, 1, 19), 0.f);
    fence_proxy_async();
    __syncthreads();
    u32 a[4];
    float d[N / 2];
    for (int i = 0; i < 4; i++) a[i] = small_pair(t + 3 * i);
    for (int i = 0; i < N / 2; i++) d[i] = (float)(t + i);
    const u64 da = wgmma_descriptor(address + 32768, la.leading, la.stride, (Swizzle)la.mode);
    const u64 db = wgmma_descriptor(address, lb.leading, lb.stride, (Swizzle)lb.mode) + 2 * step;
    pin(a);
    pin(d);
    wgmma_fence();
    if constexpr (A_SHARED) wgmma_ss_bf16<N, TRANS_A, TRANS_B>(d, da, db, 1);
    else wgmma_rs_bf16<N, TRANS_B>(d, a, db, 1);
    wgmma_commit();
    wgmma_wait<0>(d);
    for (int i = 0; i < N / 2; i++) out[i * 128 + t] = __float_as_uint(d[i]);
}

// 8-bit and f16 operands in 128-byte K-major rows (64-byte for n 8), A in registers and in shared memory.
template <int N, int TYPE>
__global__ void __launch_bounds__(128) wgmma_other(u32* out) {
    ALIGNED_SMEM(address, smem);
    const int t = threadIdx.x;
    for (int i = t; i < 16384; i += 128) {
        const u32 value = TYPE == 0 ? pack_f16((float)small(i, 3, 15), (float)small(i, 7, 11))
                                    : (u32)(TYPE == 1 ? pack_e4m3((float)small(i, 3, 9), (float)small(i, 5, 7)) * 0x10001u
                                                      : i * 2654435761u);
        reinterpret_cast<u32*>(smem)[i] = value;
    }
    fence_proxy_async();
    __syncthreads();
    const u64 da = desc_sw128(address + 32768), db = desc_sw128(address);
    u32 a[4];
    for (int i = 0; i < 4; i++)
        a[i] = TYPE == 0   ? pack_f16((float)small(t + i, 7, 13), (float)small(t + i, 5, 17))
               : TYPE == 1 ? pack_e4m3((float)small(t + i, 3, 9), (float)small(t + i, 2, 7)) * 0x10001u
                           : (u32)(t * 7 + i) * 0x01020301u;
    if constexpr (TYPE == 2) {
        int d[N / 2];
        for (int i = 0; i < N / 2; i++) d[i] = t + i;
        pin(a);
        pin(d);
        wgmma_fence();
        wgmma_rs_s8<N>(d, a, db, 1);
        wgmma_ss_s8<N>(d, da, db + 2, 1);
        wgmma_commit();
        wgmma_wait<0>(d);
        for (int i = 0; i < N / 2; i++) out[i * 128 + t] = (u32)d[i];
    } else {
        float d[N / 2];
        for (int i = 0; i < N / 2; i++) d[i] = (float)(t + i);
        pin(a);
        pin(d);
        wgmma_fence();
        if constexpr (TYPE == 0) {
            wgmma_rs_f16<N>(d, a, db, 1);
            wgmma_ss_f16<N>(d, da, db + 2, 1);
        } else {
            wgmma_rs_e4m3<N>(d, a, db, 1);
            wgmma_ss_e4m3<N>(d, da, db + 2, 1);
        }
        wgmma_commit();
        wgmma_wait<0>(d);
        for (int i = 0; i < N / 2; i++) out[i * 128 + t] = __float_as_uint(d[i]);
    }
}

// How tensor cores add: 1 plus one product of 2^-e, and plus sixteen of them.
__global__ void mma_rounding(u32* out) {
    for (int e = 10; e < 30; e++)
        for (int many = 0; many < 2; many++) {
            const float power = __uint_as_float((u32)(127 - e) << 23);
            u32 a[4] = {0, 0, 0, 0}, b[2] = {0x3f803f80, 0x3f803f80};
            float d[4] = {1, 1, 1, 1};
            if (many) a[0] = a[1] = a[2] = a[3] = pack_bf16(power, power);
            else if (threadIdx.x % 4 == 0) a[0] = a[1] = pack_bf16(power, 0.f);
            mma_m16n8k16_bf16(d, a, b);
            if (threadIdx.x == 0) out[(e - 10) * 2 + many] = __float_as_uint(d[0]);
        }
}

inline void run_matrices(Record& record) {
    const LaunchConfig warp{dim3(1), dim3(32), 20480}, group{dim3(1), dim3(128), 68608};
    record.line("ldmatrix and stmatrix", launch(matrix_moves, warp, record.out), 608);
    const char* types[] = {"bf16", "f16", "e4m3", "s8"};
    for (int type = 0; type < 4; type++)
        record.line(std::string("mma.sync ") + types[type], launch(mma_fragments, warp, record.out, type), 128);
    struct Case {
        Layout b;
        int step;
    };
    // K-major: (leading, stride) of each swizzle; advances inside a row; no swizzle with both orders of core matrices
    const Case cases[] = {{{3, 16, 1024, false}, 0}, {{3, 16, 1024, false}, 1}, {{3, 16, 1024, false}, 3},
                          {{2, 16, 512, false}, 0},  {{2, 16, 512, false}, 1},  {{1, 16, 256, false}, 0},
                          {{0, 128, 256, false}, 0}, {{0, 1024, 128, false}, 0}};
    char name[96];
    for (const Case& c : cases) {
        snprintf(name, sizeof name, "swizzle %d step %d leading %d stride %d", c.b.mode, c.step, c.b.leading, c.b.stride);
        record.line(std::string("wgmma rs bf16 n8 ") + name, launch(wgmma_bf16<8, false, 0, 0>, group, record.out, Layout{}, c.b, c.step), 512);
        record.line(std::string("wgmma rs bf16 n64 ") + name, launch(wgmma_bf16<64, false, 0, 0>, group, record.out, Layout{}, c.b, c.step), 4096);
    }
    const Layout k_major{3, 16, 1024, false};
    // MN-major: `leading` from one swizzle row of 64, 32 or 16 elements to the next, `stride` from 8 k to the next
    const Layout mn_major[] = {{3, 2048, 1024, true}, {2, 1024, 512, true}, {1, 512, 256, true}, {0, 2048, 128, true}};
    for (const Layout& layout : mn_major) {
        snprintf(name, sizeof name, "transposed swizzle %d", layout.mode);
        record.line(std::string("wgmma ss bf16 n64 B ") + name, launch(wgmma_bf16<64, true, 0, 1>, group, record.out, k_major, layout, 0), 4096);
        record.line(std::string("wgmma ss bf16 n24 A ") + name, launch(wgmma_bf16<24, true, 1, 0>, group, record.out, layout, k_major, 0), 1536);
    }
    record.line("wgmma rs, ss f16 n64", launch(wgmma_other<64, 0>, group, record.out), 4096);
    record.line("wgmma rs, ss e4m3 n64", launch(wgmma_other<64, 1>, group, record.out), 4096);
    record.line("wgmma rs, ss s8 n64", launch(wgmma_other<64, 2>, group, record.out), 4096);
    record.line("wgmma rs, ss f16 n256", launch(wgmma_other<256, 0>, group, record.out), 16384);
    record.line("~mma.sync bf16 adds 2^-10 .. 2^-29 to 1", launch(mma_rounding, warp, record.out), 40);
}
