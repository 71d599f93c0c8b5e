// Asynchronous copies between global and shared memory. Included by ptx.cuh.
#pragma once

// ---- cp.async: 4, 8 or 16 bytes by one thread (generic proxy) ----------------------------------------------------
// Copies `bytes` of `src` to the 32-bit shared address `dst` and fills the rest with zeros; both sides aligned.
DEV void cp_async16(u32 dst, const void* src, u32 bytes = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(__cvta_generic_to_global(src)),
                 "r"(bytes)
                 : "memory");
}
DEV void cp_async8(u32 dst, const void* src, u32 bytes = 8) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(dst), "l"(__cvta_generic_to_global(src)),
                 "r"(bytes)
                 : "memory");
}
DEV void cp_async4(u32 dst, const void* src, u32 bytes = 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(dst), "l"(__cvta_generic_to_global(src)),
                 "r"(bytes)
                 : "memory");
}
// cp.async.commit_group / wait_group N: waits until at most N of this thread's newest groups are still under way.
DEV void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
DEV void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
// cp.async.mbarrier.arrive.noinc: arrives on the mbarrier when this thread's cp.asyncs so far have landed.
DEV void cp_async_mbar_arrive(u32 bar) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}

// ---- cache policies for the `_hint` forms -------------------------------------------------------------------------
DEV u64 cache_evict_first() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
DEV u64 cache_evict_last() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// cp.async of 16 bytes with such a policy.
DEV void cp_async16_hint(u32 dst, const void* src, u64 policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(dst),
                 "l"(__cvta_generic_to_global(src)), "l"(policy)
                 : "memory");
}
// prefetch.global.L2: fetches the cache line of `src`; has no other effect.
DEV void prefetch_l2(const void* src) { asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(src))); }

// ---- bulk copies: one thread, any multiple of 16 bytes (async proxy) ----------------------------------------------
// cp.async.bulk global -> shared: completes `bytes` transactions on `bar`.
DEV void bulk_load(u32 dst, const void* src, u32 bytes, u32 bar) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst),
        "l"(__cvta_generic_to_global(src)), "r"(bytes), "r"(bar)
        : "memory");
}
DEV void bulk_load_hint(u32 dst, const void* src, u32 bytes, u32 bar, u64 policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(dst),
        "l"(__cvta_generic_to_global(src)), "r"(bytes), "r"(bar), "l"(policy)
        : "memory");
}
// The same into every CTA of the cluster whose bit is set in `ctas`, at the same offset, on each one's own mbarrier.
DEV void bulk_load_multicast(u32 dst, const void* src, u32 bytes, u32 bar, uint16_t ctas) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
        "%4;" ::"r"(dst),
        "l"(__cvta_generic_to_global(src)), "r"(bytes), "r"(bar), "h"(ctas)
        : "memory");
}
// cp.async.bulk shared -> shared of a CTA of the cluster (dst and bar from `mapa`).
DEV void bulk_copy_cluster(u32 dst, u32 src, u32 bytes, u32 bar) {
    asm volatile(
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst),
        "r"(src), "r"(bytes), "r"(bar)
        : "memory");
}
// cp.async.bulk shared -> global; cp.reduce.async.bulk adds float32 instead. Completion by bulk groups.
DEV void bulk_store(void* dst, u32 src, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(dst)),
                 "r"(src), "r"(bytes)
                 : "memory");
}
DEV void bulk_reduce_add_f32(float* dst, u32 src, u32 bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
                     __cvta_generic_to_global(dst)),
                 "r"(src), "r"(bytes)
                 : "memory");
}
// cp.async.bulk.commit_group / wait_group N (writes done and visible) / wait_group.read N (shared memory free again).
DEV void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int N>
DEV void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}
template <int N>
DEV void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// ---- TMA: a box of a tensor of 1 to 5 dimensions, innermost coordinate first (async proxy) -------------------------
// tma_load_Nd            box -> shared, out-of-bounds elements zero; always completes the whole box's bytes on `bar`
// tma_load_Nd_hint       with a cache policy
// tma_load_Nd_multicast  into every CTA of the cluster whose bit is set in `ctas`
// tma_store_Nd           shared -> box, out-of-bounds elements dropped; completion by bulk groups
// tma_reduce_add_Nd      shared added to box in the map's element type
DEV void tma_prefetch(const CUtensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }


#define PTX_ONE(...) __VA_ARGS__
#define PTX_TMA(N, PARAMETERS, COORDINATES, LOAD, LAST, STORE)                                                        \
    DEV void tma_load_##N##d(u32 dst, const CUtensorMap* map, PARAMETERS, u32 bar) {                                  \
        asm volatile("cp.async.bulk.tensor." #N "d.shared::cluster.global.mbarrier::complete_tx::bytes"               \
                     " [%0], [%1, {" LOAD "}], [%2];" ::"r"(dst), "l"(map), "r"(bar), COORDINATES : "memory");        \
    }                                                                                                                 \
    DEV void tma_load_##N##d_hint(u32 dst, const CUtensorMap* map, PARAMETERS, u32 bar, u64 policy) {                 \
        asm volatile("cp.async.bulk.tensor." #N "d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"\
                     " [%0], [%1, {" LOAD "}], [%2], " LAST ";" ::"r"(dst), "l"(map), "r"(bar), COORDINATES,          \
                     "l"(policy) : "memory");                                                                         \
    }                                                                                                                 \
    DEV void tma_load_##N##d_multicast(u32 dst, const CUtensorMap* map, PARAMETERS, u32 bar, uint16_t ctas) {         \
        asm volatile("cp.async.bulk.tensor." #N "d.shared::cluster.global.mbarrier::complete_tx::bytes"               \
                     ".multicast::cluster [%0], [%1, {" LOAD "}], [%2], " LAST ";" ::"r"(dst), "l"(map), "r"(bar),    \
                     COORDINATES, "h"(ctas) : "memory");                                                              \
    }                                                                                                                 \
    DEV void tma_store_##N##d(const CUtensorMap* map, u32 src, PARAMETERS) {                                          \
        asm volatile("cp.async.bulk.tensor." #N "d.global.shared::cta.bulk_group [%0, {" STORE "}], [%1];" ::"l"(map),\
                     "r"(src), COORDINATES : "memory");                                                               \
    }                                                                                                                 \
    DEV void tma_reduce_add_##N##d(const CUtensorMap* map, u32 src, PARAMETERS) {                                     \
        asm volatile("cp.reduce.async.bulk.tensor." #N "d.global.shared::cta.add.tile.bulk_group"                     \
                     " [%0, {" STORE "}], [%1];" ::"l"(map), "r"(src), COORDINATES : "memory");                       \
    }

PTX_TMA(1, int c0, "r"(c0), "%3", "%4", "%2")
PTX_TMA(2, PTX_ONE(int c0, int c1), PTX_ONE("r"(c0), "r"(c1)), "%3, %4", "%5", "%2, %3")
PTX_TMA(3, PTX_ONE(int c0, int c1, int c2), PTX_ONE("r"(c0), "r"(c1), "r"(c2)), "%3, %4, %5", "%6", "%2, %3, %4")
PTX_TMA(4, PTX_ONE(int c0, int c1, int c2, int c3), PTX_ONE("r"(c0), "r"(c1), "r"(c2), "r"(c3)), "%3, %4, %5, %6",
        "%7", "%2, %3, %4, %5")
PTX_TMA(5, PTX_ONE(int c0, int c1, int c2, int c3, int c4), PTX_ONE("r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)),
        "%3, %4, %5, %6, %7", "%8", "%2, %3, %4, %5, %6")
#undef PTX_TMA
#undef PTX_ONE
