// The loop over tiles that every arithmetic shares; compiled once per instruction set.
//
// An arithmetic is a struct with
//   template <int MB, int NB> static void tile(const Weight&, const uint8_t* x, const float* sums, const float* scales,
//                                              int64_t block, float* out);   // out [MB][NB * 16]
//   static constexpr int width(int rows);          // blocks at once for tiles of so many rows
//   static constexpr int kMaxRows;                 // rows of the tallest tile
#pragma once

#include "cpu_rows.h"

namespace tokenmill::int4 {
namespace {

// A loop whose index is a constant in each turn: accumulators in arrays indexed by it stay in registers, which GCC 12
// does not manage for a loop that it unrolls itself.
template <auto kValue>
struct Constant {
  static constexpr auto value = kValue;
};

template <int kBegin, int kEnd, class Body>
TM_INLINE void unroll(Body&& body) {
  if constexpr (kBegin < kEnd) {
    body(Constant<kBegin>{});
    unroll<kBegin + 1, kEnd>(body);
  }
}

// Tile heights that are compiled; others are filled up with rows of zeros.
constexpr int kHeights[] = {1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16};

// The height up to `tallest`, a multiple of `split`, that wastes least: rows of filling cost a row each, and every tile,
// which decodes the weights again, costs as much as two rows for itself.
TM_INLINE int best_height(int64_t rows, int tallest, int split) {
  int best = tallest;
  int64_t best_cost = -1;
  for (int height : kHeights) {
    if (height > tallest || height % split != 0) continue;
    const int64_t cost = (rows + height - 1) / height * (height + 2);
    if (best_cost < 0 || cost <= best_cost) {
      best = height;
      best_cost = cost;
    }
  }
  return best;
}

template <class A, int MB, int NB>
void run_tile(const Problem& p, const Rows& rows, int64_t t, int64_t block) {
  alignas(64) float out[MB * NB * kBlock];
  const int64_t groups = p.weight.groups;
  A::template tile<MB, NB>(p.weight, rows.values + t * p.weight.units * MB * A::kUnitBytes,
                           rows.sums + t * groups * MB, rows.scales + t * groups * MB, block, out);
  store_tile(p, rows, t * MB, block, NB * kBlock, out);
}

// Blocks that a tile of activations meets before the next tile does: their codes and the tile stay in the second-level
// cache together, so that neither comes from further away than once a strip.
constexpr int64_t kStrip = 8;

template <class A, int MB>
void run_height(const Problem& p, const Rows& rows, int64_t first, int64_t last) {
  constexpr int kWide = A::width(MB);
  static_assert(kStrip % kWide == 0);
  for (int64_t strip = first; strip < last; strip += kStrip) {
    const int64_t end = strip + kStrip < last ? strip + kStrip : last;
    for (int64_t t = 0; t < rows.tiles; ++t) {
      int64_t block = strip;
      for (; block + kWide <= end; block += kWide) run_tile<A, MB, kWide>(p, rows, t, block);
      for (; block < end; ++block) run_tile<A, MB, 1>(p, rows, t, block);
    }
  }
}

template <class A>
void multiply(const Problem& p, const Rows& rows, int64_t first, int64_t last) {
  unroll<0, int(sizeof kHeights / sizeof *kHeights)>([&](auto i) {
    constexpr int kHeight = kHeights[decltype(i)::value];
    if constexpr (kHeight <= A::kMaxRows) {
      if (rows.rows == kHeight) run_height<A, kHeight>(p, rows, first, last);
    }
  });
}

inline int no_split(Type) { return 1; }

template <class A>
int64_t unit_row_bytes(const Weight& w) {
  return w.units * A::kUnitBytes;
}

template <class A>
int tile_rows(int64_t packed_rows, int split) {
  return best_height(packed_rows, A::kMaxRows, split);
}

// Where one group of a packed row goes: unit u at out + u * stride, its sum and scale at `index` of those arrays.
struct RowGroup {
  int64_t row;  // packed, of all tiles
  int32_t first, units;
  uint8_t* out;
  int64_t stride, index;
};

// All groups of tiles first..last-1. Group by group, so that lines which rows share are written in a near cache.
template <class A, class Body>
TM_INLINE void each_row_group(const Problem& p, const Rows& rows, int64_t first, int64_t last, Body&& body) {
  const Weight& w = p.weight;
  const int64_t height = rows.rows, stride = height * A::kUnitBytes;
  for (int64_t t = first; t < last; ++t) {
    for (int64_t g = 0; g < w.groups; ++g) {
      const int32_t begin = w.group_units[g];
      uint8_t* out = rows.values + (t * w.units + begin) * stride;
      for (int64_t r = 0; r < height; ++r) {
        body(RowGroup{t * height + r, begin, w.group_units[g + 1] - begin, out + r * A::kUnitBytes, stride,
                      (t * w.groups + g) * height + r});
      }
    }
  }
}

// Packs tiles first..last-1 of rows that are not split, by A::pack_group(values, units, out, stride, sum, scale).
template <class A>
void pack(const Problem& p, const Rows& rows, int64_t first, int64_t last, float* scratch) {
  each_row_group<A>(p, rows, first, last, [&](const RowGroup& g) {
    read_row(p, g.row, g.first, g.first + g.units, scratch);
    A::pack_group(scratch, g.units, g.out, g.stride, rows.sums + g.index, rows.scales + g.index);
  });
}

}  // namespace
}  // namespace tokenmill::int4
