// What int8 and int16 activations share: reading them, and what their packing asks of the values of one row and group.
// One unit at a time: eight floats are one AVX register, on every instruction set that comes here.
#pragma once

#include "cpu_tiles.h"
#include "cpu_vector.h"

namespace tokenmill::int4 {
namespace {

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

struct Largest {
  float magnitude;
  bool finite;  // all of them; an infinity or a NaN in x has to show in y: the scale carries it
};

TM_INLINE Largest largest_of(const float* values, int32_t units) {
  const __m256 sign = _mm256_set1_ps(-0.0f), greatest = _mm256_set1_ps(3.402823466e38f);
  __m256 magnitudes = _mm256_setzero_ps(), beyond = _mm256_setzero_ps();
  for (int32_t u = 0; u < units; ++u) {
    const __m256 magnitude = _mm256_andnot_ps(sign, _mm256_loadu_ps(values + int64_t(u) * kUnit));
    magnitudes = _mm256_max_ps(magnitudes, magnitude);
    beyond = _mm256_or_ps(beyond, _mm256_cmp_ps(magnitude, greatest, _CMP_NLE_UQ));
  }
  return {largest_of(magnitudes), _mm256_movemask_ps(beyond) == 0};
}

// The integers that eight values are, whatever stands for those of a group that is not finite.
TM_INLINE __m256i rounded(const float* values, __m256 inverse, bool finite) {
  return finite ? _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values), inverse)) : _mm256_set1_epi32(1);
}

// Of the integers of a group: exact in float up to 2^24, which takes groups of 132104 rows of int8 or 512 of int16, and
// rounded once beyond.
TM_INLINE float total_of(__m256i sum) { return sum_of(_mm256_cvtepi32_ps(sum)); }

}  // namespace
}  // namespace tokenmill::int4
