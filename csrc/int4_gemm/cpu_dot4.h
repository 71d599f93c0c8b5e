// INT4 weights times int8 activations with VPDPBUSD (AVX512_VNNI or AVX-VNNI): unsigned codes by signed activations,
// four products at a time, exact in int32. The including file defines dot4(sum, codes, activations).
#pragma once

#include "cpu_ahead.h"
#include "cpu_int8.h"
#include "cpu_vector.h"

namespace tokenmill::int4 {
namespace {

struct Dot4 {
  static constexpr int kUnitBytes = kInt8UnitBytes;
  static constexpr int kMaxRows = Vector::kParts == 1 ? 24 : 6;

  static constexpr int width(int rows) {
    if (Vector::kParts == 1) return rows <= 3 ? 8 : rows <= 6 ? 4 : rows <= 12 ? 2 : 1;
    return rows == 1 ? 4 : rows <= 3 ? 2 : 1;
  }

  template <int MB, int NB>
  static void tile(const Weight& w, const uint8_t* x, const float* sums, const float* scales, int64_t block,
                   float* out) {
    constexpr int kParts = Vector::kParts, NR = NB * kParts;
    const Vector::Int nibbles = Vector::all(0x0f0f0f0f);
    const int64_t stride = w.units * kLine;
    const uint8_t* lines = w.lines + block * stride;
    std::memset(out, 0, sizeof(float) * MB * NB * kBlock);
    const LinesAhead<NB> ahead(w);
    for (int64_t g = 0; g < w.groups; ++g) {
      ask_for_scales<NB>(w, block + NB, g);
      Vector::Int acc[NR][MB];
      unroll<0, NR>([&](auto r) { unroll<0, MB>([&](auto m) { acc[r.value][m.value] = Vector::zero_int(); }); });
      for (int32_t u = w.group_units[g]; u < w.group_units[g + 1]; ++u) {
        const uint8_t* later = ahead.of(lines, u);
        unroll<0, NR>([&](auto r) {
          if (r.value % kParts == 0) ask_for(later + r.value / kParts * stride);
          const Vector::Int q = Vector::load(lines + r.value / kParts * stride + r.value % kParts * 32);
          const Vector::Int even = Vector::both(q, nibbles);
          const Vector::Int odd = Vector::both(Vector::template shift_right<4>(q), nibbles);
          unroll<0, MB>([&](auto m) {
            const uint8_t* row = x + m.value * kUnitBytes;
            Vector::Int& sum = acc[r.value][m.value];
            sum = dot4(sum, even, Vector::all(four_bytes(row)));
            sum = dot4(sum, odd, Vector::all(four_bytes(row + 4)));
          });
        });
        lines += kLine;
        x += MB * kUnitBytes;
      }
      unroll<0, NR>([&](auto r) {
        unroll<0, MB>([&](auto m) {
          add_int8_group(w, g, block, r.value, acc[r.value][m.value], sums[g * MB + m.value], scales[g * MB + m.value],
                         out + m.value * NB * kBlock + r.value * kLanes);
        });
      });
    }
  }

  static void pack_row(const float* row, const Weight& w, int, uint8_t* out, int64_t stride, float* sums,
                       float* scales, int sum_stride) {
    pack_int8_row(row, w, out, stride, sums, scales, sum_stride);
  }
};

}  // namespace
}  // namespace tokenmill::int4
