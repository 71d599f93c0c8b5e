// INT4 weights times int8 activations with VPDPBUSD (AVX512_VNNI or AVX-VNNI): unsigned codes by signed activations,
// four products at a time, exact in int32. The including file defines dot4(sum, codes, activations).
#pragma once

#include "cpu_int8.h"
#include "cpu_units.h"

namespace tokenmill::int4 {
namespace {

struct Dot4 {
  using Code = Vector::Int;
  using Sum = Vector::Int;
  static constexpr int kUnitBytes = kInt8UnitBytes;
  static constexpr int kSteps = 2;  // even rows of K and odd ones
  static constexpr int kMaxRows = Vector::kParts == 1 ? 12 : 6;

  static constexpr int width(int rows) {
    if (Vector::kParts == 1) return rows <= 6 ? 4 : 2;
    return rows == 1 ? 4 : rows == 2 ? 2 : 1;
  }

  template <int kStep>
  TM_INLINE static Code decode(const uint8_t* unit, int part) {
    const Vector::Int q = Vector::load(unit + part * 32);
    return Vector::both(kStep == 0 ? q : Vector::template shift_right<4>(q), Vector::all(0x0f0f0f0f));
  }
  TM_INLINE static Vector::Int row(const uint8_t* x, int step) { return Vector::all(four_bytes(x + 4 * step)); }
  TM_INLINE static Sum multiply_add(Code code, Vector::Int row, Sum sum) { return dot4(sum, code, row); }

  // Not inlined: the compiler has registers for one loop of this kind.
  template <int MB, int NB>
  [[gnu::noinline]] static void tile(const Weight& w, const uint8_t* x, const float* sums, const float* scales,
                                     int64_t block, float* out) {
    constexpr int kRegisters = NB * Vector::kParts;
    const int64_t stride = w.units * kLine;
    const uint8_t* lines = w.lines + block * stride;
    std::memset(out, 0, sizeof(float) * MB * NB * kBlock);
    const LinesAhead<NB, kCodesAhead> ahead(w);
    for (int64_t g = 0; g < w.groups; ++g) {
      ask_for_scales<NB>(w, block + NB, g);
      Sum dots[kRegisters][MB];
      zero<Dot4, MB, NB>(dots);
      for (int32_t u = w.group_units[g]; u < w.group_units[g + 1]; ++u) {
        ask_for_codes<NB>(ahead.of(lines, u), stride);
        add_unit<Dot4, Stored<Dot4>, MB, NB>(dots, lines, stride, x);
        lines += kLine;
        x += MB * kUnitBytes;
      }
      unroll<0, kRegisters>([&](auto r) {
        unroll<0, MB>([&](auto m) {
          add_int8_group(w, g, block, r.value, dots[r.value][m.value], sums[g * MB + m.value], scales[g * MB + m.value],
                         out + m.value * NB * kBlock + r.value * kLanes);
        });
      });
    }
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
