// INT4 weights times float32 activations, for AVX2 and AVX-512.
//
// No shifts: code i of a word is masked in place and converted, which gives code * 16^i, and the activation of row i
// was multiplied by 16^-i (exact) while it was packed. Only the last code is shifted, since in place it would be signed.
#pragma once

#include "cpu_floating.h"

namespace tokenmill::int4 {
namespace {

struct Float32 {
  using Code = Vector::Float;
  using Sum = Vector::Float;
  static constexpr int kUnitBytes = kUnit * int(sizeof(float));
  static constexpr int kSteps = kUnit;
  static constexpr int kMaxRows = Vector::kParts == 1 ? 16 : 6;
  static constexpr int kTallFrom = Vector::kParts == 1 ? 73 : 9;
  static constexpr int kTallRows = Vector::kParts == 1 ? 12 : 6;
  static constexpr int kPanelBlocks = Vector::kParts == 1 ? kStrip : 1;  // second-level or first-level cache

  // Blocks at once: enough accumulators to hide the latency of FMA, few enough for the registers (32 or 16).
  static constexpr int width(int rows) {
    if (Vector::kParts == 1) return rows <= 6 ? 4 : rows <= 12 ? 2 : 1;
    return rows == 1 ? 4 : rows == 2 ? 2 : 1;
  }

  template <int kStep>
  TM_INLINE static Code decode(const uint8_t* unit, int part) {
    const Vector::Int q = Vector::load(unit + part * 32);
    return Vector::to_float(kStep == kUnit - 1 ? Vector::template shift_right<28>(q)
                                               : Vector::both(q, Vector::all(int32_t(0xfu << (4 * kStep)))));
  }

  TM_INLINE static Vector::Float row(const uint8_t* x, int step) {
    return Vector::all(reinterpret_cast<const float*>(x)[step]);
  }
  TM_INLINE static Sum multiply_add(Code code, Vector::Float row, Sum sum) {
    return Vector::multiply_add(code, row, sum);
  }
  TM_INLINE static bool has_offset(const Weight&) { return true; }
  TM_INLINE static Vector::Float offset(Vector::Float zero) { return zero; }

  template <int MB, int NB>
  static void tile(const Weight& w, const uint8_t* x, const float* sums, const float*, int64_t block, float* out) {
    stored_tile<Float32, MB, NB>(w, x, sums, block, out);
  }

  static void pack_group(const float* values, int32_t units, uint8_t* out, int64_t stride, float* sum, float*) {
    const __m256 powers = _mm256_setr_ps(1.0f, 0x1p-4f, 0x1p-8f, 0x1p-12f, 0x1p-16f, 0x1p-20f, 0x1p-24f, 1.0f);
    __m256 total = _mm256_setzero_ps();
    for (int32_t u = 0; u < units; ++u, values += kUnit, out += stride) {
      const __m256 unit = _mm256_loadu_ps(values);
      total = _mm256_add_ps(total, unit);
      _mm256_storeu_ps(reinterpret_cast<float*>(out), _mm256_mul_ps(unit, powers));
    }
    *sum = sum_of(total);
  }
};

}  // namespace
}  // namespace tokenmill::int4
