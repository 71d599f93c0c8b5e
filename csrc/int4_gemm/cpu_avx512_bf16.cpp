// INT4 weights times bf16 activations with AVX512_BF16: a nibble becomes the bf16 number 128 + code by one OR, and
// VDPBF16PS multiplies pairs. Float16 and float32 activations are split into two bf16 parts, hi + lo, which keeps
// 16 bits of them; the parts are two packed rows whose results are added.
// GCC 12 warns about its own _mm512_undefined_*():
// build: flags=-Wno-uninitialized -Wno-maybe-uninitialized
#include <immintrin.h>

#include "cpu_ahead.h"
#include "cpu_tiles.h"
#include "cpu_vector.h"

namespace tokenmill::int4 {
namespace {

struct Bf16 {
  static constexpr int kUnitBytes = 16;
  static constexpr int kMaxRows = 24;

  // At most 24 accumulators of the 32 registers; a thread reads as many streams as blocks.
  static constexpr int width(int rows) { return rows <= 3 ? 8 : rows <= 6 ? 4 : rows <= 12 ? 2 : 1; }

  TM_INLINE static __m512bh broadcast(const uint8_t* pair) {
    int32_t value;
    std::memcpy(&value, pair, sizeof value);
    return (__m512bh)_mm512_set1_epi32(value);
  }

  template <int MB, int NB>
  static void tile(const Weight& w, const uint8_t* x, const float* sums, const float*, int64_t block, float* out) {
    const __m512i nibbles = _mm512_set1_epi32(0x000f000f), one_two_eight = _mm512_set1_epi32(0x43004300);
    const int64_t stride = w.units * kLine;  // from block to block
    const uint8_t* lines = w.lines + block * stride;
    std::memset(out, 0, sizeof(float) * MB * NB * kBlock);
    const LinesAhead<NB> ahead(w);
    for (int64_t g = 0; g < w.groups; ++g) {
      ask_for_scales<NB>(w, block + NB, g);
      __m512 acc[NB][MB];
      unroll<0, NB>([&](auto b) { unroll<0, MB>([&](auto m) { acc[b.value][m.value] = _mm512_setzero_ps(); }); });
      for (int32_t u = w.group_units[g]; u < w.group_units[g + 1]; ++u) {
        const uint8_t* later = ahead.of(lines, u);
        unroll<0, NB>([&](auto b) {
          ask_for(later + b.value * stride);
          const __m512i q = _mm512_loadu_si512(lines + b.value * stride);
          unroll<0, 4>([&](auto i) {
            // (q >> 4i) & nibbles | 128: codes i and i + 4 as a pair of bf16.
            const __m512i shifted = i.value == 0 ? q : _mm512_srli_epi32(q, 4 * i.value);
            const __m512bh pair = (__m512bh)_mm512_ternarylogic_epi32(shifted, nibbles, one_two_eight, 0xea);
            unroll<0, MB>([&](auto m) {
              acc[b.value][m.value] =
                  _mm512_dpbf16_ps(acc[b.value][m.value], pair, broadcast(x + m.value * kUnitBytes + 4 * i.value));
            });
          });
        });
        lines += kLine;
        x += MB * kUnitBytes;
      }
      unroll<0, NB>([&](auto b) {
        const int64_t index = ((block + b.value) * w.groups + g) * kBlock;
        const __m512 scale = load_scales(w, index);
        const __m512 offset = _mm512_add_ps(load_zeros(w, index), _mm512_set1_ps(128.0f));
        unroll<0, MB>([&](auto m) {
          float* total = out + (m.value * NB + b.value) * kBlock;
          const __m512 value = _mm512_fnmadd_ps(offset, _mm512_set1_ps(sums[g * MB + m.value]), acc[b.value][m.value]);
          _mm512_store_ps(total, _mm512_fmadd_ps(value, scale, _mm512_load_ps(total)));
        });
      });
    }
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

const Kernel kAvx512Bf16 = {"avx512_bf16", kStrip, unit_row_bytes<Bf16>, split, tile_rows<Bf16>, pack<Bf16>,
                            multiply<Bf16>};

}  // namespace tokenmill::int4
