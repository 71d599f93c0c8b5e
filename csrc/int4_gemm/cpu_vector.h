// The few vector operations that the arithmetics need, for AVX-512 and AVX2 alike: a block of 16 columns is one
// register of the one or two of the other. Compiled once per instruction set.
#pragma once

#include <immintrin.h>

#include "cpu.h"

namespace tokenmill::int4 {
namespace {

#ifdef __AVX512F__

struct Vector {
  using Float = __m512;
  using Int = __m512i;
  static constexpr int kParts = 1;  // registers of a block

  TM_INLINE static Float zero() { return _mm512_setzero_ps(); }
  TM_INLINE static Float all(float value) { return _mm512_set1_ps(value); }
  TM_INLINE static Int all(int32_t value) { return _mm512_set1_epi32(value); }
  TM_INLINE static Int load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  TM_INLINE static Float load(const float* p) { return _mm512_load_ps(p); }
  TM_INLINE static void store(float* p, Float v) { _mm512_store_ps(p, v); }
  TM_INLINE static Int both(Int a, Int b) { return _mm512_and_si512(a, b); }
  template <int kBits>
  TM_INLINE static Int shift_right(Int v) {
    return _mm512_srli_epi32(v, kBits);
  }
  TM_INLINE static Float to_float(Int v) { return _mm512_cvtepi32_ps(v); }
  TM_INLINE static Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
  TM_INLINE static Float multiply_add(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  TM_INLINE static Float subtract_product(Float a, Float b, Float c) { return _mm512_fnmadd_ps(a, b, c); }

  TM_INLINE static Float from_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  TM_INLINE static Float from_bf16(const uint16_t* p) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  }
  TM_INLINE static Float from_float(const float* p) { return _mm512_loadu_ps(p); }
  TM_INLINE static Float from_bytes(const uint8_t* p) {
    return to_float(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
};

#else

struct Vector {
  using Float = __m256;
  using Int = __m256i;
  static constexpr int kParts = 2;

  TM_INLINE static Float zero() { return _mm256_setzero_ps(); }
  TM_INLINE static Float all(float value) { return _mm256_set1_ps(value); }
  TM_INLINE static Int all(int32_t value) { return _mm256_set1_epi32(value); }
  TM_INLINE static Int load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  TM_INLINE static Float load(const float* p) { return _mm256_load_ps(p); }
  TM_INLINE static void store(float* p, Float v) { _mm256_store_ps(p, v); }
  TM_INLINE static Int both(Int a, Int b) { return _mm256_and_si256(a, b); }
  template <int kBits>
  TM_INLINE static Int shift_right(Int v) {
    return _mm256_srli_epi32(v, kBits);
  }
  TM_INLINE static Float to_float(Int v) { return _mm256_cvtepi32_ps(v); }
  TM_INLINE static Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
  TM_INLINE static Float multiply_add(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  TM_INLINE static Float subtract_product(Float a, Float b, Float c) { return _mm256_fnmadd_ps(a, b, c); }

  TM_INLINE static Float from_half(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  TM_INLINE static Float from_bf16(const uint16_t* p) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
  }
  TM_INLINE static Float from_float(const float* p) { return _mm256_loadu_ps(p); }
  TM_INLINE static Float from_bytes(const uint8_t* p) {
    return to_float(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
};

#endif

TM_INLINE float sum_of(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

constexpr int kLanes = kBlock / Vector::kParts;  // columns of a register

// Where the scales and zero points of register `kReg` of the blocks from `block` on begin.
template <int kReg>
TM_INLINE int64_t place_of(const Weight& w, int64_t block, int64_t group) {
  return ((block + kReg / Vector::kParts) * w.groups + group) * kBlock + kReg % Vector::kParts * kLanes;
}

// Scales and zero points of the columns of one register; `index` counts from the start of the array.
TM_INLINE Vector::Float load_scales(const Weight& w, int64_t index) {
  if (w.scale_type == Type::kFloat32) return Vector::from_float(static_cast<const float*>(w.scales) + index);
  const auto* raw = static_cast<const uint16_t*>(w.scales) + index;
  return w.scale_type == Type::kFloat16 ? Vector::from_half(raw) : Vector::from_bf16(raw);
}

TM_INLINE Vector::Float load_zeros(const Weight& w, int64_t index) {
  return w.zeros ? Vector::from_bytes(w.zeros + index) : Vector::all(8.0f);
}

}  // namespace
}  // namespace tokenmill::int4
