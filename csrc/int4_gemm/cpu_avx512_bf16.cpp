// INT4 weights times bf16 activations with AVX512_BF16: a nibble becomes the bf16 number 128 + code by one OR, and
// VDPBF16PS multiplies pairs. Float16 and float32 activations are split into two bf16 parts, hi + lo, which keeps
// 16 bits of them; the parts are two packed rows whose results are added.
// GCC 12 warns about its own _mm512_undefined_*():
// build: flags=-Wno-uninitialized -Wno-maybe-uninitialized
#include <immintrin.h>

#include "cpu_floating.h"

namespace tokenmill::int4 {
namespace {

struct Bf16 {
  using Code = __m512bh;
  using Sum = __m512;
  static constexpr int kUnitBytes = 16;
  static constexpr int kSteps = 4;
  static constexpr int kMaxRows = 24;
  static constexpr int kTallFrom = 73;
  static constexpr int kTallRows = 12;
  static constexpr int kPanelBlocks = kStrip;

  // At most 24 accumulators of the 32 registers; a thread reads as many streams as blocks, of which four are enough.
  static constexpr int width(int rows) { return rows <= 6 ? 4 : rows <= 12 ? 2 : 1; }

  // (line >> 4i) & nibbles | 128: codes i and i + 4 as a pair of bf16.
  template <int kStep>
  TM_INLINE static Code decode(const uint8_t* line, int) {
    const __m512i nibbles = _mm512_set1_epi32(0x000f000f), one_two_eight = _mm512_set1_epi32(0x43004300);
    const __m512i q = _mm512_loadu_si512(line);
    const __m512i shifted = kStep == 0 ? q : _mm512_srli_epi32(q, 4 * kStep);
    return (__m512bh)_mm512_ternarylogic_epi32(shifted, nibbles, one_two_eight, 0xea);
  }

  TM_INLINE static __m512bh row(const uint8_t* x, int step) {
    int32_t pair;
    std::memcpy(&pair, x + 4 * step, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  TM_INLINE static Sum multiply_add(Code code, __m512bh row, Sum sum) { return _mm512_dpbf16_ps(sum, code, row); }
  TM_INLINE static __m512 offset(__m512 zero) { return _mm512_add_ps(zero, _mm512_set1_ps(128.0f)); }

  template <int MB, int NB>
  static void tile(const Weight& w, const uint8_t* x, const float* sums, const float*, int64_t block, float* out) {
    stored_tile<Bf16, MB, NB>(w, x, sums, block, out);
  }

  static void pack_row(const float* row, const Weight& w, int part, uint8_t* out, int64_t stride, float* sums,
                       float*, int sum_stride) {
    for (int64_t g = 0; g < w.groups; ++g) {
      __m256 sum = _mm256_setzero_ps();
      for (int32_t u = w.group_units[g]; u < w.group_units[g + 1]; ++u) {
        const __m256 exact = _mm256_loadu_ps(row + int64_t(u) * kUnit);
        __m128i value = (__m128i)_mm256_cvtneps_pbh(exact);
        if (part == 1) value = (__m128i)_mm256_cvtneps_pbh(_mm256_sub_ps(exact, widened(value)));
        sum = _mm256_add_ps(sum, widened(value));
        // Values i and i + 4 side by side.
        const __m128i pairs = _mm_unpacklo_epi16(value, _mm_unpackhi_epi64(value, value));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + u * stride), pairs);
      }
      sums[g * sum_stride] = sum_of(sum);
    }
  }

  TM_INLINE static __m256 widened(__m128i values) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(values), 16));
  }
};

int split(Type type) { return type == Type::kBFloat16 ? 1 : 2; }

}  // namespace

const Kernel kAvx512Bf16 = {"avx512_bf16", kStrip, unit_row_bytes<Bf16>, split, floating_tile_rows<Bf16>, pack<Bf16>,
                            multiply_floating<Bf16>};

}  // namespace tokenmill::int4
