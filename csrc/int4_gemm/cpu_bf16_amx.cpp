// W4A16 with AMX: bf16 activations times codes from -8 to 7, which bf16 holds exactly.
// GCC 12 warns about its own _mm512_undefined_*():
// build: flags=-Wno-uninitialized -Wno-maybe-uninitialized -fno-exceptions
#include "cpu_amx.h"
#include "cpu_bf16.h"

namespace tokenmill::int4 {
namespace {

struct AmxBf16 {
  static constexpr int kStepUnits = 4;
  static constexpr int kParts = 1;

  struct Scales {
    __m512 scale, zero;  // zero: what the zero point differs from 8
    bool has_zeros;
  };

  // Row 4u + i of the tile: codes i and i + 4 of unit u.
  TM_INLINE static void decode(const uint8_t* lines, int units, uint8_t* tile) {
    // Read before anything is written: a load waits for stores to the same place of another page.
    __m512i q[kStepUnits];
    if (units >= kStepUnits) {
      unroll<0, kStepUnits>([&](auto u) { q[u.value] = _mm512_loadu_si512(lines + u.value * kLine); });
    } else {
      unroll<0, kStepUnits>([&](auto u) {
        q[u.value] = u.value < units ? _mm512_loadu_si512(lines + u.value * kLine) : _mm512_setzero_si512();
      });
    }
    unroll<0, kStepUnits>([&](auto u) {
      unroll<0, 4>([&](auto i) {
        _mm512_store_si512(tile + (4 * u.value + i.value) * kLine, bf16_codes<i.value>(q[u.value]));
      });
    });
  }

  template <int kTile, int kBlock>
  TM_INLINE static void product() {
    if constexpr (kTile == 0 && kBlock == 0) _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTile == 0 && kBlock == 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTile == 1 && kBlock == 0) _tile_dpbf16ps(2, 5, 6);
    if constexpr (kTile == 1 && kBlock == 1) _tile_dpbf16ps(3, 5, 7);
  }

  TM_INLINE static Scales scales_of(const Weight& w, int64_t index) {
    return {load_scales(w, index), bf16_zero(load_zeros(w, index)), has_bf16_zeros(w)};
  }

  TM_INLINE static __m512 scaled(const Scales& s, const float* sums, const float* row_sum, const float*, __m512 total) {
    __m512 value = _mm512_load_ps(sums);
    if (s.has_zeros) value = _mm512_fnmadd_ps(s.zero, _mm512_set1_ps(*row_sum), value);
    return _mm512_fmadd_ps(value, s.scale, total);
  }
};

void pack(const Problem& p, const Rows& rows, int64_t first, int64_t last, float* scratch) {
  const Weight& w = p.weight;
  const int height = rows.rows;
  for (int64_t packed = first; packed < last; ++packed) {
    const int64_t t = packed / height, r = packed % height;
    const RowPlaces place(rows, packed);
    int64_t step = 0;
    for (int64_t g = 0; g < w.groups; ++g) {
      const Bf16Group group(p, rows.split, packed, w.group_units[g], w.group_units[g + 1], scratch);
      __m512 sum = _mm512_setzero_ps();
      const int64_t steps = (w.group_units[g + 1] - w.group_units[g] + 3) / 4;
      for (int64_t i = 0; i < steps; ++i) {
        const __m512i values = group.at(32 * i);
        if (w.zeros) sum = added(sum, values);
        _mm512_store_si512(place(step, steps, i), paired(values));
      }
      step += steps;
      if (w.zeros) rows.sums[(t * w.groups + g) * height + r] = _mm512_reduce_add_ps(sum);
    }
  }
}

}  // namespace

const Kernel kAmxBf16 = {"amx", kStripBlocks, row_bytes<AmxBf16>, bf16_parts, tile_rows_amx, pack,
                         multiply_amx<AmxBf16>, 0, kAnyBytes, &kAmxInt16, 12, true};

}  // namespace tokenmill::int4
