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
  // Of 16 registers six rows would need each: GCC keeps a sum of them in memory, and its latency is what they take.
  static constexpr int kMaxRows = Vector::kParts == 1 ? 12 : 5;

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
    const int64_t stride = w.units * kLine;
    const uint8_t* lines = w.lines + block * stride;
    std::memset(out, 0, sizeof(float) * MB * NB * kBlock);
    const LinesAhead<NB, kCodesAhead> ahead(w);
    for (int64_t g = 0; g < w.groups; ++g) {
      ask_for_scales<NB>(w, block + NB, g);
      Sum dots[NB * Vector::kParts][MB];
      zero<Dot4, MB, NB>(dots);
      for (int32_t u = w.group_units[g]; u < w.group_units[g + 1]; ++u) {
        ask_for_codes<NB>(ahead.of(lines, u), stride);
        add_unit<Dot4, Stored<Dot4>, MB, NB>(dots, lines, stride, x);
        lines += kLine;
        x += MB * kUnitBytes;
      }
      add_group<MB, NB>(w, block, g, dots, sums + g * MB, scales + g * MB, out);
    }
  }

  // Adds a group to the totals: (dot - zero * sum) * weight scale * activation scale.
  template <int MB, int NB>
  TM_INLINE static void add_group(const Weight& w, int64_t block, int64_t group,
                                  const Sum (&dots)[NB * Vector::kParts][MB], const float* sums, const float* scales,
                                  float* totals) {
    // A fence for the compiler, as in cpu_floating.h: totals kept in registers leave too few for the sums.
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    unroll<0, NB * Vector::kParts>([&](auto r) {
      const int64_t place = place_of<r.value>(w, block, group);
      const Vector::Float zero = load_zeros(w, place), scale = load_scales(w, place);
      unroll<0, MB>([&](auto m) {
        float* total = totals + m.value * NB * kBlock + r.value * kLanes;
        const Vector::Float value =
            Vector::subtract_product(zero, Vector::all(sums[m.value]), Vector::to_float(dots[r.value][m.value]));
        const Vector::Float both = Vector::multiply(scale, Vector::all(scales[m.value]));
        Vector::store(total, Vector::multiply_add(value, both, Vector::load(total)));
      });
    });
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
