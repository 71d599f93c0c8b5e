// Packing of float16 and bfloat16 activations as int16: per row and group one scale, a power of two, so that a value is
// exact unless it is 2^7 (bfloat16) or 2^4 (float16) times smaller than the group's largest, and otherwise off by at most
// 2^-15 of that.
//
// Within a unit rows i and i + 4 of K stand side by side, as an AND leaves codes in a word.
#pragma once

#include "cpu_integers.h"

namespace tokenmill::int4 {
namespace {

constexpr int kInt16UnitBytes = 16;

// How the values of one row and group become integers.
struct Int16Quantiser {
  __m256 inverse;
  float scale;
  bool finite;
};

TM_INLINE Int16Quantiser int16_quantiser_of(const float* values, int32_t units) {
  const Largest largest = largest_of(values, units);
  // The largest is less than 2^15 steps; a step is not so small that there is no inverse.
  const uint32_t exponent = to_bits(largest.magnitude) >> 23, step = (exponent < 15 ? 15 : exponent) - 14;
  return {_mm256_set1_ps(from_bits((254 - step) << 23)), largest.finite ? from_bits(step << 23) : __builtin_nanf(""),
          largest.finite};
}

// Packs one group of a row: its values as integers, `stride` bytes from unit to unit, their sum, and their scale.
TM_INLINE void pack_int16(const float* values, int32_t units, uint8_t* out, int64_t stride, float* sum, float* scale) {
  const Int16Quantiser q = int16_quantiser_of(values, units);
  *scale = q.scale;
  __m256i total = _mm256_setzero_si256();
  for (int32_t u = 0; u < units; ++u, values += kUnit, out += stride) {
    const __m256i integers = rounded(values, q.inverse, q.finite);
    total = _mm256_add_epi32(total, integers);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(integers), _mm256_extracti128_si256(integers, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi16(words, _mm_srli_si128(words, 8)));
  }
  *sum = total_of(total);
}

}  // namespace
}  // namespace tokenmill::int4
