// INT4 weights times int8 activations with VPDPBUSD (AVX512_VNNI or AVX-VNNI): unsigned codes by signed activations,
// four products at a time, exact in int32. The including file defines dot4(sum, codes, activations).
#pragma once

#include "cpu_dots.h"
#include "cpu_int8.h"

namespace tokenmill::int4 {
namespace {

struct Dot4 {
  using Code = Vector::Int;
  using Sum = Vector::Int;
  static constexpr int kUnitBytes = kInt8UnitBytes;
  static constexpr int kSteps = 2;  // even rows of K and odd ones
  static constexpr int kMaxRows = kDotsMaxRows;
  static constexpr int32_t kMostUnits = 1 << 16;

  static constexpr int width(int rows) { return dots_width(rows); }

  template <int kStep>
  TM_INLINE static Code decode(const uint8_t* unit, int part) {
    const Vector::Int q = Vector::load(unit + part * 32);
    return Vector::both(kStep == 0 ? q : Vector::template shift_right<4>(q), Vector::all(0x0f0f0f0f));
  }
  TM_INLINE static Vector::Int row(const uint8_t* x, int step) { return Vector::all(four_bytes(x + 4 * step)); }
  TM_INLINE static Sum multiply_add(Code code, Vector::Int row, Sum sum) { return dot4(sum, code, row); }

  template <int MB, int NB>
  static void tile(const Weight& w, const uint8_t* x, const float* sums, const float* scales, int64_t block,
                   float* out) {
    dots_tile<Dot4, MB, NB>(w, x, sums, scales, block, out);
  }

  static void pack_group(const float* values, int32_t units, uint8_t* out, int64_t stride, float* sum, float* scale) {
    const Quantiser q = quantiser_of(values, units);
    __m256i total = _mm256_setzero_si256();
    quantise(values, units, q, out, stride, total);
    *sum = total_of(total);
    *scale = q.scale;
  }
};

}  // namespace
}  // namespace tokenmill::int4
