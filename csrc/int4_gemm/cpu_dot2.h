// INT4 weights times int16 activations: codes by activations, two products at a time, exact in int32. Where there are no
// products of bf16 this is W4A16: a product of pairs of integers takes half of what two products of floats do, and no
// code has to become a float. The including file defines dot2(sum, codes, activations).
#pragma once

#include "cpu_dots.h"
#include "cpu_int16.h"

namespace tokenmill::int4 {
namespace {

struct Dot2 {
  using Code = Vector::Int;
  using Sum = Vector::Int;
  static constexpr int kUnitBytes = kInt16UnitBytes;
  static constexpr int kSteps = 4;  // rows i and i + 4 of K
  static constexpr int kMaxRows = kDotsMaxRows;
  static constexpr int32_t kMostUnits = 256;  // 2048 products of at most 15 * 32767

  static constexpr int width(int rows) { return dots_width(rows); }

  template <int kStep>
  TM_INLINE static Code decode(const uint8_t* unit, int part) {
    const Vector::Int q = Vector::load(unit + part * 32);
    return Vector::both(kStep == 0 ? q : Vector::template shift_right<4 * kStep>(q), Vector::all(0x000f000f));
  }
  TM_INLINE static Vector::Int row(const uint8_t* x, int step) { return Vector::all(four_bytes(x + 4 * step)); }
  TM_INLINE static Sum multiply_add(Code code, Vector::Int row, Sum sum) { return dot2(sum, code, row); }

  template <int MB, int NB>
  static void tile(const Weight& w, const uint8_t* x, const float* sums, const float* scales, int64_t block,
                   float* out) {
    dots_tile<Dot2, MB, NB>(w, x, sums, scales, block, out);
  }

  static void pack_group(const float* values, int32_t units, uint8_t* out, int64_t stride, float* sum, float* scale) {
    pack_int16(values, units, out, stride, sum, scale);
  }
};

}  // namespace
}  // namespace tokenmill::int4
