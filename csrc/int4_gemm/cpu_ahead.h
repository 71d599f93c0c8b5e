// Asks for weights before they are needed: the processor's own prefetching looks less far, begins anew on every page,
// and does not see scales coming, of which a line is read once in two groups.
#pragma once

#include <immintrin.h>

#include "cpu.h"

namespace tokenmill::int4 {
namespace {

// Not from a lambda that does nothing else: GCC takes it for one without effects and leaves its calls out.
TM_INLINE void ask_for(const void* address) { _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0); }
TM_INLINE void ask_second_level_for(const void* address) {
  _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T1);
}

// The share of `group` in the scales and zero points of `kWide` blocks from `first` on: with the last group all of
// them have been asked for.
template <int kWide>
TM_INLINE void ask_for_scales(const Weight& w, int64_t first, int64_t group) {
  constexpr int64_t kCount = kWide * kBlock;
  const int64_t index = first * w.groups * kBlock + group * kCount, size = w.scale_type == Type::kFloat32 ? 4 : 2;
  const auto* scales = static_cast<const uint8_t*>(w.scales) + index * size;
  for (int64_t i = 0; i < kCount * size; i += kLine) ask_for(scales + i);
  if (!w.zeros) return;
  for (int64_t i = 0; i < kCount; i += kLine) ask_for(w.zeros + index + i);
}

// Where a tile that reads `kWide` blocks side by side asks for lines: `kLines` further on and, past the end of a block,
// in the block that will be read next.
template <int kWide, int kLines>
class LinesAhead {
 public:
  explicit LinesAhead(const Weight& w) : last_(w.units - kLines), hop_((kWide - 1) * w.units * kLine) {}

  TM_INLINE const uint8_t* of(const uint8_t* line, int32_t unit) const {
    return line + kLines * kLine + (unit < last_ ? 0 : hop_);
  }

 private:
  int64_t last_, hop_;
};

}  // namespace
}  // namespace tokenmill::int4
