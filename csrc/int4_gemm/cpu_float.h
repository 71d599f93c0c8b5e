// INT4 weights times float32 activations, for AVX2 and AVX-512 without BF16.
//
// No shifts: code i of a word is masked in place and converted, which gives code * 16^i, and the activation of row i
// was multiplied by 16^-i (exact) while it was packed. Only the last code is shifted, since in place it would be signed.
#pragma once

#include "cpu_ahead.h"
#include "cpu_tiles.h"
#include "cpu_vector.h"

namespace tokenmill::int4 {
namespace {

struct Float32 {
  static constexpr int kUnitBytes = kUnit * int(sizeof(float));
  static constexpr int kMaxRows = Vector::kParts == 1 ? 24 : 6;

  // Blocks at once: enough accumulators to hide the latency of FMA, few enough for the registers (32 or 16).
  static constexpr int width(int rows) {
    if (Vector::kParts == 1) return rows <= 3 ? 8 : rows <= 6 ? 4 : rows <= 12 ? 2 : 1;
    return rows == 1 ? 4 : rows <= 3 ? 2 : 1;
  }

  template <int MB, int NB>
  static void tile(const Weight& w, const uint8_t* x, const float* sums, const float*, int64_t block, float* out) {
    constexpr int kParts = Vector::kParts, NR = NB * kParts;  // registers of all columns
    const int64_t stride = w.units * kLine;
    const uint8_t* lines = w.lines + block * stride;
    std::memset(out, 0, sizeof(float) * MB * NB * kBlock);
    const LinesAhead<NB> ahead(w);
    for (int64_t g = 0; g < w.groups; ++g) {
      ask_for_scales<NB>(w, block + NB, g);
      Vector::Float acc[NR][MB];
      unroll<0, NR>([&](auto r) { unroll<0, MB>([&](auto m) { acc[r.value][m.value] = Vector::zero(); }); });
      for (int32_t u = w.group_units[g]; u < w.group_units[g + 1]; ++u) {
        const float* rows = reinterpret_cast<const float*>(x);
        const uint8_t* later = ahead.of(lines, u);
        unroll<0, NB>([&](auto b) { ask_for(later + b.value * stride); });
        unroll<0, kUnit>([&](auto i) {
          unroll<0, NB>([&](auto b) {
            Vector::Float value[kParts];
            unroll<0, kParts>([&](auto part) {
              const Vector::Int q = Vector::load(lines + b.value * stride + part.value * 32);
              value[part.value] = Vector::to_float(
                  i.value == kUnit - 1 ? Vector::template shift_right<28>(q)
                                       : Vector::both(q, Vector::all(int32_t(0xfu << (4 * i.value)))));
            });
            unroll<0, MB>([&](auto m) {
              const Vector::Float a = Vector::all(rows[m.value * kUnit + i.value]);
              unroll<0, kParts>([&](auto part) {
                Vector::Float& sum = acc[b.value * kParts + part.value][m.value];
                sum = Vector::multiply_add(value[part.value], a, sum);
              });
            });
          });
        });
        lines += kLine;
        x += MB * kUnitBytes;
      }
      unroll<0, NR>([&](auto r) {
        const int64_t index =
            ((block + r.value / kParts) * w.groups + g) * kBlock + r.value % kParts * kLanes;
        const Vector::Float scale = load_scales(w, index), zero = load_zeros(w, index);
        unroll<0, MB>([&](auto m) {
          float* total = out + m.value * NB * kBlock + r.value * kLanes;
          const Vector::Float value =
              Vector::subtract_product(zero, Vector::all(sums[g * MB + m.value]), acc[r.value][m.value]);
          Vector::store(total, Vector::multiply_add(value, scale, Vector::load(total)));
        });
      });
    }
  }

  static void pack_row(const float* row, const Weight& w, int, uint8_t* out, int64_t stride, float* sums, float*,
                       int sum_stride) {
    const __m256 powers = _mm256_setr_ps(1.0f, 0x1p-4f, 0x1p-8f, 0x1p-12f, 0x1p-16f, 0x1p-20f, 0x1p-24f, 1.0f);
    for (int64_t g = 0; g < w.groups; ++g) {
      __m256 sum = _mm256_setzero_ps();
      for (int32_t u = w.group_units[g]; u < w.group_units[g + 1]; ++u) {
        const __m256 unit = _mm256_loadu_ps(row + int64_t(u) * kUnit);
        sum = _mm256_add_ps(sum, unit);
        _mm256_storeu_ps(reinterpret_cast<float*>(out + u * stride), _mm256_mul_ps(unit, powers));
      }
      sums[g * sum_stride] = sum_of(sum);
    }
  }
};

}  // namespace
}  // namespace tokenmill::int4
