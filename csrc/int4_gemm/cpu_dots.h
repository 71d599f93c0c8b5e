// Tiles of exact integer dot products, for activations that were quantised per row and group: the dots of a group in
// int32, scaled and added to totals in float32; compiled once per instruction set.
//
// Beside what cpu_tiles.h and cpu_units.h ask of it, an arithmetic has
//   static constexpr int32_t kMostUnits;                // of which the dots fit into int32
#pragma once

#include "cpu_units.h"

namespace tokenmill::int4 {
namespace {

// Adds the dots of a group, or of a part of one, to the totals: (dot - zero * sum) * weight scale * activation scale. The
// sum is that of a whole group: what its zero points take away goes with the part that opens it.
template <int MB, int NB>
TM_INLINE void add_dots(const Weight& w, int64_t block, int64_t group, bool opens,
                        const Vector::Int (&dots)[NB * Vector::kParts][MB], const float* sums, const float* scales,
                        float* totals) {
  // A fence for the compiler, as in cpu_floating.h: totals kept in registers leave too few for the dots.
  __atomic_signal_fence(__ATOMIC_SEQ_CST);
  unroll<0, NB * Vector::kParts>([&](auto r) TM_INLINED {
    const int64_t place = place_of<r.value>(w, block, group);
    const Vector::Float zero = opens ? load_zeros(w, place) : Vector::zero(), scale = load_scales(w, place);
    unroll<0, MB>([&](auto m) TM_INLINED {
      float* total = totals + m.value * NB * kBlock + r.value * kLanes;
      const Vector::Float value =
          Vector::subtract_product(zero, Vector::all(sums[m.value]), Vector::to_float(dots[r.value][m.value]));
      const Vector::Float both = Vector::multiply(scale, Vector::all(scales[m.value]));
      Vector::store(total, Vector::multiply_add(value, both, Vector::load(total)));
    });
  });
}

// A tile of MB rows by NB blocks, all of K. Not inlined: the compiler has registers for one loop of this kind.
template <class A, int MB, int NB>
[[gnu::noinline]] void dots_tile(const Weight& w, const uint8_t* x, const float* sums, const float* scales,
                                 int64_t block, float* out) {
  const int64_t stride = w.units * kLine;
  const uint8_t* lines = w.lines + block * stride;
  std::memset(out, 0, sizeof(float) * MB * NB * kBlock);
  const LinesAhead<NB, kCodesAhead> ahead(w);
  for (int64_t g = 0; g < w.groups; ++g) {
    ask_for_scales<NB>(w, block + NB, g);
    const int32_t opening = w.group_units[g], closing = w.group_units[g + 1];
    for (int32_t first = opening; first < closing; first += A::kMostUnits) {
      const int32_t last = closing - first < A::kMostUnits ? closing : first + A::kMostUnits;
      Vector::Int dots[NB * Vector::kParts][MB];
      zero<A, MB, NB>(dots);
      for (int32_t u = first; u < last; ++u) {
        ask_for_codes<NB>(lines, ahead.of(lines, u), stride);
        add_unit<A, Stored<A>, MB, NB>(dots, lines, stride, x);
        lines += kLine;
        x += MB * A::kUnitBytes;
      }
      add_dots<MB, NB>(w, block, g, first == opening, dots, sums + g * MB, scales + g * MB, out);
    }
  }
}

// Blocks at once: enough sums to hide the latency of products, few enough for the registers (32 or 16).
inline constexpr int dots_width(int rows) {
  if (Vector::kParts == 1) return rows <= 6 ? 4 : 2;
  return rows == 1 ? 4 : rows == 2 ? 2 : 1;
}

// Of 16 registers six rows would need each: GCC keeps a sum of them in memory, and its latency is what they take.
constexpr int kDotsMaxRows = Vector::kParts == 1 ? 12 : 5;

}  // namespace
}  // namespace tokenmill::int4
