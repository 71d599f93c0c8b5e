// Matrix arithmetic that mma.sync and wgmma share.
#pragma once
#include "machine.h"

namespace emulator {
inline int operand_bytes(Operand type) { return type == Operand::e4m3 || type == Operand::s8 ? 1 : 2; }
inline int operand_k(Operand type) { return 32 / operand_bytes(type); }
// `count` elements as floats (integers up to 127 are exact).
void decode(Operand type, const void* elements, int count, float* values);
// The 16 x K fragment of a warp's A: four registers of each lane, as rows of values.
void decode_a_fragment(Operand type, const u32* const registers[32], float a[16][32]);
// d[16][n] += a[16][k] * b[k][n], in float32 (exact for 8-bit integers) in order of k.
void multiply_add(float* d, const float a[16][32], const float* b, int k, int n);
void multiply_add(int* d, const float a[16][32], const float* b, int k, int n);
}  // namespace emulator
