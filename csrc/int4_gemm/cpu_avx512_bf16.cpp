// INT4 weights times bf16 activations with AVX512_BF16: VDPBF16PS multiplies pairs.
// GCC 12 warns about its own _mm512_undefined_*():
// build: flags=-Wno-uninitialized -Wno-maybe-uninitialized
#include "cpu_bf16.h"
#include "cpu_dequantised.h"
#include "cpu_floating.h"

namespace tokenmill::int4 {
namespace {

struct Bf16 {
  using Code = __m512bh;
  using Sum = __m512;
  static constexpr int kUnitBytes = 16;
  static constexpr int kSteps = 4;
  // Of one block more rows have registers, but each of them is a load for one product, and loads are no faster.
  static constexpr int kMaxRows = 12;
  static constexpr int kTallFrom = 73;
  static constexpr int kTallRows = 12;
  static constexpr int kPanelBlocks = kStrip;

  // At most 24 accumulators of the 32 registers; a thread reads as many streams as blocks, of which four are enough.
  static constexpr int width(int rows) { return rows <= 6 ? 4 : 2; }

  template <int kStep>
  TM_INLINE static Code decode(const uint8_t* line, int) {
    return (__m512bh)bf16_codes<kStep>(_mm512_loadu_si512(line));
  }

  TM_INLINE static __m512bh row(const uint8_t* x, int step) {
    int32_t pair;
    std::memcpy(&pair, x + 4 * step, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  TM_INLINE static Sum multiply_add(Code code, __m512bh row, Sum sum) { return _mm512_dpbf16_ps(sum, code, row); }
  TM_INLINE static bool has_offset(const Weight& w) { return has_bf16_zeros(w); }
  TM_INLINE static __m512 offset(__m512 zero) { return bf16_zero(zero); }

  template <int MB, int NB>
  static void tile(const Weight& w, const uint8_t* x, const float* sums, const float*, int64_t block, float* out) {
    stored_tile<Bf16, MB, NB>(w, x, sums, block, out);
  }
};

void pack_bf16(const Problem& p, const Rows& rows, int64_t first, int64_t last, float* scratch) {
  each_row_group<Bf16>(p, rows, first, last, [&](const RowGroup& g) {
    const Bf16Group group(p, rows.split, g.row, g.first, g.first + g.units, scratch);
    __m512 sum = _mm512_setzero_ps();
    for (int32_t u = 0; u < g.units; u += 4) {
      const __m512i values = group.at(u * kUnit), pairs = paired(values);
      sum = added(sum, values);
      unroll<0, 4>([&](auto i) {
        if (u + i.value >= g.units) return;
        const __m128i unit = _mm512_extracti32x4_epi32(pairs, i.value);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(g.out + (u + i.value) * g.stride), unit);
      });
    }
    rows.sums[g.index] = _mm512_reduce_add_ps(sum);
  });
}

// From so many rows on it pays to dequantise weights; activations of other types have more bits than a weight would.
constexpr int64_t kDequantiseFrom = 160;

void multiply_bf16(const Problem& p, const Rows& rows, int64_t first, int64_t last) {
  if (rows.split > 1 || p.M < kDequantiseFrom) return multiply_floating<Bf16>(p, rows, first, last);
  Dequantised<Bf16, Bf16::kTallRows>(p, rows).run(first, last);
}

}  // namespace

const Kernel kAvx512Bf16 = {"avx512_bf16", kStrip,     unit_row_bytes<Bf16>,   bf16_parts, floating_tile_rows<Bf16>,
                            pack_bf16,     multiply_bf16, 1024};

}  // namespace tokenmill::int4
