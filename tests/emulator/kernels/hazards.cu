// Small kernels that are right with bug 0; every other number leaves out or bends one thing that hardware needs.
#include "launch.cuh"

// extern "C" int NAME(u32* data, int bug, Stream): 64 words of device memory, zeros.
#define SCENARIO(name, ...)                                                       \
    extern "C" int name(u32* data, int bug, Stream stream) {                      \
        LaunchConfig config{__VA_ARGS__};                                         \
        config.stream = stream;                                                   \
        return launch(name##_kernel, config, data, bug);                          \
    }

#define ALIGNED(address, pointer)                                   \
    DYN_SMEM(pointer##_raw);                                        \
    const u32 address = (smem_u32(pointer##_raw) + 1023) & ~1023u;  \
    char* pointer = pointer##_raw + (address - smem_u32(pointer##_raw))

// ---- plain shared memory ----------------------------------------------------------------------------------------------
__global__ void exchange_kernel(u32* data, int bug) {
    STATIC_SMEM(u32, words, [64]);
    const int t = threadIdx.x;
    words[t] = (u32)t;
    if (bug != 1) __syncthreads();
    data[t] = words[bug == 2 ? t + 1 : 63 - t];  // 2: out of bounds
}
SCENARIO(exchange, dim3(1), dim3(64))

__global__ void halves_kernel(u32* data, int bug) {
    STATIC_SMEM(uint16_t, halves, [128]);
    const int t = threadIdx.x;
    if (t == 40) halves[0] = 7;
    if (bug == 0) __syncthreads();
    if (t == 0) halves[1] = 9;  // hides the other half's writer from a detector that keeps one per word
    __syncwarp();
    if (t == 1) data[0] = halves[0];
    if (bug == 2 && t == 2) data[1] = halves[64];  // never written
    __syncthreads();
}
SCENARIO(halves, dim3(1), dim3(64))

__global__ void lanes_kernel(u32* data, int bug) {
    STATIC_SMEM(u32, words, [32]);
    const int t = threadIdx.x;
    words[t] = (u32)t;
    if (bug == 0) __syncwarp();
    data[t] = words[t ^ 1];
}
SCENARIO(lanes, dim3(1), dim3(32))

__global__ void copies_kernel(u32* data, int bug) {
    const int t = threadIdx.x;
    char local[160];
    const size_t bytes = 4 * (size_t)(bug == 1 && t == 31 ? 34 : 1);  // 1: a memcpy of run-time size past the end
    memset(local, t, sizeof local);
    if (bug == 2) memcpy(data, local, bytes);  // 2: all threads to the same place
    else memcpy(data + t + (bug == 1 ? 1 : 0), local, bytes);
}
SCENARIO(copies, dim3(1), dim3(32))

// ---- warps ----------------------------------------------------------------------------------------------------------------
__global__ void divergence_kernel(u32* data, int bug) {
    const int t = threadIdx.x;
    u32 v = (u32)t;
    if (bug == 1) {
        if (t < 16) v = __shfl_xor_sync(~0u, v, 1);          // half the warp
    } else if (bug == 2) {
        if (t < 16) v = __shfl_xor_sync(0xffffu, v, 16);     // from a lane outside the mask
    } else if (bug == 3) {
        v = __shfl_xor_sync(0xfffeu, v, 1);                  // lane 0 is not in its mask
    } else if (bug == 4) {
        if (t < 16) __syncthreads();                         // barriers in divergent code
        v = __shfl_sync(~0u, v, 0);
    } else if (bug == 5) {
        if (t < 16) __syncthreads();
        else named_bar_sync(1, 32);
    } else {
        v = __shfl_xor_sync(~0u, v, 1);
    }
    data[t] = v;
}
SCENARIO(divergence, dim3(1), dim3(32))

__global__ void named_barriers_kernel(u32* data, int bug) {
    STATIC_SMEM(u32, words, [64]);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp == 0) {
        words[lane] = (u32)lane;
        named_bar_arrive(1, 64);
    } else {
        if (bug != 1) named_bar_sync(1, bug == 2 ? 96 : 64);
        data[lane] = words[lane];
    }
}
SCENARIO(named_barriers, dim3(1), dim3(64))

__global__ void registers_kernel(u32* data, int bug) {
    if (threadIdx.x < 128) {
        if (bug != 1) setmaxnreg_dec<40>();
    } else if (bug == 2 && threadIdx.x < 160) {
        setmaxnreg_inc<224>();                               // its warpgroup takes 232
    } else {
        setmaxnreg_inc<232>();
    }
    if (threadIdx.x < 64) data[threadIdx.x] = 1;
}
extern "C" int registers(u32* data, int bug, Stream stream) {
    return launch(registers_kernel, LaunchConfig{dim3(1), dim3(384), 0, stream}, data, bug);
}

// ---- mbarriers and asynchronous copies ---------------------------------------------------------------------------------------
__global__ void bulk_pipeline_kernel(u32* data, int bug) {
    ALIGNED(address, smem);
    const u32 full = address + 2048, empty = full + 8;
    const int t = threadIdx.x, rounds = 6;
    if (t == 0) {
        mbar_init(full, 1);
        mbar_init(empty, bug == 1 ? 3 : 2);                                   // 1: a count nobody reaches
        if (bug != 2) fence_mbar_init();
    }
    if (bug != 3) __syncthreads();
    if (t < 32) {
        for (int i = 0; t == 0 && i < rounds; i++) {
            if (bug != 4) mbar_wait(empty, (i & 1) ^ 1);
            mbar_arrive_tx(full, bug == 5 ? 64 : bug == 6 ? 256 : 128);
            bulk_load(address, data + 32, bug == 7 ? 144 : 128, full);        // 7: past the end of the allocation
        }
    } else {
        u32 sum = 0;
        for (int i = 0; i < rounds; i++) {
            if (bug != 8 || i != 3) mbar_wait(full, bug == 9 ? 0 : i & 1);
            sum += reinterpret_cast<u32*>(smem)[t % 32];
            if (bug != 10) __syncwarp();
            if (t == 32 || t == 64) mbar_arrive(empty);
            if (bug == 11 && t == 33) mbar_arrive(empty);                     // one arrival too many
        }
        if (bug == 12) sum += reinterpret_cast<u32*>(smem)[512];              // the mbarrier as data
        if (t < 64) data[t - 32] = sum;
    }
    if (bug == 13 && t == 1) mbar_arrive(address + 2064);                     // no mbarrier
}
extern "C" int bulk_pipeline(u32* data, int bug, Stream stream) {
    return launch(bulk_pipeline_kernel, LaunchConfig{dim3(1), dim3(96), 4096, stream}, data, bug);
}

__global__ void store_kernel(u32* data, int bug) {
    ALIGNED(address, smem);
    u32* words = reinterpret_cast<u32*>(smem);
    const int t = threadIdx.x;
    words[t] = (u32)t;
    if (bug != 1) fence_proxy_async();
    if (bug != 2) __syncthreads();
    if (t == 0) {
        bulk_store(data, address, 128);
        bulk_commit();
        if (bug != 3) bulk_wait_read<0>();
        if (bug == 4) data[0] = 5;                                            // only the reads are done
    }
    __syncthreads();
    if (t == 32 && bug != 3) words[0] = 9;
}
SCENARIO(store, dim3(1), dim3(64), 4096)

// A tile written by plain stores to global memory and then loaded by the async proxy.
__global__ void global_proxy_kernel(u32* data, int bug) {
    ALIGNED(address, smem);
    const u32 bar = address + 1024;
    const int t = threadIdx.x;
    data[t] = (u32)t;
    if (bug == 0) fence_proxy_async_global();
    if (bug == 1) fence_proxy_async();                                        // the fence for shared memory
    if (t == 0) {
        mbar_init(bar, 1);
        fence_mbar_init();
    }
    __syncthreads();
    if (t == 0) {
        mbar_arrive_tx(bar, 128);
        bulk_load(address, data, 128, bar);
    }
    mbar_wait(bar, 0);
    data[32 + t] = reinterpret_cast<u32*>(smem)[31 - t];
}
SCENARIO(global_proxy, dim3(1), dim3(32), 4096)

__global__ void cp_async_kernel(u32* data, int bug) {
    ALIGNED(address, smem);
    const u32 bar = address + 1024;
    const int t = threadIdx.x;
    if (t == 0) {
        mbar_init(bar, bug == 4 ? 31 : 32);
        fence_mbar_init();
    }
    __syncthreads();
    cp_async16(address + 16 * t, data + 4 * (t % 8));
    cp_async_commit();
    cp_async4(address + 512 + 4 * t, data + t);
    if (bug == 5) {
        cp_async_commit();                                                    // exit with copies under way
        return;
    }
    if (bug == 1 || bug == 3) {
        cp_async_commit();
        cp_async_wait<1>();                                                   // the newest group may still fly
        __syncthreads();
    } else {
        cp_async_mbar_arrive(bar);
        if (bug != 2) mbar_wait(bar, 0);
    }
    data[32 + t] = reinterpret_cast<u32*>(smem)[(bug == 3 ? 0 : 128) + (31 - t)];
    cp_async_wait<0>();
}
SCENARIO(cp_async, dim3(1), dim3(32), 4096)

// ---- clusters -------------------------------------------------------------------------------------------------------------
__global__ void cluster_exchange_kernel(u32* data, int bug) {
    STATIC_SMEM(u32, words, [32]);
    const u32 rank = cluster_rank(), t = threadIdx.x;
    if (bug != 1) cluster_sync();                                             // 1: the other may not have started
    st_cluster(mapa(smem_u32(&words[t]), rank ^ 1), 100 * rank + t);
    if (bug == 3) __syncthreads();
    else if (bug != 2) cluster_sync();
    else cluster_arrive();
    data[rank * 32 + t] = words[t];
    if (bug == 2) cluster_wait();
    if (bug == 4 && rank == 1) return;                                        // leaves while its memory is read
    if (bug == 4) {
        for (int i = 0; i < 50; i++) __nanosleep(1);
        data[t] += ld_cluster(mapa(smem_u32(&words[t]), 1));
    }
}
extern "C" int cluster_exchange(u32* data, int bug, Stream stream) {
    LaunchConfig config{dim3(2), dim3(32), 0, stream};
    config.cluster = dim3(2);
    return launch(cluster_exchange_kernel, config, data, bug);
}

// Each of two CTAs multicasts half a tile into both, four times over one buffer.
__global__ void multicast_kernel(u32* data, int bug) {
    ALIGNED(address, smem);
    const u32 full = address + 1024, empty = full + 8, rank = cluster_rank(), t = threadIdx.x;
    if (t == 0) {
        mbar_init(full, 1);
        mbar_init(empty, 2);
        fence_mbar_init();
    }
    if (bug == 1) __syncthreads();
    else cluster_sync();
    u32 sum = 0;
    for (int i = 0; i < 4; i++) {
        if (t == 0) {
            if (bug != 2) mbar_wait(empty, (i & 1) ^ 1);
            mbar_arrive_tx(full, 128);
            bulk_load_multicast(address + 64 * rank, data + 32 + 16 * rank, 64, full, 3);
        }
        mbar_wait(full, i & 1);
        sum += reinterpret_cast<u32*>(smem)[t];
        __syncwarp();
        if (t < 2) {
            if (bug == 3) mbar_arrive(empty);                                 // releases only its own CTA
            else mbar_arrive_cluster(mapa(empty, t));
        }
    }
    if (rank == 0) data[t] = sum;
    cluster_sync();
}
extern "C" int multicast(u32* data, int bug, Stream stream) {
    LaunchConfig config{dim3(2), dim3(32), 4096, stream};
    config.cluster = dim3(2);
    return launch(multicast_kernel, config, data, bug);
}

// ---- between CTAs ------------------------------------------------------------------------------------------------------------
__global__ void flag_kernel(u32* data, int bug) {
    const u32 t = threadIdx.x;
    if (blockIdx.x == 0) {
        data[t] = 5 + t;
        __syncthreads();
        if (t == 0) {
            if (bug == 1) st_relaxed(data + 40, 1);
            else if (bug == 2) st_release<Scope::cta>(data + 40, 1);
            else if (bug == 6) *const_cast<volatile u32*>(data + 40) = 1;
            else if (bug == 7) __threadfence(), atomicAdd(data + 40, 1u);
            else st_release(data + 40, 1);
        }
    } else {
        if (t == 0) {
            if (bug == 3) while (ld_relaxed(data + 40) != 1) {}
            else if (bug == 4) while (ld_acquire(data + 40) != 2) {}
            else if (bug == 5) while (ld_acquire<Scope::cta>(data + 40) != 1) {}
            else if (bug == 6) while (*const_cast<volatile u32*>(data + 40) != 1) {}
            else if (bug == 7) {
                while (atomicAdd(data + 40, 0u) != 1) {}
                __threadfence();
            } else while (ld_acquire(data + 40) != 1) {}
        }
        __syncthreads();
        if (t < 8) data[48 + t] = data[31 - t];
    }
}
SCENARIO(flag, dim3(2), dim3(32))

// A barrier over the whole grid.
__global__ void grid_barrier_kernel(u32* data, int bug) {
    const u32 t = threadIdx.x;
    (void)bug;
    if (t == 0) data[blockIdx.x] = blockIdx.x;
    __syncthreads();
    if (t == 0) {
        atom_add_acq_rel(data + 63, 1);
        while (ld_acquire(data + 63) != gridDim.x) {}
    }
    __syncthreads();
    if (t == 0) atomicAdd(data + 62, data[(blockIdx.x + 1) % gridDim.x]);
}
extern "C" int grid_barrier(u32* data, int bug, Stream stream) {
    LaunchConfig config{dim3(bug == 2 ? 400 : 8), dim3(32), (size_t)(bug == 2 ? 200000 : 0), stream};
    config.cooperative = bug != 1;                                            // 1: only some CTAs are resident
    return launch(grid_barrier_kernel, config, data, bug);
}

// Reads what the grid before this one writes.
__global__ void dependent_kernel(u32* data, int bug) {
    const u32 t = threadIdx.x;
    const u32 early = bug == 1 ? data[t] : 0;
    if (bug == 2) data[t] = 1;
    if (bug != 3 && t == 0) griddep_wait();
    if (bug != 4) __syncthreads();
    data[32 + t] = early + data[t] + 1;
    griddep_launch();
}
extern "C" int dependent(u32* data, int bug, Stream stream) {
    LaunchConfig config{dim3(1), dim3(32), 0, stream};
    config.dependent = true;
    return launch(dependent_kernel, config, data, bug);
}
__global__ void fill_kernel(u32* data, int value) { data[threadIdx.x] = (u32)value; }
// The grid before is a real one here.
extern "C" int dependent_pair(u32* data, int bug, Stream stream) {
    const int status = launch(fill_kernel, LaunchConfig{dim3(1), dim3(32), 0, stream}, data, 41);
    return status ? status : dependent(data, bug, stream);
}

// ---- wgmma ------------------------------------------------------------------------------------------------------------------
__global__ void wgmma_rules_kernel(u32* data, int bug) {
    ALIGNED(address, smem);
    const int t = threadIdx.x;
    for (int i = t; i < 4096; i += 128) reinterpret_cast<u32*>(smem)[i] = 0x3f803f80;
    if (bug != 1) fence_proxy_async();
    if (bug != 2) __syncthreads();
    float d[4] = {0, 0, 0, 0};
    u32 a[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
    pin(a);
    pin(d);
    if (bug != 3) wgmma_fence();
    if (bug == 4) d[0] = 1, pin(d);
    u64 b = desc_sw128(address + (bug == 5 ? 128 : 0));
    if (bug == 6 && t >= 96) b += 2;                                          // one warp takes another step of K
    if (bug == 7) b = desc_sw128(address + 32768);                            // outside
    wgmma_rs_bf16<8>(d, a, b, 1);
    if (bug == 8) a[1] = 0, pin(a);
    wgmma_commit();
    if (bug == 9) data[t % 64] = __float_as_uint(d[0]);
    if (bug == 10) reinterpret_cast<u32*>(smem)[t] = 0;
    if (bug != 11) wgmma_wait<0>(d);
    if (t < 64 && bug != 9 && bug != 11) data[t] = (u32)d[0];
}
extern "C" int wgmma_rules(u32* data, int bug, Stream stream) {
    return launch(wgmma_rules_kernel, LaunchConfig{dim3(1), dim3(128), 20480, stream}, data, bug);
}

// ---- launches -----------------------------------------------------------------------------------------------------------------
__global__ void nothing_kernel(u32* data, int bug) {
    if (bug == 5) reinterpret_cast<u32*>(0x70000000)[threadIdx.x] = 1;
    if (bug == 6) __trap();
    (void)data;
}
extern "C" int refused(u32* data, int bug, Stream stream) {
    LaunchConfig config{dim3(2), dim3(32), 0, stream};
    if (bug == 1) config.block = dim3(2048);
    if (bug == 2) config.dynamic_smem = 232449;
    if (bug == 3) config.cluster = dim3(3);
    if (bug == 4) config.grid = dim3(0);
    return launch(nothing_kernel, config, data, bug);
}
