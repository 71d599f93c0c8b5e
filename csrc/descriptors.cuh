// Shared-memory layouts that wgmma and TMA agree on: swizzles and wgmma matrix descriptors.
// Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout" and "Swizzling Modes".
#pragma once

// How 16-byte chunks are permuted inside the rows of a tile; the numbers are CUtensorMapSwizzle's.
enum class Swizzle : u32 { none = 0, b32 = 1, b64 = 2, b128 = 3 };

// The address where TMA puts (and wgmma looks for) the byte at linear tile offset `address`:
// bits 4.. are XORed with the row bits 7.. ; tiles must start at a multiple of 1024 (b128), 512 (b64), 256 (b32).
__host__ __device__ __forceinline__ constexpr u32 swizzled(u32 address, Swizzle mode) {
    return mode == Swizzle::b128  ? address ^ (address >> 3 & 0x70)
           : mode == Swizzle::b64 ? address ^ (address >> 3 & 0x30)
           : mode == Swizzle::b32 ? address ^ (address >> 3 & 0x10)
                                  : address;
}

// wgmma matrix descriptor: start address, leading and stride byte offsets (all multiples of 16), swizzle mode.
//
// K-major operand (rows of K):   stride_bytes: from 8 rows to the next 8; leading_bytes: from 8 K-elements'
//     16-byte column to the next (Swizzle::none only; ignored otherwise). Advance K by adding bytes >> 4.
// MN-major operand (transposed): leading_bytes: from one swizzle row of MN to the next (32/64/128 bytes wide);
//     stride_bytes: from 8 K-rows to the next 8. With Swizzle::none the two change places.
__host__ __device__ __forceinline__ constexpr u64 wgmma_descriptor(u32 address, u32 leading_bytes, u32 stride_bytes,
                                                                   Swizzle mode) {
    // the descriptor numbers its modes from the widest: 1 is 128 bytes, 3 is 32 bytes
    const u32 layout = mode == Swizzle::none ? 0 : 4 - (u32)mode;
    return (u64)((address & 0x3ffff) >> 4) | (u64)(leading_bytes >> 4 & 0x3fff) << 16 |
           (u64)(stride_bytes >> 4 & 0x3fff) << 32 | (u64)layout << 62;
}

// Descriptor of a K-major tile with 128-byte rows and 128-byte swizzle: groups of 8 rows are 1024 bytes apart.
__host__ __device__ __forceinline__ constexpr u64 desc_sw128(u32 address) {
    return wgmma_descriptor(address, 16, 1024, Swizzle::b128);
}
