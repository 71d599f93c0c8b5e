// Many rows of bf16 activations: weights are dequantised to bf16, as a checkpoint of that type holds them, and sums run on
// through groups: less is stored and loaded again than where the sums of every group are scaled.
#pragma once

#include "cpu_bf16.h"
#include "cpu_floating.h"

namespace tokenmill::int4 {
namespace {

// What makes a weight of a code: weight = code * scale - offset.
struct Dequantiser {
  __m512 scale, offset;

  // Of the columns of a block in one group.
  static Dequantiser of(const Weight& w, int64_t block, int64_t group) {
    const int64_t place = place_of<0>(w, block, group);
    const __m512 scale = load_scales(w, place);
    return {scale, has_bf16_zeros(w) ? _mm512_mul_ps(bf16_zero(load_zeros(w, place)), scale) : _mm512_setzero_ps()};
  }

  // Pairs of codes to pairs of weights, rounded once.
  TM_INLINE __m512i operator()(__m512i codes) const {
    const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(codes, 16));
    const __m512 second = _mm512_castsi512_ps(_mm512_and_si512(codes, _mm512_set1_epi32(int32_t(0xffff0000u))));
    const __m512bh weights =
        _mm512_cvtne2ps_pbh(_mm512_fmsub_ps(second, scale, offset), _mm512_fmsub_ps(first, scale, offset));
    return _mm512_permutexvar_epi16(pairs, (__m512i)weights);
  }
};

// A is an arithmetic of cpu_units.h whose codes are pairs of bf16; kRows: of a packed tile, a multiple of three.
template <class A, int kRows>
class Dequantised {
 public:
  Dequantised(const Problem& p, const Rows& rows) : p_(p), w_(p.weight), rows_(rows) {}

  void run(int64_t first, int64_t last) {
    thread_local Memory memory;
    const size_t totals = size_t(rows_.tiles) * kRows * kStrip * kBlock * sizeof(float);
    panel_ = memory.at_least(kWide * kBlockBytes + totals);
    totals_ = reinterpret_cast<float*>(panel_ + kWide * kBlockBytes);
    for (; first < last; first += kStrip) strip(first, last - first < kStrip ? last - first : kStrip);
  }

 private:
  // A panel stays in the second-level cache and is read in order; the longer it is, the fewer totals go to and fro.
  static constexpr int kUnits = 128, kWide = 2;
  static constexpr int64_t kUnitBytes = Decoded<A>::kUnitBytes, kBlockBytes = kUnits * kUnitBytes;

  void strip(int64_t block, int64_t blocks) {
    const int64_t columns = blocks * kBlock;
    int64_t group = 0;
    for (int32_t unit = 0; unit < w_.units; unit += kUnits) {
      const int32_t units = w_.units - unit < kUnits ? int32_t(w_.units - unit) : kUnits;
      while (w_.group_units[group + 1] <= unit) ++group;
      int64_t b = 0;
      for (; b + kWide <= blocks; b += kWide) multiply<kWide>(block, b, group, unit, units, columns);
      for (; b < blocks; ++b) multiply<1>(block, b, group, unit, units, columns);
    }
    for (int64_t t = 0; t < rows_.tiles; ++t) {
      store_tile(p_, rows_, t * kRows, block, int(columns), totals_ + t * kRows * columns);
    }
  }

  // All rows by NB blocks and so many units. Of the last tile only as many thirds are multiplied as hold rows.
  template <int NB>
  void multiply(int64_t block, int64_t b, int64_t group, int32_t unit, int32_t units, int64_t columns) {
    for (int n = 0; n < NB; ++n) decode(block + b + n, group, unit, units, panel_ + n * kBlockBytes);
    const auto tile = [&](int64_t t, auto thirds) {
      const uint8_t* x = rows_.values + (t * w_.units + unit) * kRows * A::kUnitBytes;
      float* totals = totals_ + t * kRows * columns + b * kBlock;
      add_tile<kRows / 3 * decltype(thirds)::value, NB>(x, units, totals, columns, unit == 0);
    };
    const int64_t last = rows_.tiles - 1, rest = p_.M - last * kRows;
    for (int64_t t = 0; t < last; ++t) tile(t, Constant<3>{});
    unroll<1, 4>([&](auto thirds) {
      if ((rest + kRows / 3 - 1) / (kRows / 3) == thirds.value) tile(last, thirds);
    });
  }

  // `group` is the one that `unit` is of.
  void decode(int64_t block, int64_t group, int32_t unit, int32_t units, uint8_t* out) {
    const uint8_t* line = w_.lines + (block * w_.units + unit) * kLine;
    for (const int32_t end = unit + units; unit < end; ++group) {
      const Dequantiser dequantised = Dequantiser::of(w_, block, group);
      const int32_t group_end = w_.group_units[group + 1] < end ? w_.group_units[group + 1] : end;
      for (; unit < group_end; ++unit, line += kLine, out += kUnitBytes) {
        ask_second_level_for(line + kUnits * kLine);
        unroll<0, A::kSteps>([&](auto i) {
          _mm512_store_si512(out + i.value * kLine, dequantised(bf16_codes<i.value>(_mm512_loadu_si512(line))));
        });
      }
    }
  }

  // Where it opens totals, there are none yet. Not inlined: the compiler has registers for one loop of this kind.
  template <int MB, int NB>
  [[gnu::noinline]] void add_tile(const uint8_t* x, int32_t units, float* totals, int64_t columns, bool opens) {
    typename A::Sum sums[NB][MB];
    const auto each = [&](auto&& body) {
      unroll<0, NB>([&](auto n) TM_INLINED {
        unroll<0, MB>([&](auto m) TM_INLINED {
          body(sums[n.value][m.value], totals + m.value * columns + n.value * kBlock);
        });
      });
    };
    if (opens) {
      zero<A, MB, NB>(sums);
    } else {
      each([](auto& sum, float* total) TM_INLINED { sum = _mm512_load_ps(total); });
    }
    const uint8_t* weights = panel_;
    for (int32_t u = 0; u < units; ++u) {
      add_unit<A, Decoded<A>, MB, NB>(sums, weights, kBlockBytes, x);
      weights += kUnitBytes;
      x += kRows * A::kUnitBytes;
    }
    each([](auto& sum, float* total) TM_INLINED { _mm512_store_ps(total, sum); });
  }

  const Problem& p_;
  const Weight& w_;
  const Rows& rows_;
  uint8_t* panel_ = nullptr;  // [kWide blocks][units][steps][64]
  float* totals_ = nullptr;   // [tiles][rows][columns of the strip]
};

}  // namespace
}  // namespace tokenmill::int4
