// The only way from device code to the hardware's own instructions.
//
// The same kernel source compiles twice: nvcc gives these names inline PTX; a host compiler with
// TOKENMILL_EMULATED gives them the emulator (csrc/emulator), which executes and checks the kernel on a CPU.
// A name that is not here has no meaning in the emulated build and does not compile there.
//
// Shared memory is addressed by 32-bit shared-window addresses (`smem_u32`), global memory by pointers.
// Source of all semantics: NVIDIA, "Parallel Thread Execution ISA", version 8.x.
#pragma once
#ifdef TOKENMILL_EMULATED
#include "emulator/device.h"
#else

#include <cstdint>
#include <cuda.h>
#include <cuda_runtime.h>

typedef uint32_t u32;
typedef uint64_t u64;
#define DEV __device__ __forceinline__

// DYN_SMEM(name);                 extern __shared__: promised to be 16-byte aligned only
// STATIC_SMEM(type, name, [n]);   __shared__ type name[n]
#define DYN_SMEM(name) extern __shared__ __align__(16) char name[]
#define STATIC_SMEM(type, name, extent) __shared__ type name extent

// 32-bit shared-window address of a pointer into shared memory.
DEV u32 smem_u32(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

#include "ptx_sync.cuh"
#include "ptx_copy.cuh"
#include "ptx_tensor.cuh"
#include "ptx_wgmma.cuh"
#include "ptx_math.cuh"
#endif

#include "descriptors.cuh"
