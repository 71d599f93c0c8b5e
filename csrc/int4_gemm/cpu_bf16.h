// Codes and activations as bf16, for VDPBF16PS and for AMX. Float16 and float32 activations are split into two bf16
// parts, hi + lo, which keeps 16 bits of them; the parts are two packed rows whose results are added.
#pragma once

#include "cpu_tiles.h"
#include "cpu_vector.h"

namespace tokenmill::int4 {
namespace {

// Codes kStep and kStep + 4 of every column of a line as a pair of bf16: less 8, from -8 to 7, exact. The table is looked
// up by the low five bits of each half-word: a nibble and one bit of the next.
template <int kStep>
TM_INLINE __m512i bf16_codes(__m512i line) {
  const __m512i table = _mm512_set_epi32(
      0x40e040c0, 0x40a04080, 0x40404000, 0x3f800000, int32_t(0xbf80c000), int32_t(0xc040c080), int32_t(0xc0a0c0c0),
      int32_t(0xc0e0c100), 0x40e040c0, 0x40a04080, 0x40404000, 0x3f800000, int32_t(0xbf80c000), int32_t(0xc040c080),
      int32_t(0xc0a0c0c0), int32_t(0xc0e0c100));
  return _mm512_permutexvar_epi16(kStep == 0 ? line : _mm512_srli_epi32(line, 4 * kStep), table);
}

// What the zero points of bf16_codes differ from 8: nothing where the weight has none.
TM_INLINE bool has_bf16_zeros(const Weight& w) { return w.zeros != nullptr; }
TM_INLINE __m512 bf16_zero(__m512 zero) { return _mm512_sub_ps(zero, _mm512_set1_ps(8.0f)); }

// One group of a packed row, 32 values at a time.
class Bf16Group {
 public:
  // Units first..last-1; `scratch` has room for a whole row, of which rows of bf16 in order have no need. Part 1 of a row
  // is what part 0, which came before it with the same scratch, has left there.
  Bf16Group(const Problem& p, int split, int64_t packed_row, int64_t first, int64_t last, float* scratch)
      : values_(scratch + first * kUnit), part_(int(packed_row % split)), count_((last - first) * kUnit) {
    const int64_t m = packed_row / split, begin = first * kUnit;
    if (p.type == Type::kBFloat16 && p.weight.in_order) {
      if (p.K - begin < count_) count_ = p.K - begin;
      if (m >= p.M) count_ = 0;
      straight_ = static_cast<const uint16_t*>(p.x) + m * p.ldx + begin;
    } else if (part_ == 0) {
      read_row(p, m, first, last, scratch + first * kUnit);
    }
  }

  // Values i..i + 31 in packed order as bf16, zeros past the end: what rounds to them (part 0) or what that leaves (1).
  TM_INLINE __m512i at(int64_t i) const {
    const int64_t left = count_ - i;
    const __mmask32 exists = left >= 32 ? 0xffffffffu : left <= 0 ? 0 : (1u << left) - 1;
    if (straight_) return _mm512_maskz_loadu_epi16(exists, straight_ + i);
    const __m512 low = _mm512_maskz_loadu_ps(__mmask16(exists), values_ + i);
    const __m512 high = _mm512_maskz_loadu_ps(__mmask16(exists >> 16), values_ + i + 16);
    const __m512i coarse = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    if (part_ == 0) return coarse;
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_sub_ps(high, widened(_mm512_extracti64x4_epi64(coarse, 1))),
                                        _mm512_sub_ps(low, widened(_mm512_castsi512_si256(coarse))));
  }

 private:
  TM_INLINE static __m512 widened(__m256i values) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
  }

  const float* values_;
  const uint16_t* straight_ = nullptr;
  int part_;
  int64_t count_;
};

// Values i and i + 4 of each of four units side by side, as the codes are.
TM_INLINE __m512i paired(__m512i values) {
  const __m512i order = _mm512_set_epi16(31, 27, 30, 26, 29, 25, 28, 24, 23, 19, 22, 18, 21, 17, 20, 16, 15, 11, 14, 10,
                                         13, 9, 12, 8, 7, 3, 6, 2, 5, 1, 4, 0);
  return _mm512_permutexvar_epi16(order, values);
}

// Adds values to the sum that an asymmetric weight needs; nothing else reads it.
TM_INLINE __m512 added(__m512 sum, __m512i values) {
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(0x3f803f80), (__m512bh)values);
}

inline int bf16_parts(Type type) { return type == Type::kBFloat16 ? 1 : 2; }

}  // namespace
}  // namespace tokenmill::int4
