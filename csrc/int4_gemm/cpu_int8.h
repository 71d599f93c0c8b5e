// Packing of int8 activations: per row and group one scale, values rounded to -127..127.
// Within a unit the even rows of K come before the odd ones: 0 2 4 6 1 3 5 7. One AND takes the even nibbles out of a
// word as four bytes, a shift and an AND the odd ones.
#pragma once

#include "cpu_integers.h"

namespace tokenmill::int4 {
namespace {

constexpr int kInt8UnitBytes = 8;

// How the values of one row and group are quantised.
struct Quantiser {
  __m256 inverse;
  float scale;
  bool finite;
};

TM_INLINE Quantiser quantiser_of(const float* values, int32_t units) {
  const Largest largest = largest_of(values, units);
  const bool finite = largest.finite;
  return {_mm256_set1_ps(finite && largest.magnitude > 0.0f ? 127.0f / largest.magnitude : 0.0f),
          finite ? largest.magnitude / 127.0f : __builtin_nanf(""), finite};
}

// Writes units, `stride` bytes apart, and adds their values to `sum`.
TM_INLINE void quantise(const float* values, int32_t units, const Quantiser& q, uint8_t* out, int64_t stride,
                        __m256i& sum) {
  const __m256i even_odd = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  for (int32_t u = 0; u < units; ++u, values += kUnit, out += stride) {
    const __m256i integers = rounded(values, q.inverse, q.finite);
    sum = _mm256_add_epi32(sum, integers);
    const __m256i ordered = _mm256_permutevar8x32_epi32(integers, even_odd);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packs_epi16(words, words));
  }
}

}  // namespace
}  // namespace tokenmill::int4
