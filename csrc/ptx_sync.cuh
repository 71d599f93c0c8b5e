// Barriers, fences, memory order, clusters, register budget. Included by ptx.cuh.
#pragma once

// ---- barriers of a CTA ------------------------------------------------------------------------------------------
// bar.sync id, n: waits until n threads (a multiple of 32) have arrived at barrier id (0-15); orders their memory.
DEV void named_bar_sync(u32 id, u32 n) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n) : "memory"); }
// bar.arrive id, n: counts as arrived at barrier id without waiting.
DEV void named_bar_arrive(u32 id, u32 n) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(n) : "memory"); }
// elect.sync: true in exactly one thread of the (converged) warp.
DEV bool elect_one() {
    u32 elected;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}\n" : "=r"(elected));
    return elected;
}

// ---- mbarriers: 8 aligned bytes of shared memory ----------------------------------------------------------------
// mbarrier.init: phase 0 completes after `count` arrivals and when no transaction bytes are outstanding.
DEV void mbar_init(u32 bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
// mbarrier.inval: the memory may be used for something else.
DEV void mbar_inval(u32 bar) { asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(bar) : "memory"); }
// fence.mbarrier_init: earlier mbarrier.init become visible to the cluster and the async proxy (a barrier must follow).
DEV void fence_mbar_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// mbarrier.arrive: one arrival, with release semantics in the CTA.
DEV void mbar_arrive(u32 bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }
// mbarrier.arrive.expect_tx: adds `bytes` to the phase's outstanding transactions, then arrives.
DEV void mbar_arrive_tx(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
// mbarrier.expect_tx: adds `bytes` without arriving.
DEV void mbar_expect_tx(u32 bar, u32 bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
// mbarrier.arrive on another CTA's mbarrier (`bar` from `mapa`), with release semantics in the cluster.
DEV void mbar_arrive_cluster(u32 bar) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory");
}
// mbarrier.try_wait.parity: whether the phase of this parity has completed (a fresh barrier: parity 1 has); acquires.
DEV bool mbar_try_wait(u32 bar, u32 parity) {
    u32 complete;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(complete)
        : "r"(bar), "r"(parity)
        : "memory");
    return complete;
}
// Waits until the phase of this parity has completed.
DEV void mbar_wait(u32 bar, u32 parity) {
    while (!mbar_try_wait(bar, parity)) {
    }
}
// The same with acquire semantics in the cluster: for data that another CTA wrote with plain stores.
DEV void mbar_wait_cluster(u32 bar, u32 parity) {
    u32 complete = 0;
    while (!complete)
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}\n"
            : "=r"(complete)
            : "r"(bar), "r"(parity)
            : "memory");
}

// ---- fences -----------------------------------------------------------------------------------------------------
// fence.proxy.async: this thread's earlier plain accesses come before later TMA, bulk and wgmma accesses.
DEV void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }       // to shared memory
DEV void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }     // to global memory
DEV void fence_proxy_async_all() { asm volatile("fence.proxy.async;" ::: "memory"); }               // to both

// ---- memory order on global memory ------------------------------------------------------------------------------
enum class Scope { cta, cluster, gpu, sys };  // who must see it: `ld_acquire<Scope::sys>(flag)`


// `statement(scope)` with the scope as a string literal, chosen by the template parameter S.
#define PTX_FOR_SCOPE(statement)                           \
    if constexpr (S == Scope::cta) {                       \
        statement("cta");                                  \
    } else if constexpr (S == Scope::cluster) {            \
        statement("cluster");                              \
    } else if constexpr (S == Scope::gpu) {                \
        statement("gpu");                                  \
    } else {                                               \
        statement("sys");                                  \
    }

#define PTX_LD_ACQUIRE(scope) \
    asm volatile("ld.acquire." scope ".global.u32 %0, [%1];" : "=r"(v) : "l"(__cvta_generic_to_global(p)) : "memory")
#define PTX_LD_RELAXED(scope) \
    asm volatile("ld.relaxed." scope ".global.u32 %0, [%1];" : "=r"(v) : "l"(__cvta_generic_to_global(p)) : "memory")
#define PTX_ST_RELEASE(scope) \
    asm volatile("st.release." scope ".global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "r"(v) : "memory")
#define PTX_ST_RELAXED(scope) \
    asm volatile("st.relaxed." scope ".global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "r"(v) : "memory")

// ld.acquire: reads a flag; what its writer released comes before this thread's later accesses.
template <Scope S = Scope::gpu>
DEV u32 ld_acquire(const u32* p) {
    u32 v;
    PTX_FOR_SCOPE(PTX_LD_ACQUIRE)
    return v;
}
// ld.relaxed: reads a flag, orders nothing.
template <Scope S = Scope::gpu>
DEV u32 ld_relaxed(const u32* p) {
    u32 v;
    PTX_FOR_SCOPE(PTX_LD_RELAXED)
    return v;
}
// st.release: writes a flag after all this thread has done and, by barriers, has seen.
template <Scope S = Scope::gpu>
DEV void st_release(u32* p, u32 v) {
    PTX_FOR_SCOPE(PTX_ST_RELEASE)
}
// st.relaxed: writes a flag, orders nothing.
template <Scope S = Scope::gpu>
DEV void st_relaxed(u32* p, u32 v) {
    PTX_FOR_SCOPE(PTX_ST_RELAXED)
}

#define PTX_ATOM_ADD(order, scope)                                            \
    asm volatile("atom.add." order "." scope ".global.u32 %0, [%1], %2;"      \
                 : "=r"(old)                                                  \
                 : "l"(__cvta_generic_to_global(p)), "r"(v)                   \
                 : "memory")
#define PTX_ATOM_CAS(order, scope)                                            \
    asm volatile("atom.cas." order "." scope ".global.b32 %0, [%1], %2, %3;"  \
                 : "=r"(old)                                                  \
                 : "l"(__cvta_generic_to_global(p)), "r"(expected), "r"(v)    \
                 : "memory")
#define PTX_ADD_RELAXED(scope) PTX_ATOM_ADD("relaxed", scope)
#define PTX_ADD_ACQUIRE(scope) PTX_ATOM_ADD("acquire", scope)
#define PTX_ADD_RELEASE(scope) PTX_ATOM_ADD("release", scope)
#define PTX_ADD_ACQ_REL(scope) PTX_ATOM_ADD("acq_rel", scope)
#define PTX_CAS_ACQ_REL(scope) PTX_ATOM_CAS("acq_rel", scope)

// atom.add: adds to *p and returns what was there; the suffix says which side it orders.
template <Scope S = Scope::gpu>
DEV u32 atom_add_relaxed(u32* p, u32 v) {
    u32 old;
    PTX_FOR_SCOPE(PTX_ADD_RELAXED)
    return old;
}
template <Scope S = Scope::gpu>
DEV u32 atom_add_acquire(u32* p, u32 v) {
    u32 old;
    PTX_FOR_SCOPE(PTX_ADD_ACQUIRE)
    return old;
}
template <Scope S = Scope::gpu>
DEV u32 atom_add_release(u32* p, u32 v) {
    u32 old;
    PTX_FOR_SCOPE(PTX_ADD_RELEASE)
    return old;
}
template <Scope S = Scope::gpu>
DEV u32 atom_add_acq_rel(u32* p, u32 v) {
    u32 old;
    PTX_FOR_SCOPE(PTX_ADD_ACQ_REL)
    return old;
}
// atom.cas.acq_rel: *p = v if *p == expected; returns what was there.
template <Scope S = Scope::gpu>
DEV u32 atom_cas_acq_rel(u32* p, u32 expected, u32 v) {
    u32 old;
    PTX_FOR_SCOPE(PTX_CAS_ACQ_REL)
    return old;
}
#undef PTX_LD_ACQUIRE
#undef PTX_LD_RELAXED
#undef PTX_ST_RELEASE
#undef PTX_ST_RELAXED
#undef PTX_ATOM_ADD
#undef PTX_ATOM_CAS
#undef PTX_ADD_RELAXED
#undef PTX_ADD_ACQUIRE
#undef PTX_ADD_RELEASE
#undef PTX_ADD_ACQ_REL
#undef PTX_CAS_ACQ_REL
#undef PTX_FOR_SCOPE

// ---- clusters ---------------------------------------------------------------------------------------------------
// This CTA's number in its cluster, and how many CTAs the cluster has.
DEV u32 cluster_rank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
DEV u32 cluster_size() {
    u32 size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}
// barrier.cluster.arrive (release) / .wait (acquire): all threads of all CTAs of the cluster.
DEV void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEV void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEV void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}
// mapa: the address in the cluster's window of the same place in the shared memory of CTA `rank`.
DEV u32 mapa(u32 address, u32 rank) {
    u32 mapped;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
    return mapped;
}
// ld / st.shared::cluster: one word of another CTA's shared memory (address from `mapa`).
DEV u32 ld_cluster(u32 address) {
    u32 value;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}
DEV void st_cluster(u32 address, u32 value) {
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

// ---- registers and dependent launches ---------------------------------------------------------------------------
// setmaxnreg: all warps of a warpgroup take (inc: waits for) or give back (dec) registers, 24-256, multiples of 8.
template <int R>
DEV void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(R));
}
template <int R>
DEV void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(R));
}
// griddepcontrol.wait: the grid before this one has ended and its writes are visible (see LaunchConfig::dependent).
// Before sm_90 grids never overlap and both are nothing.
DEV void griddep_wait() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// griddepcontrol.launch_dependents: the next grid may start; promises nothing about this grid's writes.
DEV void griddep_launch() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
