// The emulated twins of every primitive in ptx*.cuh (their meaning is documented there) and of CUDA's own intrinsics.
#pragma once
#include "arithmetic.h"
#include "host.h"

enum class Scope { cta, cluster, gpu, sys };

namespace emulator {
enum class Order { relaxed, acquire, release, acq_rel };
enum class Rmw { add, exchange, compare_exchange, minimum, maximum, bit_and, bit_or, bit_xor };
enum class Number { u32, s32, u64, f32, f64 };
enum class Shuffle { index, xor_, up, down };
enum class Vote { ballot, any, all, match_any };
enum class Reduce { add, min_signed, max_signed, min_unsigned, max_unsigned, bit_and, bit_or, bit_xor };
enum class Operand { bf16, f16, e4m3, s8 };

// The operands of a wgmma; `a` is a descriptor or the four registers of each thread.
struct WgmmaShape {
    Operand type;
    int n;
    bool a_shared, a_transposed, b_transposed;
};

u32 shuffle(Shuffle kind, u32 mask, u32 value, int operand, int width);
u32 vote(Vote kind, u32 mask, u32 value);
u32 reduce(Reduce kind, u32 mask, u32 value);
int syncthreads_count(int predicate);
void load_matrix(u32* registers, int matrices, bool transposed, u32 address);
void store_matrix(const u32* registers, int matrices, bool transposed, u32 address);
void mma(Operand type, void* d, const u32* a, const u32* b);
void cp_async(u32 dst, const void* src, u32 size, u32 bytes);
void cp_async_wait(int groups);
void bulk_load(u32 dst, const void* src, u32 bytes, u32 bar, bool multicast, u32 ctas);
void bulk_store(void* dst, u32 src, u32 bytes, bool add_f32);
void bulk_wait(int groups, bool only_read);
struct Coordinates {
    int rank, c[5];
};
void tma_load(u32 dst, const CUtensorMap* map, const Coordinates& at, u32 bar, bool multicast, u32 ctas);
void tma_store(const CUtensorMap* map, u32 src, const Coordinates& at, bool add);
void wgmma(const WgmmaShape& shape, void* d, const u32* a_registers, u64 a_descriptor, u64 b_descriptor, int scale_d);
void wgmma_wait(int groups);
void set_max_registers(int count, bool increase);
u32 load_flag(const u32* p, Order order, Scope scope);
void store_flag(u32* p, u32 value, Order order, Scope scope);
u64 read_modify_write(Rmw operation, Number number, void* p, u64 value, u64 expected, Order order, Scope scope);
void thread_fence(Scope scope);
[[noreturn]] void trap();

template <class To, class From>
DEV To bits_as(From from) {
    To to = To();
    __builtin_memcpy(&to, &from, sizeof from < sizeof to ? sizeof from : sizeof to);
    return to;
}
// Shuffles of 4- and 8-byte values, word by word.
template <class T>
DEV T shuffle_value(Shuffle kind, u32 mask, T value, int operand, int width) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    if constexpr (sizeof(T) == 4) {
        return bits_as<T>(shuffle(kind, mask, bits_as<u32>(value), operand, width));
    } else {
        const u64 bits = bits_as<u64>(value);
        const u32 low = shuffle(kind, mask, (u32)bits, operand, width);
        return bits_as<T>((u64)shuffle(kind, mask, (u32)(bits >> 32), operand, width) << 32 | low);
    }
}
template <class T>
constexpr Number number_of() {
    if constexpr (std::is_same_v<T, float>) return Number::f32;
    else if constexpr (std::is_same_v<T, double>) return Number::f64;
    else if constexpr (sizeof(T) == 8) return Number::u64;
    else if constexpr (std::is_signed_v<T>) return Number::s32;
    else return Number::u32;
}
template <class T>
DEV T rmw(Rmw operation, T* p, T value, T expected = T()) {
    return bits_as<T>(read_modify_write(operation, number_of<T>(), p, bits_as<u64>(value), bits_as<u64>(expected),
                                        Order::relaxed, Scope::gpu));
}
}  // namespace emulator

// ---- warps ---------------------------------------------------------------------------------------------------------
void __syncthreads();
void __syncwarp(u32 mask = 0xffffffffu);
DEV int __syncthreads_count(int p) { return emulator::syncthreads_count(p); }
DEV int __syncthreads_or(int p) { return emulator::syncthreads_count(p) != 0; }
DEV int __syncthreads_and(int p) { return emulator::syncthreads_count(!p) == 0; }
template <class T>
DEV T __shfl_sync(u32 mask, T value, int lane, int width = 32) {
    return emulator::shuffle_value(emulator::Shuffle::index, mask, value, lane, width);
}
template <class T>
DEV T __shfl_xor_sync(u32 mask, T value, int lanes, int width = 32) {
    return emulator::shuffle_value(emulator::Shuffle::xor_, mask, value, lanes, width);
}
template <class T>
DEV T __shfl_up_sync(u32 mask, T value, int distance, int width = 32) {
    return emulator::shuffle_value(emulator::Shuffle::up, mask, value, distance, width);
}
template <class T>
DEV T __shfl_down_sync(u32 mask, T value, int distance, int width = 32) {
    return emulator::shuffle_value(emulator::Shuffle::down, mask, value, distance, width);
}
DEV u32 __ballot_sync(u32 mask, int p) { return emulator::vote(emulator::Vote::ballot, mask, p != 0); }
DEV int __any_sync(u32 mask, int p) { return (int)emulator::vote(emulator::Vote::any, mask, p != 0); }
DEV int __all_sync(u32 mask, int p) { return (int)emulator::vote(emulator::Vote::all, mask, p != 0); }
DEV u32 __match_any_sync(u32 mask, u32 value) { return emulator::vote(emulator::Vote::match_any, mask, value); }
DEV u32 __reduce_add_sync(u32 mask, u32 v) { return emulator::reduce(emulator::Reduce::add, mask, v); }
DEV int __reduce_add_sync(u32 mask, int v) { return (int)emulator::reduce(emulator::Reduce::add, mask, (u32)v); }
DEV u32 __reduce_min_sync(u32 mask, u32 v) { return emulator::reduce(emulator::Reduce::min_unsigned, mask, v); }
DEV int __reduce_min_sync(u32 mask, int v) { return (int)emulator::reduce(emulator::Reduce::min_signed, mask, (u32)v); }
DEV u32 __reduce_max_sync(u32 mask, u32 v) { return emulator::reduce(emulator::Reduce::max_unsigned, mask, v); }
DEV int __reduce_max_sync(u32 mask, int v) { return (int)emulator::reduce(emulator::Reduce::max_signed, mask, (u32)v); }
DEV u32 __reduce_and_sync(u32 mask, u32 v) { return emulator::reduce(emulator::Reduce::bit_and, mask, v); }
DEV u32 __reduce_or_sync(u32 mask, u32 v) { return emulator::reduce(emulator::Reduce::bit_or, mask, v); }
DEV u32 __reduce_xor_sync(u32 mask, u32 v) { return emulator::reduce(emulator::Reduce::bit_xor, mask, v); }
bool elect_one();

// ---- barriers, fences, clusters ----------------------------------------------------------------------------------------
u32 smem_u32(const void* pointer);
void named_bar_sync(u32 id, u32 n);
void named_bar_arrive(u32 id, u32 n);
void mbar_init(u32 bar, u32 count);
void mbar_inval(u32 bar);
void fence_mbar_init();
void mbar_arrive(u32 bar);
void mbar_arrive_tx(u32 bar, u32 bytes);
void mbar_expect_tx(u32 bar, u32 bytes);
void mbar_arrive_cluster(u32 bar);
bool mbar_try_wait(u32 bar, u32 parity);
void mbar_wait(u32 bar, u32 parity);
void mbar_wait_cluster(u32 bar, u32 parity);
void fence_proxy_async();
void fence_proxy_async_global();
void fence_proxy_async_all();
DEV void __threadfence_block() { emulator::thread_fence(Scope::cta); }
DEV void __threadfence() { emulator::thread_fence(Scope::gpu); }
DEV void __threadfence_system() { emulator::thread_fence(Scope::sys); }
u32 cluster_rank();
u32 cluster_size();
void cluster_arrive();
void cluster_wait();
DEV void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}
u32 mapa(u32 address, u32 rank);
u32 ld_cluster(u32 address);
void st_cluster(u32 address, u32 value);
template <int R>
DEV void setmaxnreg_inc() {
    static_assert(R >= 24 && R <= 256 && R % 8 == 0, "setmaxnreg takes 24 to 256 in steps of 8");
    emulator::set_max_registers(R, true);
}
template <int R>
DEV void setmaxnreg_dec() {
    static_assert(R >= 24 && R <= 256 && R % 8 == 0, "setmaxnreg takes 24 to 256 in steps of 8");
    emulator::set_max_registers(R, false);
}
void griddep_wait();
void griddep_launch();
void __nanosleep(unsigned nanoseconds);
[[noreturn]] DEV void __trap() { emulator::trap(); }

// ---- memory order and atomics ------------------------------------------------------------------------------------------
template <Scope S = Scope::gpu>
DEV u32 ld_acquire(const u32* p) {
    return emulator::load_flag(p, emulator::Order::acquire, S);
}
template <Scope S = Scope::gpu>
DEV u32 ld_relaxed(const u32* p) {
    return emulator::load_flag(p, emulator::Order::relaxed, S);
}
template <Scope S = Scope::gpu>
DEV void st_release(u32* p, u32 v) {
    emulator::store_flag(p, v, emulator::Order::release, S);
}
template <Scope S = Scope::gpu>
DEV void st_relaxed(u32* p, u32 v) {
    emulator::store_flag(p, v, emulator::Order::relaxed, S);
}
#define EMULATOR_ATOM_ADD(name, order)                                                                             \
    template <Scope S = Scope::gpu>                                                                                \
    DEV u32 name(u32* p, u32 v) {                                                                                  \
        return (u32)emulator::read_modify_write(emulator::Rmw::add, emulator::Number::u32, p, v, 0,                \
                                                emulator::Order::order, S);                                        \
    }
EMULATOR_ATOM_ADD(atom_add_relaxed, relaxed)
EMULATOR_ATOM_ADD(atom_add_acquire, acquire)
EMULATOR_ATOM_ADD(atom_add_release, release)
EMULATOR_ATOM_ADD(atom_add_acq_rel, acq_rel)
#undef EMULATOR_ATOM_ADD
template <Scope S = Scope::gpu>
DEV u32 atom_cas_acq_rel(u32* p, u32 expected, u32 v) {
    return (u32)emulator::read_modify_write(emulator::Rmw::compare_exchange, emulator::Number::u32, p, v, expected,
                                            emulator::Order::acq_rel, S);
}
// CUDA's atomics are relaxed and device-wide.
#define EMULATOR_ATOMIC(name, operation, type) \
    DEV type name(type* p, type v) { return emulator::rmw(emulator::Rmw::operation, p, v); }
EMULATOR_ATOMIC(atomicAdd, add, int)
EMULATOR_ATOMIC(atomicAdd, add, unsigned)
EMULATOR_ATOMIC(atomicAdd, add, unsigned long long)
EMULATOR_ATOMIC(atomicAdd, add, float)
EMULATOR_ATOMIC(atomicAdd, add, double)
EMULATOR_ATOMIC(atomicMax, maximum, int)
EMULATOR_ATOMIC(atomicMax, maximum, unsigned)
EMULATOR_ATOMIC(atomicMin, minimum, int)
EMULATOR_ATOMIC(atomicMin, minimum, unsigned)
EMULATOR_ATOMIC(atomicExch, exchange, int)
EMULATOR_ATOMIC(atomicExch, exchange, unsigned)
EMULATOR_ATOMIC(atomicExch, exchange, float)
EMULATOR_ATOMIC(atomicAnd, bit_and, unsigned)
EMULATOR_ATOMIC(atomicOr, bit_or, unsigned)
EMULATOR_ATOMIC(atomicXor, bit_xor, unsigned)
#undef EMULATOR_ATOMIC
template <class T>
DEV T atomicCAS(T* p, T expected, T value) {
    return emulator::rmw(emulator::Rmw::compare_exchange, p, value, expected);
}

// ---- ldmatrix, stmatrix, mma ---------------------------------------------------------------------------------------------
#define EMULATOR_MATRIX(count, suffix, transposed)                                                                    \
    DEV void ldsm_x##count##suffix(u32 (&r)[count], u32 address) { emulator::load_matrix(r, count, transposed, address); } \
    DEV void stsm_x##count##suffix(u32 address, const u32 (&r)[count]) {                                              \
        emulator::store_matrix(r, count, transposed, address);                                                        \
    }
EMULATOR_MATRIX(1, , false)
EMULATOR_MATRIX(2, , false)
EMULATOR_MATRIX(4, , false)
EMULATOR_MATRIX(1, _t, true)
EMULATOR_MATRIX(2, _t, true)
EMULATOR_MATRIX(4, _t, true)
#undef EMULATOR_MATRIX
DEV void mma_m16n8k16_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    emulator::mma(emulator::Operand::bf16, d, a, b);
}
DEV void mma_m16n8k16_f16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    emulator::mma(emulator::Operand::f16, d, a, b);
}
DEV void mma_m16n8k32_e4m3(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    emulator::mma(emulator::Operand::e4m3, d, a, b);
}
DEV void mma_m16n8k32_s8(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    emulator::mma(emulator::Operand::s8, d, a, b);
}

// ---- wgmma -----------------------------------------------------------------------------------------------------------------
void wgmma_fence();
void wgmma_commit();
template <class T, int R>
DEV void pin(T (&)[R]) {}
template <int G, class T, int R>
DEV void wgmma_wait(T (&)[R]) {
    emulator::wgmma_wait(G);
}
namespace emulator {
constexpr bool wgmma_has_n(Operand type, int n) {
    return n >= 8 && n <= 256 && (type == Operand::s8 && n > 24 ? n % 16 == 0 : n % 8 == 0);
}
}  // namespace emulator
#define EMULATOR_WGMMA(type, value)                                                                                   \
    template <int N, int TransB = 0>                                                                                  \
    DEV void wgmma_rs_##type(value (&d)[N / 2], const u32 (&a)[4], u64 b, int scale_d) {                              \
        static_assert(emulator::wgmma_has_n(emulator::Operand::type, N), "no wgmma of this N");                       \
        emulator::wgmma({emulator::Operand::type, N, false, false, TransB != 0}, d, a, 0, b, scale_d);                \
    }                                                                                                                 \
    template <int N, int TransA = 0, int TransB = 0>                                                                  \
    DEV void wgmma_ss_##type(value (&d)[N / 2], u64 a, u64 b, int scale_d) {                                          \
        static_assert(emulator::wgmma_has_n(emulator::Operand::type, N), "no wgmma of this N");                       \
        emulator::wgmma({emulator::Operand::type, N, true, TransA != 0, TransB != 0}, d, nullptr, a, b, scale_d);     \
    }
EMULATOR_WGMMA(bf16, float)
EMULATOR_WGMMA(f16, float)
#undef EMULATOR_WGMMA
// 8-bit operands cannot be transposed: no such template parameters.
#define EMULATOR_WGMMA8(type, value)                                                                                  \
    template <int N>                                                                                                  \
    DEV void wgmma_rs_##type(value (&d)[N / 2], const u32 (&a)[4], u64 b, int scale_d) {                              \
        static_assert(emulator::wgmma_has_n(emulator::Operand::type, N), "no wgmma of this N");                       \
        emulator::wgmma({emulator::Operand::type, N, false, false, false}, d, a, 0, b, scale_d);                      \
    }                                                                                                                 \
    template <int N>                                                                                                  \
    DEV void wgmma_ss_##type(value (&d)[N / 2], u64 a, u64 b, int scale_d) {                                          \
        static_assert(emulator::wgmma_has_n(emulator::Operand::type, N), "no wgmma of this N");                       \
        emulator::wgmma({emulator::Operand::type, N, true, false, false}, d, nullptr, a, b, scale_d);                 \
    }
EMULATOR_WGMMA8(e4m3, float)
EMULATOR_WGMMA8(s8, int)
#undef EMULATOR_WGMMA8

// ---- asynchronous copies -----------------------------------------------------------------------------------------------------
DEV void cp_async16(u32 dst, const void* src, u32 bytes = 16) { emulator::cp_async(dst, src, 16, bytes); }
DEV void cp_async8(u32 dst, const void* src, u32 bytes = 8) { emulator::cp_async(dst, src, 8, bytes); }
DEV void cp_async4(u32 dst, const void* src, u32 bytes = 4) { emulator::cp_async(dst, src, 4, bytes); }
void cp_async_commit();
template <int N>
DEV void cp_async_wait() {
    emulator::cp_async_wait(N);
}
void cp_async_mbar_arrive(u32 bar);
DEV u64 cache_evict_first() { return 1; }
DEV u64 cache_evict_last() { return 2; }
DEV void cp_async16_hint(u32 dst, const void* src, u64) { emulator::cp_async(dst, src, 16, 16); }
DEV void prefetch_l2(const void*) {}
DEV void bulk_load(u32 dst, const void* src, u32 bytes, u32 bar) { emulator::bulk_load(dst, src, bytes, bar, false, 0); }
DEV void bulk_load_hint(u32 dst, const void* src, u32 bytes, u32 bar, u64) {
    emulator::bulk_load(dst, src, bytes, bar, false, 0);
}
DEV void bulk_load_multicast(u32 dst, const void* src, u32 bytes, u32 bar, uint16_t ctas) {
    emulator::bulk_load(dst, src, bytes, bar, true, ctas);
}
void bulk_copy_cluster(u32 dst, u32 src, u32 bytes, u32 bar);
DEV void bulk_store(void* dst, u32 src, u32 bytes) { emulator::bulk_store(dst, src, bytes, false); }
DEV void bulk_reduce_add_f32(float* dst, u32 src, u32 bytes) { emulator::bulk_store(dst, src, bytes, true); }
void bulk_commit();
template <int N>
DEV void bulk_wait() {
    emulator::bulk_wait(N, false);
}
template <int N>
DEV void bulk_wait_read() {
    emulator::bulk_wait(N, true);
}
DEV void tma_prefetch(const CUtensorMap*) {}

#define EMULATOR_ONE(...) __VA_ARGS__
#define EMULATOR_TMA(N, PARAMETERS, COORDINATES)                                                                      \
    DEV void tma_load_##N##d(u32 dst, const CUtensorMap* map, PARAMETERS, u32 bar) {                                  \
        emulator::tma_load(dst, map, {N, {COORDINATES}}, bar, false, 0);                                              \
    }                                                                                                                 \
    DEV void tma_load_##N##d_hint(u32 dst, const CUtensorMap* map, PARAMETERS, u32 bar, u64) {                        \
        emulator::tma_load(dst, map, {N, {COORDINATES}}, bar, false, 0);                                              \
    }                                                                                                                 \
    DEV void tma_load_##N##d_multicast(u32 dst, const CUtensorMap* map, PARAMETERS, u32 bar, uint16_t ctas) {         \
        emulator::tma_load(dst, map, {N, {COORDINATES}}, bar, true, ctas);                                            \
    }                                                                                                                 \
    DEV void tma_store_##N##d(const CUtensorMap* map, u32 src, PARAMETERS) {                                          \
        emulator::tma_store(map, src, {N, {COORDINATES}}, false);                                                     \
    }                                                                                                                 \
    DEV void tma_reduce_add_##N##d(const CUtensorMap* map, u32 src, PARAMETERS) {                                     \
        emulator::tma_store(map, src, {N, {COORDINATES}}, true);                                                      \
    }
EMULATOR_TMA(1, int c0, c0)
EMULATOR_TMA(2, EMULATOR_ONE(int c0, int c1), EMULATOR_ONE(c0, c1))
EMULATOR_TMA(3, EMULATOR_ONE(int c0, int c1, int c2), EMULATOR_ONE(c0, c1, c2))
EMULATOR_TMA(4, EMULATOR_ONE(int c0, int c1, int c2, int c3), EMULATOR_ONE(c0, c1, c2, c3))
EMULATOR_TMA(5, EMULATOR_ONE(int c0, int c1, int c2, int c3, int c4), EMULATOR_ONE(c0, c1, c2, c3, c4))
#undef EMULATOR_TMA
#undef EMULATOR_ONE

// ---- loads -----------------------------------------------------------------------------------------------------------------
template <class T>
DEV T __ldg(const T* p) {
    return *p;
}
DEV uint4 ldg_stream(const void* p) { return *static_cast<const uint4*>(p); }
