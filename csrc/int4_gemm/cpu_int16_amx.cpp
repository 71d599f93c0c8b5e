// W4A16 of few rows with AMX: float16 and bfloat16 activations as int16, each in two bytes, of which the high one is
// signed. Codes become bytes in half the time that they take to become bf16, which is what few rows wait for; and half
// of what a float16 row would be as two of bf16 is multiplied. To the bit what VNNI makes of int16 (cpu_dot2.h) in groups
// of up to 2048 rows of K: the dots are exact, and rounded once.
// GCC 12 warns about its own _mm512_undefined_*():
// build: flags=-Wno-uninitialized -Wno-maybe-uninitialized -fno-exceptions
#include "cpu_amx_few.h"
#include "cpu_int16.h"

namespace tokenmill::int4 {
namespace {

struct AmxInt16 : ByteCodes {
  static constexpr int kParts = 2;  // high bytes, low bytes

  template <int kTile, int kBlock>
  TM_INLINE static void product() {
    if constexpr (kTile == 0 && kBlock == 0) _tile_dpbsud(0, 4, 6);
    if constexpr (kTile == 0 && kBlock == 1) _tile_dpbsud(1, 4, 7);
    if constexpr (kTile == 1 && kBlock == 0) _tile_dpbuud(2, 5, 6);
    if constexpr (kTile == 1 && kBlock == 1) _tile_dpbuud(3, 5, 7);
  }

  TM_INLINE static __m512 scaled(const Scales& s, const float* sums, const float* row_sum, const float* row_scale,
                                 __m512 total) {
    const __m512 high = _mm512_cvtepi32_ps(_mm512_load_si512(sums));
    const __m512 low = _mm512_cvtepi32_ps(_mm512_load_si512(sums + 2 * kTileFloats));
    const __m512 dot = _mm512_fmadd_ps(high, _mm512_set1_ps(256.0f), low);
    return added(s, dot, *row_sum, *row_scale, total);
  }
};

// Step by step the high bytes of all rows, then the low ones. All rows are one tile.
void pack(const Problem& p, const Rows& rows, int64_t first, int64_t last, float* scratch) {
  const Weight& w = p.weight;
  const int64_t tile_bytes = int64_t(rows.rows) * kLine;
  const __m256i even_odd = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  for (int64_t m = first; m < last; ++m) {
    uint8_t* out = rows.values + m * kLine;
    read_row(p, m, 0, w.units, scratch);
    for (int64_t g = 0; g < w.groups; ++g) {
      const int32_t begin = w.group_units[g], end = w.group_units[g + 1];
      const Int16Quantiser q = int16_quantiser_of(scratch + begin * kUnit, end - begin);
      __m256i sum = _mm256_setzero_si256();
      for (int32_t first = begin; first < end; first += AmxInt16::kStepUnits, out += 2 * tile_bytes) {
        const int32_t units = end - first < AmxInt16::kStepUnits ? end - first : AmxInt16::kStepUnits;
        if (units < AmxInt16::kStepUnits) {
          _mm512_store_si512(out, _mm512_setzero_si512());
          _mm512_store_si512(out + tile_bytes, _mm512_setzero_si512());
        }
        for (int32_t u = 0; u < units; ++u) {
          const __m256i integers = rounded(scratch + (first + u) * kUnit, q.inverse, q.finite);
          sum = _mm256_add_epi32(sum, integers);
          const __m256i ordered = _mm256_permutevar8x32_epi32(integers, even_odd);
          _mm_storel_epi64(reinterpret_cast<__m128i*>(out + u * kUnit),
                           _mm256_cvtepi32_epi8(_mm256_srai_epi32(ordered, 8)));
          _mm_storel_epi64(reinterpret_cast<__m128i*>(out + tile_bytes + u * kUnit), _mm256_cvtepi32_epi8(ordered));
        }
      }
      rows.sums[g * rows.rows + m] = total_of(sum);
      rows.scales[g * rows.rows + m] = q.scale;
    }
  }
}

int64_t two_row_bytes(const Weight& w) { return AmxInt16::kParts * row_bytes<AmxInt16>(w); }

void multiply(const Problem& p, const Rows& rows, int64_t first, int64_t last) {
  FewRows<AmxInt16, 1>(p, rows).run(first, last);
}

}  // namespace

// For at most kTileRows rows: what kAmxBf16 gives it.
const Kernel kAmxInt16 = {"amx", kStripBlocks, two_row_bytes, no_split, tile_rows_amx, pack,
                          multiply, 0, kAnyBytes, &kAvx512VnniInt16, 4, true};

}  // namespace tokenmill::int4
