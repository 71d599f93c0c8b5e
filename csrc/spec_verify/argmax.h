// Index of the largest of n values, as torch.argmax gives it: ties and equal zeros take the lowest index, a NaN is
// larger than every number and the first NaN wins.
//
// Floating values are compared as integers that order the same way, so the compiler can vectorise the reduction for
// whatever instruction set the including file is compiled for, without -ffast-math. Everything here has internal
// linkage: the same template compiled for two instruction sets must not be merged by the linker.
#pragma once

#include <cstdint>

namespace {

// INFINITY_BITS: the bit pattern of +infinity in the format.
template <typename Int, Int INFINITY_BITS>
inline Int ordered_key(Int bits) {
    constexpr Int MAX = static_cast<Int>((static_cast<uint64_t>(1) << (8 * sizeof(Int) - 1)) - 1);
    const Int magnitude = bits & MAX;
    const Int key = bits < 0 ? static_cast<Int>(-magnitude) : magnitude;  // -0 and +0 both become 0
    return magnitude > INFINITY_BITS ? MAX : key;
}

template <typename Int, Int INFINITY_BITS>
int64_t argmax_bits(const Int* row, int64_t n) {
    // One pass finds the block that first reaches the maximum; only that block, still in L1, is read again.
    constexpr int64_t BLOCK = 2048;
    int64_t best_block = 0;
    Int best = 0;
    for (int64_t start = 0; start < n; start += BLOCK) {
        const int64_t end = start + BLOCK < n ? start + BLOCK : n;
        Int block_best = ordered_key<Int, INFINITY_BITS>(row[start]);
        for (int64_t i = start + 1; i < end; ++i) {
            const Int key = ordered_key<Int, INFINITY_BITS>(row[i]);
            block_best = key > block_best ? key : block_best;
        }
        if (start == 0 || block_best > best) {
            best = block_best;
            best_block = start;
        }
    }
    int64_t index = best_block;
    while (ordered_key<Int, INFINITY_BITS>(row[index]) != best) {
        ++index;
    }
    return index;
}

inline int64_t argmax_f32(const void* row, int64_t n) {
    return argmax_bits<int32_t, 0x7f800000>(static_cast<const int32_t*>(row), n);
}

inline int64_t argmax_f16(const void* row, int64_t n) {
    return argmax_bits<int16_t, 0x7c00>(static_cast<const int16_t*>(row), n);
}

inline int64_t argmax_bf16(const void* row, int64_t n) {
    return argmax_bits<int16_t, 0x7f80>(static_cast<const int16_t*>(row), n);
}

}  // namespace
