// Micro-tests of cp.async, bulk copies and TMA.
#pragma once
#include "device.cuh"

__device__ inline void start_mbarrier(u32 bar, u32 count) {
    if (threadIdx.x == 0) {
        mbar_init(bar, count);
        fence_mbar_init();
    }
    __syncthreads();
}

// A box as it lies in shared memory: swizzle pattern, out-of-bounds fill, transaction bytes of a clipped box.
template <int RANK>
__global__ void tma_box(const __grid_constant__ CUtensorMap map, u32* out, int bytes, int c0, int c1, int c2) {
    ALIGNED_SMEM(address, smem);
    const u32 bar = address + 16384;
    start_mbarrier(bar, 1);
    if (threadIdx.x == 0) {
        mbar_arrive_tx(bar, bytes);
        if constexpr (RANK == 1) tma_load_1d(address, &map, c0, bar);
        if constexpr (RANK == 2) tma_load_2d(address, &map, c0, c1, bar);
        if constexpr (RANK == 3) tma_load_3d(address, &map, c0, c1, c2, bar);
        if constexpr (RANK == 4) tma_load_4d(address, &map, c0, c1, c2, 1, bar);
        if constexpr (RANK == 5) tma_load_5d(address, &map, c0, c1, c2, 1, 0, bar);
    }
    mbar_wait(bar, 0);
    for (int i = threadIdx.x; i < bytes / 4; i += 32) out[i] = reinterpret_cast<u32*>(smem)[i];
}

// Shared memory counts up from 1 and is stored, or added, as a clipped box.
template <bool ADD>
__global__ void tma_write(const __grid_constant__ CUtensorMap map, int words, int c0, int c1) {
    ALIGNED_SMEM(address, smem);
    for (int i = threadIdx.x; i < words; i += 32) reinterpret_cast<float*>(smem)[i] = (float)(i + 1);
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        if constexpr (ADD) tma_reduce_add_2d(&map, address, c0, c1);
        else tma_store_2d(&map, address, c0, c1);
        bulk_commit();
        bulk_wait<0>();
    }
}

__global__ void bulk_round_trip(float* out, const float* in) {
    ALIGNED_SMEM(address, smem);
    const u32 bar = address + 4096;
    start_mbarrier(bar, 1);
    if (threadIdx.x == 0) {
        mbar_arrive_tx(bar, 512);
        bulk_load(address, in, 512, bar);
    }
    mbar_wait(bar, 0);
    reinterpret_cast<float*>(smem)[threadIdx.x] += 0.5f;
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        bulk_store(out, address, 512);
        bulk_commit();
        bulk_wait<0>();
        bulk_reduce_add_f32(out + 32, address, 128);
        bulk_commit();
        bulk_wait<0>();
    }
}

// cp.async of every size and of fewer bytes than its size: the rest is zero.
__global__ void cp_async_sizes(u32* out, const u32* in) {
    ALIGNED_SMEM(address, smem);
    const int t = threadIdx.x;
    cp_async16(address + 16 * t, in + 4 * t, 4 * (t % 5));
    cp_async8(address + 512 + 8 * t, in + 2 * t, 4 * (t % 3));
    cp_async4(address + 768 + 4 * t, in + t, 4 * (t % 2));
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    for (int i = t; i < 224; i += 32) out[i] = reinterpret_cast<u32*>(smem)[i];
}

// Each CTA of a cluster of two loads half of a tile into both; then writes a word into the other's memory.
__global__ void cluster_multicast(u32* out, const u32* in) {
    ALIGNED_SMEM(address, smem);
    const u32 bar = address + 4096, rank = cluster_rank();
    if (threadIdx.x == 0) {
        mbar_init(bar, 1);
        fence_mbar_init();
    }
    cluster_sync();
    if (threadIdx.x == 0) {
        mbar_arrive_tx(bar, 256);
        bulk_load_multicast(address + 128 * rank, in + 32 * rank, 128, bar, 3);
    }
    mbar_wait(bar, 0);
    if (threadIdx.x == 1) st_cluster(mapa(address + 512, rank ^ 1), 100 + rank);
    cluster_sync();
    u32* mine = out + 128 * rank;
    for (int i = threadIdx.x; i < 64; i += 32) mine[i] = reinterpret_cast<u32*>(smem)[i];
    if (threadIdx.x == 0) {
        mine[64] = reinterpret_cast<u32*>(smem)[128];
        mine[65] = ld_cluster(mapa(address, rank ^ 1));
        mine[66] = cluster_size();
    }
    cluster_sync();
}

inline void run_copies(Record& record) {
    const LaunchConfig warp{dim3(1), dim3(32), 20480};
    std::vector<uint16_t> numbers(256 * 64);
    for (size_t i = 0; i < numbers.size(); i++) numbers[i] = (uint16_t)(i + 1);
    const uint16_t* matrix = uploaded(numbers);
    char name[96];
    const int origins[4][2] = {{0, 0}, {16, 3}, {-8, -5}, {90, 33}};
    for (u32 mode = 0; mode < 4; mode++)
        for (const auto& origin : origins) {
            CUtensorMap map;
            const u32 width = mode == 1 ? 16 : mode == 2 ? 32 : 64;
            int status = make_tensor_map_2d(&map, matrix, TensorType::bf16, 100, 40, 256, width, 24, (Swizzle)mode);
            if (!status) status = launch(tma_box<2>, warp, map, record.out, (int)width * 48, origin[0], origin[1], 0);
            snprintf(name, sizeof name, "tma load 2d swizzle %u at (%d,%d)", mode, origin[0], origin[1]);
            record.line(name, status, width * 12);
        }
    for (int rank = 1; rank <= 5; rank++) {
        CUtensorMap map;
        const TensorMapShape shape{matrix, TensorType::bf16, rank, {40, 10, 6, 3, 2}, {0, 96, 1024, 6144, 12288}, {16, 4, 3, 2, 2}};
        int status = make_tensor_map(&map, shape);
        int bytes = 2;
        for (int i = 0; i < rank; i++) bytes *= (int)shape.box[i];
        const auto kernel = rank == 1 ? tma_box<1> : rank == 2 ? tma_box<2> : rank == 3 ? tma_box<3> : rank == 4 ? tma_box<4> : tma_box<5>;
        if (!status) status = launch(kernel, warp, map, record.out, bytes, 32, -1, 4);
        snprintf(name, sizeof name, "tma load %dd clipped", rank);
        record.line(name, status, (size_t)bytes / 4);
    }
    for (int type = 0; type < 2; type++) {
        CUtensorMap map;
        TensorMapShape shape{matrix, type ? TensorType::f32 : TensorType::bf16, 2, {20, 4}, {0, 128}, {8, 4}};
        shape.nan_fill = true;
        int status = make_tensor_map(&map, shape);
        if (!status) status = launch(tma_box<2>, warp, map, record.out, type ? 128 : 64, 16, 2, 0);
        record.line(type ? "tma load nan fill f32" : "tma load nan fill bf16", status, type ? 32 : 16);
    }
    for (int add = 0; add < 2; add++) {
        CUtensorMap map;
        std::vector<u32> start(20 * 12);
        for (size_t i = 0; i < start.size(); i++) start[i] = 0x42c80000;  // 100.0
        copy(record.out, start.data(), start.size() * 4);
        int status = make_tensor_map_2d(&map, record.out, TensorType::f32, 18, 11, 80, 16, 8, Swizzle::none);
        if (!status) status = launch(add ? tma_write<true> : tma_write<false>, warp, map, 128, 6, 5);
        record.line(add ? "tma reduce add 2d clipped" : "tma store 2d clipped", status, start.size());
    }
    std::vector<float> floats(128);
    for (size_t i = 0; i < floats.size(); i++) floats[i] = (float)i;
    record.line("bulk load, store, reduce add",
                launch(bulk_round_trip, LaunchConfig{dim3(1), dim3(128), 8192}, reinterpret_cast<float*>(record.out), uploaded(floats)), 128);
    const u32* words = reinterpret_cast<const u32*>(matrix);
    record.line("cp.async sizes and zero fill", launch(cp_async_sizes, warp, record.out, words), 224);
    LaunchConfig pair{dim3(2), dim3(32), 8192};
    pair.cluster = dim3(2);
    record.line("cluster multicast and distributed shared memory", launch(cluster_multicast, pair, record.out, words), 195);
}
