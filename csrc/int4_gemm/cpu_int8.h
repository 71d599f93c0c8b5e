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

void pack_int8_row(const float* row, const Weight& w, uint8_t* out, int64_t stride, float* sums, float* scales,
                   int sum_stride) {
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t first = int64_t(w.group_units[g]) * kUnit, last = int64_t(w.group_units[g + 1]) * kUnit;
    float largest = 0.0f;
    bool finite = true;
    for (int64_t i = first; i < last; ++i) {
      const float magnitude = __builtin_fabsf(row[i]);
      largest = magnitude > largest ? magnitude : largest;
      finite &= magnitude <= 3.402823466e38f;
    }
    // An infinity or a NaN in x has to show in y: the scale carries it.
    const float inverse = finite && largest > 0.0f ? 127.0f / largest : 0.0f;
    int32_t sum = 0;
    for (int32_t u = w.group_units[g]; u < w.group_units[g + 1]; ++u) {
      int8_t unit[kUnit];
      for (int i = 0; i < kUnit; ++i) {
        const int32_t value = int32_t(__builtin_rintf(row[u * kUnit + i] * inverse));
        unit[i / 2 + i % 2 * 4] = int8_t(finite ? value : 1);
        sum += finite ? value : 1;
      }
      std::memcpy(out + u * stride, unit, sizeof unit);
    }
    sums[g * sum_stride] = float(sum);
    scales[g * sum_stride] = finite ? largest / 127.0f : __builtin_nanf("");
  }
}

// Adds one register of one group to a row of results: (dot - zero * sum) * weight scale * activation scale.
TM_INLINE void add_int8_group(const Weight& w, int64_t group, int64_t block, int reg, Vector::Int dot, float sum,
                              float scale, float* total) {
  const int64_t index =
      ((block + reg / Vector::kParts) * w.groups + group) * kBlock + reg % Vector::kParts * kLanes;
  const Vector::Float value = Vector::subtract_product(load_zeros(w, index), Vector::all(sum), Vector::to_float(dot));
  const Vector::Float both = Vector::multiply(load_scales(w, index), Vector::all(scale));
  Vector::store(total, Vector::multiply_add(value, both, Vector::load(total)));
}

}  // namespace
}  // namespace tokenmill::int4
