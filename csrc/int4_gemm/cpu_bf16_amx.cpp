// W4A16 with AMX: bf16 activations times codes from -8 to 7, which bf16 holds exactly. Float16 and float32 activations
// are split into two bf16 parts as in cpu_avx512_bf16.cpp.
// GCC 12 warns about its own _mm512_undefined_*():
// build: flags=-Wno-uninitialized -Wno-maybe-uninitialized -fno-exceptions
#include "cpu_amx.h"

namespace tokenmill::int4 {
namespace {

struct AmxBf16 {
  static constexpr int kStepUnits = 4;

  struct Scales {
    __m512 scale, zero;  // zero: what the zero point differs from 8
    bool symmetric;
  };

  // Row 4u + i of the tile: codes i and i + 4 of unit u, less 8, as bf16. The table is looked up by the low five bits
  // of each half-word: a nibble and one bit of the next.
  TM_INLINE static void decode(const uint8_t* lines, int units, uint8_t* tile) {
    const __m512i table = _mm512_set_epi32(
        0x40e040c0, 0x40a04080, 0x40404000, 0x3f800000, int32_t(0xbf80c000), int32_t(0xc040c080), int32_t(0xc0a0c0c0),
        int32_t(0xc0e0c100), 0x40e040c0, 0x40a04080, 0x40404000, 0x3f800000, int32_t(0xbf80c000), int32_t(0xc040c080),
        int32_t(0xc0a0c0c0), int32_t(0xc0e0c100));
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
        const __m512i shifted = i.value == 0 ? q[u.value] : _mm512_srli_epi32(q[u.value], 4 * i.value);
        _mm512_store_si512(tile + (4 * u.value + i.value) * kLine, _mm512_permutexvar_epi16(shifted, table));
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
    return {load_scales(w, index), _mm512_sub_ps(load_zeros(w, index), _mm512_set1_ps(8.0f)), w.zeros == nullptr};
  }

  TM_INLINE static __m512 scaled(const Scales& s, const float* sums, const float* row_sum, const float*, __m512 total) {
    __m512 value = _mm512_load_ps(sums);
    if (!s.symmetric) value = _mm512_fnmadd_ps(s.zero, _mm512_set1_ps(*row_sum), value);
    return _mm512_fmadd_ps(value, s.scale, total);
  }
};

// Values i and i + 4 of each of four units side by side.
TM_INLINE __m512i paired(__m512i values) {
  const __m512i order = _mm512_set_epi16(31, 27, 30, 26, 29, 25, 28, 24, 23, 19, 22, 18, 21, 17, 20, 16, 15, 11, 14, 10,
                                         13, 9, 12, 8, 7, 3, 6, 2, 5, 1, 4, 0);
  return _mm512_permutexvar_epi16(order, values);
}

// The sum that an asymmetric weight needs; nothing else reads it.
TM_INLINE __m512 added(__m512 sum, __m512i values) {
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(0x3f803f80), (__m512bh)values);
}

// 32 values of a row in packed order as bf16: what rounds to them (part 0) or what that leaves (part 1).
TM_INLINE __m512i part_of(const float* values, int count, int part) {
  const __mmask32 exists = _bzhi_u32(0xffffffffu, uint32_t(count));
  const __m512 low = _mm512_maskz_loadu_ps(__mmask16(exists), values);
  const __m512 high = _mm512_maskz_loadu_ps(__mmask16(exists >> 16), values + 16);
  const __m512i coarse = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  if (part == 0) return coarse;
  const __m512i low_coarse = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(coarse)), 16);
  const __m512i high_coarse = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(coarse, 1)), 16);
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_sub_ps(high, _mm512_castsi512_ps(high_coarse)),
                                      _mm512_sub_ps(low, _mm512_castsi512_ps(low_coarse)));
}

void pack(const Problem& p, const Rows& rows, int64_t first, int64_t last, float* scratch) {
  const Weight& w = p.weight;
  const int height = rows.rows;
  const bool straight = p.type == Type::kBFloat16 && w.in_order;
  for (int64_t packed = first * height; packed < last * height; ++packed) {
    const int64_t t = packed / height, r = packed % height, m = packed / rows.split;
    const int part = int(packed % rows.split);
    const RowPlaces place(rows, packed);
    int64_t step = 0;
    if (!straight && part == 0) read_row(p, m, scratch);
    const uint16_t* x = m < p.M ? static_cast<const uint16_t*>(p.x) + m * p.ldx : nullptr;
    for (int64_t g = 0; g < w.groups; ++g) {
      __m512 sum = _mm512_setzero_ps();
      const int64_t end = int64_t(w.group_units[g + 1]) * kUnit;
      const int64_t begin = int64_t(w.group_units[g]) * kUnit, steps = (end - begin + 31) / 32;
      for (int64_t i = 0; i < steps; ++i) {
        const int64_t k = begin + 32 * i;
        int64_t count = end - k < 32 ? end - k : 32;
        __m512i values;
        if (straight) {
          if (p.K - k < count) count = p.K - k;
          const __mmask32 exists = x ? _bzhi_u32(0xffffffffu, uint32_t(count)) : 0;
          values = _mm512_maskz_loadu_epi16(exists, x + k);
        } else {
          values = part_of(scratch + k, int(count), part);
        }
        if (w.zeros) sum = added(sum, values);
        _mm512_store_si512(place(step, steps, i), paired(values));
      }
      step += steps;
      if (w.zeros) rows.sums[(t * w.groups + g) * height + r] = _mm512_reduce_add_ps(sum);
    }
  }
}

int split(Type type) { return type == Type::kBFloat16 ? 1 : 2; }

}  // namespace

const Kernel kAmxBf16 = {"amx", kStripBlocks, row_bytes<AmxBf16>, split, tile_rows_amx, pack,
                         multiply_amx<AmxBf16>, &kAvx512Bf16, 1};

}  // namespace tokenmill::int4
