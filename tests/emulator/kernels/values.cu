// Primitives whose results the tests compute independently.
#include "launch.cuh"

#define ALIGNED(address, pointer)                                  \
    DYN_SMEM(pointer##_raw);                                       \
    const u32 address = (smem_u32(pointer##_raw) + 1023) & ~1023u; \
    char* pointer = pointer##_raw + (address - smem_u32(pointer##_raw))

// d[64][N] (float or int) = a[64][K] * b[N][K]^T, one wgmma; K is 32 bytes. A by registers or from shared memory.
template <int N, int TYPE, bool SHARED>
__global__ void __launch_bounds__(128) one_wgmma(const u32* a, const u32* b, u32* d) {
    ALIGNED(address, smem);
    const int t = threadIdx.x, warp = t / 32, g = t % 32 / 4, c = t % 4;
    u32* words = reinterpret_cast<u32*>(smem);
    for (int i = t; i < (N + 64) * 8; i += 128) {  // 32-byte rows in the 32-byte swizzle; A behind B
        const int row = i / 8, k = i % 8;
        const u32 tile = row < N ? 0 : 8192;
        words[swizzled(tile + (u32)(row < N ? row : row - N) * 32 + (u32)k * 4, Swizzle::b32) / 4] =
            row < N ? b[row * 8 + k] : a[(row - N) * 8 + k];
    }
    fence_proxy_async();
    __syncthreads();
    u32 ra[4];
    for (int i = 0; i < 4; i++) ra[i] = a[(warp * 16 + g + (i & 1) * 8) * 8 + (i >> 1) * 4 + c];
    const u64 db = wgmma_descriptor(address, 16, 256, Swizzle::b32);
    const u64 da = wgmma_descriptor(address + 8192, 16, 256, Swizzle::b32);
    typename std::conditional<TYPE == 3, int, float>::type acc[N / 2];
    for (int i = 0; i < N / 2; i++) acc[i] = 7;    // scale_d = 0 must drop it
    pin(ra);
    pin(acc);
    wgmma_fence();
    if constexpr (TYPE == 0) {
        if constexpr (SHARED) wgmma_ss_bf16<N>(acc, da, db, 0);
        else wgmma_rs_bf16<N>(acc, ra, db, 0);
    } else if constexpr (TYPE == 1) {
        if constexpr (SHARED) wgmma_ss_f16<N>(acc, da, db, 0);
        else wgmma_rs_f16<N>(acc, ra, db, 0);
    } else if constexpr (TYPE == 2) {
        if constexpr (SHARED) wgmma_ss_e4m3<N>(acc, da, db, 0);
        else wgmma_rs_e4m3<N>(acc, ra, db, 0);
    } else {
        if constexpr (SHARED) wgmma_ss_s8<N>(acc, da, db, 0);
        else wgmma_rs_s8<N>(acc, ra, db, 0);
    }
    wgmma_commit();
    wgmma_wait<0>(acc);
    for (int j = 0; j < N / 8; j++)
        for (int e = 0; e < 4; e++) {
            u32 bits;
            memcpy(&bits, &acc[j * 4 + e], 4);
            d[(warp * 16 + g + (e >> 1) * 8) * N + j * 8 + c * 2 + (e & 1)] = bits;
        }
}

template <int TYPE, int N = 8>
int choose_n(int n, int shared, const u32* a, const u32* b, u32* d, Stream stream) {
    if constexpr (N > 256) {
        return -1;
    } else if constexpr (TYPE == 3 && N > 24 && N % 16) {
        return choose_n<TYPE, N + 8>(n, shared, a, b, d, stream);
    } else {
        if (n != N) return choose_n<TYPE, N + 8>(n, shared, a, b, d, stream);
        const LaunchConfig config{dim3(1), dim3(128), 20480, stream};
        return shared ? launch(one_wgmma<N, TYPE, true>, config, a, b, d) : launch(one_wgmma<N, TYPE, false>, config, a, b, d);
    }
}
extern "C" int wgmma(int type, int n, int shared, const u32* a, const u32* b, u32* d, Stream stream) {
    switch (type) {
        case 0: return choose_n<0>(n, shared, a, b, d, stream);
        case 1: return choose_n<1>(n, shared, a, b, d, stream);
        case 2: return choose_n<2>(n, shared, a, b, d, stream);
        default: return choose_n<3>(n, shared, a, b, d, stream);
    }
}

// d[16][8] += a[16][K] * b[8][K]^T by ldmatrix and mma.sync; K is 32 bytes.
__global__ void one_mma_kernel(int type, const u32* a, const u32* b, u32* d) {
    STATIC_SMEM(u32, rows, [24 * 8]);
    const int l = threadIdx.x, g = l / 4, c = l % 4;
    for (int i = l; i < 24 * 8; i += 32) rows[i] = i < 128 ? a[i] : b[i - 128];
    __syncwarp();
    u32 ra[4], rb[2];
    ldsm_x4(ra, smem_u32(rows) + (u32)(l % 16) * 32 + (u32)(l / 16) * 16);
    ldsm_x2(rb, smem_u32(rows) + 512 + (u32)(l % 8) * 32 + (u32)(l / 8 % 2) * 16);
    float f[4];
    int n[4];
    for (int e = 0; e < 4; e++) {
        const u32 bits = d[(g + (e >> 1) * 8) * 8 + c * 2 + (e & 1)];
        f[e] = __uint_as_float(bits);
        n[e] = (int)bits;
    }
    if (type == 0) mma_m16n8k16_bf16(f, ra, rb);
    if (type == 1) mma_m16n8k16_f16(f, ra, rb);
    if (type == 2) mma_m16n8k32_e4m3(f, ra, rb);
    if (type == 3) mma_m16n8k32_s8(n, ra, rb);
    for (int e = 0; e < 4; e++) d[(g + (e >> 1) * 8) * 8 + c * 2 + (e & 1)] = type == 3 ? (u32)n[e] : __float_as_uint(f[e]);
}
extern "C" int one_mma(int type, const u32* a, const u32* b, u32* d, Stream stream) {
    return launch(one_mma_kernel, LaunchConfig{dim3(1), dim3(32), 0, stream}, type, a, b, d);
}

// A box through shared memory: what TMA loads, as it lies there, and what it stores back at the mirrored tensor.
__global__ void box_kernel(const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to, u32* raw, int bytes,
                           int rank, int c0, int c1, int c2, int c3, int c4) {
    ALIGNED(address, smem);
    const u32 bar = address + 32768;
    if (threadIdx.x == 0) {
        mbar_init(bar, 1);
        fence_mbar_init();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        mbar_arrive_tx(bar, (u32)bytes);
        if (rank == 1) tma_load_1d(address, &from, c0, bar);
        if (rank == 2) tma_load_2d(address, &from, c0, c1, bar);
        if (rank == 3) tma_load_3d(address, &from, c0, c1, c2, bar);
        if (rank == 4) tma_load_4d(address, &from, c0, c1, c2, c3, bar);
        if (rank == 5) tma_load_5d(address, &from, c0, c1, c2, c3, c4, bar);
    }
    mbar_wait(bar, 0);
    for (int i = threadIdx.x; i < bytes / 4; i += 32) raw[i] = reinterpret_cast<u32*>(smem)[i];
    __syncthreads();
    if (threadIdx.x == 0) {
        if (rank == 1) tma_store_1d(&to, address, c0);
        if (rank == 2) tma_store_2d(&to, address, c0, c1);
        if (rank == 3) tma_store_3d(&to, address, c0, c1, c2);
        if (rank == 4) tma_store_4d(&to, address, c0, c1, c2, c3);
        if (rank == 5) tma_store_5d(&to, address, c0, c1, c2, c3, c4);
        bulk_commit();
        bulk_wait<0>();
    }
}
// `shape`: size[5], stride in bytes[5], box[5], origin[5].
extern "C" int box(const void* source, void* target, u32* raw, const int64_t* shape, int rank, int swizzle, Stream stream) {
    CUtensorMap maps[2];
    int bytes = 2;
    for (int m = 0; m < 2; m++) {
        TensorMapShape s{m ? target : source, TensorType::bf16, rank, {}, {}, {}, (Swizzle)swizzle};
        for (int i = 0; i < rank; i++) {
            s.size[i] = (u64)shape[i];
            s.stride_bytes[i] = (u64)shape[5 + i];
            s.box[i] = (u32)shape[10 + i];
        }
        if (int error = make_tensor_map(&maps[m], s)) return error;
    }
    for (int i = 0; i < rank; i++) bytes *= (int)shape[10 + i];
    return launch(box_kernel, LaunchConfig{dim3(1), dim3(32), 40960, stream}, maps[0], maps[1], raw, bytes, rank, (int)shape[15],
                  (int)shape[16], (int)shape[17], (int)shape[18], (int)shape[19]);
}

__global__ void warp_kernel(const u32* in, u32* out, int operand, int width) {
    const int l = threadIdx.x;
    const u32 v = in[l];
    out[l] = __shfl_sync(~0u, v, operand, width);
    out[32 + l] = __shfl_xor_sync(~0u, v, operand, width);
    out[64 + l] = __shfl_up_sync(~0u, v, (unsigned)operand, width);
    out[96 + l] = __shfl_down_sync(~0u, v, (unsigned)operand, width);
    out[128 + l] = __reduce_add_sync(~0u, v);
    out[160 + l] = (u32)__reduce_min_sync(~0u, (int)v);
    out[192 + l] = __reduce_max_sync(~0u, v);
    out[224 + l] = __ballot_sync(~0u, v & 1);
    const double wide = __shfl_xor_sync(~0u, 1e300 + (double)l, 1);
    out[256 + l] = wide == 1e300 + (double)(l ^ 1);
}
extern "C" int warp(const u32* in, u32* out, int operand, int width, Stream stream) {
    return launch(warp_kernel, LaunchConfig{dim3(1), dim3(32), 0, stream}, in, out, operand, width);
}

// One operation per thread on words a, b, c; `what` counts the rows of test_values.py.
__global__ void packed_kernel(const u32* a, const u32* b, const u32* c, u32* out, int n) {
    const int i = (int)(blockIdx.x * 128 + threadIdx.x);
    if (i >= n) return;
    out[i] = bf2_fma(a[i], b[i], c[i]);
    out[n + i] = h2_fma(a[i], b[i], c[i]);
    out[2 * n + i] = bf2_add(a[i], b[i]);
    out[3 * n + i] = h2_mul(a[i], b[i]);
    out[4 * n + i] = pack_bf16(__uint_as_float(a[i]), __uint_as_float(b[i]));
    out[5 * n + i] = pack_f16(__uint_as_float(a[i]), __uint_as_float(b[i]));
    out[6 * n + i] = pack_e4m3(__uint_as_float(a[i]), __uint_as_float(b[i]));
    out[7 * n + i] = unpack_e4m3(a[i] & 0xffff);
}
extern "C" int packed(const u32* a, const u32* b, const u32* c, u32* out, int n, Stream stream) {
    return launch(packed_kernel, LaunchConfig{dim3((unsigned)(n + 127) / 128), dim3(128), 0, stream}, a, b, c, out, n);
}
