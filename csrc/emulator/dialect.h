// The words of CUDA C++ that are no hardware primitives: qualifiers, vector types, indices, shared-memory declarations.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>
#include <tuple>
#include <type_traits>
#include <utility>

typedef uint32_t u32;
typedef uint64_t u64;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define DEV __forceinline__
// __shared__, __constant__ and __cluster_dims__ are left undefined: use DYN_SMEM and STATIC_SMEM, kernel parameters,
// and LaunchConfig::cluster, which the emulator can see.

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned X = 1, unsigned Y = 1, unsigned Z = 1) : x(X), y(Y), z(Z) {}
};
#define EMULATOR_VECTORS(type, name)                                                                       \
    struct alignas(2 * sizeof(type)) name##2 {                                                             \
        type x, y;                                                                                         \
    };                                                                                                     \
    struct alignas(4 * sizeof(type)) name##4 {                                                             \
        type x, y, z, w;                                                                                   \
    };                                                                                                     \
    DEV name##2 make_##name##2(type x, type y) { return {x, y}; }                                          \
    DEV name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATOR_VECTORS(int, int)
EMULATOR_VECTORS(unsigned, uint)
EMULATOR_VECTORS(float, float)
#undef EMULATOR_VECTORS

constexpr int warpSize = 32;

namespace emulator {
// Which thread is running: what threadIdx, blockIdx, blockDim and gridDim read.
struct Indices {
    uint3 thread, block;
    dim3 block_size, grid_size;
};
extern const Indices* indices;

char* dynamic_smem();
void* static_smem(const void* key, size_t bytes, size_t alignment);
}  // namespace emulator

#define threadIdx (emulator::indices->thread)
#define blockIdx (emulator::indices->block)
#define blockDim (emulator::indices->block_size)
#define gridDim (emulator::indices->grid_size)

#define DYN_SMEM(name) char* name = emulator::dynamic_smem()
// The address of a static marks the declaration; every CTA has its own memory for it.
#define STATIC_SMEM(type, name, extent)                                                                      \
    static const char name##_key = 0;                                                                        \
    typedef type name##_type extent;                                                                         \
    name##_type& name = *static_cast<name##_type*>(emulator::static_smem(                                    \
        &name##_key, sizeof(name##_type), alignof(name##_type) < 16 ? 16 : alignof(name##_type)))
