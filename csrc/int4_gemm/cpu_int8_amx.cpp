// W4A8 with AMX: int8 activations times codes from 0 to 15, exact in int32.
// GCC 12 warns about its own _mm512_undefined_*():
// build: flags=-Wno-uninitialized -Wno-maybe-uninitialized -fno-exceptions
#include "cpu_amx.h"
#include "cpu_int8.h"

namespace tokenmill::int4 {
namespace {

struct AmxInt8 : ByteCodes {
  static constexpr int kParts = 1;

  template <int kTile, int kBlock>
  TM_INLINE static void product() {
    if constexpr (kTile == 0 && kBlock == 0) _tile_dpbsud(0, 4, 6);
    if constexpr (kTile == 0 && kBlock == 1) _tile_dpbsud(1, 4, 7);
    if constexpr (kTile == 1 && kBlock == 0) _tile_dpbsud(2, 5, 6);
    if constexpr (kTile == 1 && kBlock == 1) _tile_dpbsud(3, 5, 7);
  }

  TM_INLINE static __m512 scaled(const Scales& s, const float* sums, const float* row_sum, const float* row_scale,
                                 __m512 total) {
    const __m512 dot = _mm512_cvtepi32_ps(_mm512_load_si512(sums));
    return added(s, dot, *row_sum, *row_scale, total);
  }
};

void pack(const Problem& p, const Rows& rows, int64_t first, int64_t last, float* scratch) {
  const Weight& w = p.weight;
  const int height = rows.rows;
  for (int64_t m = first; m < last; ++m) {
    const int64_t t = m / height, r = m % height;
    const RowPlaces place(rows, m);
    int64_t step = 0;
    read_row(p, m, 0, w.units, scratch);
    for (int64_t g = 0; g < w.groups; ++g) {
      const int32_t begin = w.group_units[g], end = w.group_units[g + 1];
      const Quantiser q = quantiser_of(scratch + begin * kUnit, end - begin);
      __m256i sum = _mm256_setzero_si256();
      const int64_t steps = (end - begin + AmxInt8::kStepUnits - 1) / AmxInt8::kStepUnits;
      for (int64_t i = 0; i < steps; ++i) {
        const int32_t u = begin + int32_t(i) * AmxInt8::kStepUnits;
        uint8_t* out = place(step, steps, i);
        const int32_t units = end - u < AmxInt8::kStepUnits ? end - u : AmxInt8::kStepUnits;
        if (units < AmxInt8::kStepUnits) _mm512_store_si512(out, _mm512_setzero_si512());
        quantise(scratch + u * kUnit, units, q, out, kInt8UnitBytes, sum);
      }
      step += steps;
      rows.sums[(t * w.groups + g) * height + r] = total_of(sum);
      rows.scales[(t * w.groups + g) * height + r] = q.scale;
    }
  }
}

}  // namespace

const Kernel kAmxInt8 = {"amx", kStripBlocks, row_bytes<AmxInt8>, no_split, tile_rows_amx, pack,
                         multiply_amx<AmxInt8>, 0, kAnyBytes, &kAvx512VnniInt8, 4, true};

}  // namespace tokenmill::int4
