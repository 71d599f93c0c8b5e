// Micro-tests of shuffles, votes, reductions, mbarrier phases, atomics, packed arithmetic and conversions.
#pragma once
#include "device.cuh"

__global__ void warp_operations(u32* out) {
    const int l = threadIdx.x;
    const u32 v = l * 100;
    out[l] = __shfl_sync(~0u, v, 5, 8);
    out[32 + l] = __shfl_xor_sync(~0u, v, 9, 16);
    out[64 + l] = __shfl_down_sync(~0u, v, 3, 8);
    out[96 + l] = __shfl_up_sync(~0u, v, 2, 16);
    out[128 + l] = __ballot_sync(~0u, l % 3 == 0);
    out[160 + l] = __match_any_sync(~0u, (u32)l % 5);
    out[192 + l] = __reduce_add_sync(~0u, v) + __reduce_max_sync(~0u, (u32)l) + (u32)__reduce_min_sync(~0u, -l) + __reduce_xor_sync(~0u, v);
    out[224 + l] = elect_one();
    out[256 + l] = (u32)__any_sync(~0u, l == 7) | (u32)__all_sync(~0u, l < 31) << 1 | (u32)__all_sync(~0u, l < 32) << 2;
}

// A fresh barrier's parities, two phases, and bytes that complete before they are expected.
__global__ void mbarrier_phases(u32* out, const u32* in) {
    ALIGNED_SMEM(address, smem);
    const u32 bar = address + 1024;
    if (threadIdx.x == 0) {
        mbar_init(bar, 2);
        mbar_init(bar + 8, 1);
        fence_mbar_init();
    }
    __syncwarp();
    if (threadIdx.x == 0) {
        u32 seen = mbar_try_wait(bar, 1);
        mbar_arrive(bar);
        mbar_arrive(bar);
        seen |= mbar_try_wait(bar, 0) << 1;
        mbar_arrive(bar);
        mbar_arrive(bar);
        seen |= mbar_try_wait(bar, 1) << 2;
        bulk_load(address, in, 64, bar + 8);
        mbar_arrive_tx(bar + 8, 64);
        mbar_wait(bar + 8, 0);
        mbar_expect_tx(bar + 8, 32);
        bulk_load(address + 64, in + 16, 32, bar + 8);
        mbar_arrive(bar + 8);
        mbar_wait(bar + 8, 1);
        out[0] = seen;
        out[1] = reinterpret_cast<u32*>(smem)[15];
        out[2] = reinterpret_cast<u32*>(smem)[23];
    }
}

__global__ void atomics(u32* out) {
    const int l = threadIdx.x;
    if (l == 0)
        for (int i = 0; i < 8; i++) out[i] = 0;
    __syncthreads();
    atomicAdd(out, (u32)l);
    atomicMax(reinterpret_cast<int*>(out + 1), l - 40);
    atomicMin(out + 2, 5u);
    atomicAdd(reinterpret_cast<float*>(out + 3), 0.5f);
    atomicOr(out + 4, 1u << l);
    atomicXor(out + 5, 3u << l % 4);
    atomicCAS(out + 6, 0u, 77u);
    atom_add_acq_rel(out + 7, 2u);
    const u32 odd = (u32)__syncthreads_count(l & 1);
    if (l == 0) out[8] = ld_acquire(out + 7) + (odd << 16);
}

// Bit patterns that include NaN, infinities, subnormals and overflows.
__global__ void packed_arithmetic(u32* out) {
    const u32 i = blockIdx.x * 32 + threadIdx.x, h = i * 2654435761u;
    u32 a = h ^ h >> 15, b = (a * 0x85ebca6bu) ^ a >> 13, c = b * 0xc2b2ae35u + i;
    if (i % 3 == 0) a &= 0x83ff83ff, b |= 0x3f803f80;
    if (i % 7 == 0) c = 0x7f807f81;
    u32* o = out + i * 20;
    o[0] = bf2_add(a, b);
    o[1] = bf2_sub(a, b);
    o[2] = bf2_mul(a, b);
    o[3] = bf2_fma(a, b, c);
    o[4] = bf2_max(a, b);
    o[5] = bf2_min(a, b);
    o[6] = h2_add(a, b);
    o[7] = h2_sub(a, b);
    o[8] = h2_mul(a, b);
    o[9] = h2_fma(a, b, c);
    o[10] = h2_max(a, b);
    o[11] = h2_min(a, b);
    o[12] = lop3<0xEA>(a, b, c);
    o[13] = lop3<0x96>(a, b, c);
    o[14] = prmt(a, b, c);
    o[15] = pack_bf16(__uint_as_float(a), __uint_as_float(b));
    o[16] = pack_f16(__uint_as_float(a & 0xcfffffff), __uint_as_float(b & 0xcfffffff));
    o[17] = pack_e4m3(__uint_as_float((a & 0x83ffffff) | 0x3c000000), __uint_as_float((b & 0x83ffffff) | 0x40000000));
    o[18] = unpack_e4m3(a & 0xffff);
    o[19] = (u32)__dp4a((int)a, (int)b, (int)c) ^ __funnelshift_r(a, b, c) ^ __brev(a) ^ (u32)__popc(b) ^ (u32)__clz((int)c);
}

__global__ void approximations(u32* out) {
    const float x = (float)(int)threadIdx.x * 0.37f - 5.f;
    out[threadIdx.x] = __float_as_uint(exp2_approx(x));
    out[32 + threadIdx.x] = __float_as_uint(rcp_approx(x));
}

inline void run_warps(Record& record) {
    const LaunchConfig warp{dim3(1), dim3(32), 8192};
    std::vector<u32> words(64);
    for (size_t i = 0; i < words.size(); i++) words[i] = (u32)i * 3 + 1;
    record.line("shuffles, votes, reductions, elect", launch(warp_operations, warp, record.out), 288);
    record.line("mbarrier phases and transactions", launch(mbarrier_phases, warp, record.out, uploaded(words)), 3);
    record.line("atomics", launch(atomics, warp, record.out), 9);
    record.line("packed arithmetic and conversions", launch(packed_arithmetic, LaunchConfig{dim3(64), dim3(32)}, record.out), 64 * 32 * 20);
    record.line("~ex2.approx and rcp.approx", launch(approximations, warp, record.out), 64);
}
