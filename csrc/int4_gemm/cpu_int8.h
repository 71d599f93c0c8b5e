// Packing of int8 activations: per row and group one scale, values rounded to -127..127.
// Within a unit the even rows of K come before the odd ones: 0 2 4 6 1 3 5 7. One AND takes the even nibbles out of a
// word as four bytes, a shift and an AND the odd ones.
#pragma once

#include "cpu_tiles.h"
#include "cpu_vector.h"

namespace tokenmill::int4 {
namespace {

constexpr int kInt8UnitBytes = 8;

TM_INLINE int32_t four_bytes(const uint8_t* bytes) {
  int32_t value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

TM_INLINE float largest_of(__m256 v) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// How the values of one row and group are quantised.
struct Quantiser {
  __m256 inverse;
  float scale;
  bool finite;
};

// One unit at a time: eight floats are one AVX register, on every instruction set that comes here.
TM_INLINE Quantiser quantiser_of(const float* values, int32_t units) {
  const __m256 sign = _mm256_set1_ps(-0.0f), greatest = _mm256_set1_ps(3.402823466e38f);
  __m256 magnitudes = _mm256_setzero_ps(), beyond = _mm256_setzero_ps();
  for (int32_t u = 0; u < units; ++u) {
    const __m256 magnitude = _mm256_andnot_ps(sign, _mm256_loadu_ps(values + int64_t(u) * kUnit));
    magnitudes = _mm256_max_ps(magnitudes, magnitude);
    beyond = _mm256_or_ps(beyond, _mm256_cmp_ps(magnitude, greatest, _CMP_NLE_UQ));
  }
  // An infinity or a NaN in x has to show in y: the scale carries it.
  const bool finite = _mm256_movemask_ps(beyond) == 0;
  const float largest = largest_of(magnitudes);
  return {_mm256_set1_ps(finite && largest > 0.0f ? 127.0f / largest : 0.0f),
          finite ? largest / 127.0f : __builtin_nanf(""), finite};
}

// Writes units, `stride` bytes apart, and adds their values to `sum`.
TM_INLINE void quantise(const float* values, int32_t units, const Quantiser& q, uint8_t* out, int64_t stride,
                        __m256i& sum) {
  const __m256i even_odd = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  for (int32_t u = 0; u < units; ++u, values += kUnit, out += stride) {
    const __m256 value = _mm256_mul_ps(_mm256_loadu_ps(values), q.inverse);
    const __m256i rounded = q.finite ? _mm256_cvtps_epi32(value) : _mm256_set1_epi32(1);
    sum = _mm256_add_epi32(sum, rounded);
    const __m256i ordered = _mm256_permutevar8x32_epi32(rounded, even_odd);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packs_epi16(words, words));
  }
}

// At most 127 * group of them: exact in float up to groups of 132104 rows, rounded once beyond.
TM_INLINE float total_of(__m256i sum) { return sum_of(_mm256_cvtepi32_ps(sum)); }

}  // namespace
}  // namespace tokenmill::int4
