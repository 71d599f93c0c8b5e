// The loops of an arithmetic in floating point; compiled once per instruction set.
//
// Few rows meet codes as they are decoded. For many rows the codes of some blocks are decoded once, 128 rows of K at a
// time, to a panel in a near cache, which all tiles of activations meet before the next one is made.
//
// Beside what cpu_tiles.h and cpu_units.h ask of it, an arithmetic has
//   static constexpr int kTallFrom;                     // rows from which on a panel pays
//   static constexpr int kTallRows;                     // rows of a tile that meets a panel: a multiple of three
//   static constexpr int kPanelBlocks;                  // of a panel
//   static bool has_offset(const Weight&);              // whether decoded codes differ from the true ones
//   static Vector::Float offset(Vector::Float zero);    // by how much they exceed them
#pragma once

#include "cpu_memory.h"
#include "cpu_units.h"

namespace tokenmill::int4 {
namespace {

constexpr int kPanelUnits = 16;  // of a block in a panel

// Codes of a panel.
template <class A>
struct Decoded {
  static constexpr int kUnitBytes = A::kSteps * kLine;

  template <int kStep>
  TM_INLINE static typename A::Code at(const uint8_t* unit, int part) {
    typename A::Code code;
    std::memcpy(&code, unit + kStep * kLine + part * int(sizeof code), sizeof code);
    return code;
  }
};

// One part of a group: what a panel holds. Few rows are summed part by part, too, so that a row gives the same bits
// among few and among many.
struct Part {
  int64_t group;
  int32_t first, units;
  bool opens;  // its group
};

// The part of a group that begins with `unit`.
TM_INLINE Part part_of(const Weight& w, int64_t group, int32_t unit) {
  const int32_t left = w.group_units[group + 1] - unit;
  return {group, unit, left < kPanelUnits ? left : kPanelUnits, unit == w.group_units[group]};
}

// What the sums of a part begin with: nothing, or with the first part of a group what its zero points take away.
template <class A, int MB, int NB>
TM_INLINE void begin_part(const Weight& w, int64_t block, const Part& part, const float* row_sums,
                          typename A::Sum (&sums)[NB * Vector::kParts][MB]) {
  if (!part.opens || !A::has_offset(w)) return zero<A, MB, NB>(sums);
  unroll<0, NB * Vector::kParts>([&](auto r) {
    const Vector::Float offset = A::offset(load_zeros(w, place_of<r.value>(w, block, part.group)));
    unroll<0, MB>([&](auto m) {
      sums[r.value][m.value] = Vector::subtract_product(offset, Vector::all(row_sums[m.value]), Vector::zero());
    });
  });
}

// Scales the sums of a group, or of a part of one, and adds them to totals, rows `columns` floats apart.
template <class A, int MB, int NB>
TM_INLINE void add_part(const Weight& w, int64_t block, int64_t group, typename A::Sum (&sums)[NB * Vector::kParts][MB],
                        float* totals, int64_t columns) {
  // A fence for the compiler: or else GCC keeps totals in registers from group to group, and has none left for
  // some of the sums.
  __atomic_signal_fence(__ATOMIC_SEQ_CST);
  unroll<0, NB * Vector::kParts>([&](auto r) {
    const Vector::Float scale = load_scales(w, place_of<r.value>(w, block, group));
    unroll<0, MB>([&](auto m) {
      float* total = totals + m.value * columns + r.value * kLanes;
      Vector::store(total, Vector::multiply_add(sums[r.value][m.value], scale, Vector::load(total)));
    });
  });
}

// A tile of MB rows by NB blocks, all of K. Not inlined: the compiler has registers for one loop of this kind.
template <class A, int MB, int NB>
[[gnu::noinline]] void stored_tile(const Weight& w, const uint8_t* x, const float* row_sums, int64_t block,
                                  float* out) {
  const int64_t stride = w.units * kLine;
  const uint8_t* lines = w.lines + block * stride;
  std::memset(out, 0, sizeof(float) * MB * NB * kBlock);
  const LinesAhead<NB, kCodesAhead> ahead(w);
  for (int64_t g = 0; g < w.groups; ++g) {
    ask_for_scales<NB>(w, block + NB, g);
    for (int32_t unit = w.group_units[g]; unit < w.group_units[g + 1]; unit += kPanelUnits) {
      const Part part = part_of(w, g, unit);
      typename A::Sum sums[NB * Vector::kParts][MB];
      begin_part<A, MB, NB>(w, block, part, row_sums + g * MB, sums);
      for (int32_t u = part.first; u < part.first + part.units; ++u) {
        ask_for_codes<NB>(lines, ahead.of(lines, u), stride);
        add_unit<A, Stored<A>, MB, NB>(sums, lines, stride, x);
        lines += kLine;
        x += MB * A::kUnitBytes;
      }
      add_part<A, MB, NB>(w, block, g, sums, out, NB * kBlock);
    }
  }
}

template <class A>
class Tall {
 public:
  Tall(const Problem& p, const Rows& rows) : p_(p), w_(p.weight), rows_(rows) {}

  void run(int64_t first, int64_t last) {
    thread_local Memory memory;
    const size_t totals = size_t(rows_.tiles) * kRows * kStrip * kBlock * sizeof(float);
    panel_ = memory.at_least(A::kPanelBlocks * kBlockBytes + totals);
    totals_ = reinterpret_cast<float*>(panel_ + A::kPanelBlocks * kBlockBytes);
    for (; first < last; first += kStrip) strip(first, last - first < kStrip ? last - first : kStrip);
  }

 private:
  static constexpr int kRows = A::kTallRows, kWide = A::width(kRows);
  static constexpr int64_t kBlockBytes = kPanelUnits * Decoded<A>::kUnitBytes;

  void strip(int64_t block, int64_t blocks) {
    const int64_t columns = blocks * kBlock;
    std::memset(totals_, 0, size_t(rows_.tiles * kRows * columns) * sizeof(float));
    for (int64_t g = 0; g < w_.groups; ++g) {
      for (int32_t unit = w_.group_units[g]; unit < w_.group_units[g + 1]; unit += kPanelUnits) {
        const Part part = part_of(w_, g, unit);
        for (int64_t b = 0; b < blocks; b += A::kPanelBlocks) {
          panel(part, block, b, blocks - b < A::kPanelBlocks ? blocks - b : A::kPanelBlocks, columns);
        }
      }
    }
    for (int64_t t = 0; t < rows_.tiles; ++t) {
      store_tile(p_, rows_, t * kRows, block, int(columns), totals_ + t * kRows * columns);
    }
  }

  // Multiplies all rows by blocks `from`.. of the strip that begins with `block`. The first tile decodes what the others
  // meet. Of the last one only as many thirds are multiplied as hold rows.
  void panel(const Part& part, int64_t block, int64_t from, int64_t blocks, int64_t columns) {
    static_assert(kRows % 3 == 0 && A::kTallFrom > kRows);  // there is another tile than the last
    const auto multiply = [&](int64_t t, auto thirds, auto decodes) {
      constexpr int MB = kRows / 3 * decltype(thirds)::value;
      constexpr bool kDecodes = decltype(decodes)::value;
      float* totals = totals_ + t * kRows * columns + from * kBlock;
      int64_t b = 0;
      for (; b + kWide <= blocks; b += kWide) tile<MB, kWide, kDecodes>(part, t, block + from, b, totals, columns);
      for (; b < blocks; ++b) tile<MB, 1, kDecodes>(part, t, block + from, b, totals, columns);
    };
    const int64_t last = rows_.tiles - 1, rest = p_.M * rows_.split - last * kRows;
    multiply(0, Constant<3>{}, Constant<true>{});
    for (int64_t t = 1; t < last; ++t) multiply(t, Constant<3>{}, Constant<false>{});
    unroll<1, 4>([&](auto thirds) {
      if ((rest + kRows / 3 - 1) / (kRows / 3) == thirds.value) multiply(last, thirds, Constant<false>{});
    });
  }

  // Not inlined, for the same reason.
  template <int MB, int NB, bool kDecodes>
  [[gnu::noinline]] void tile(const Part& part, int64_t t, int64_t block, int64_t b, float* totals, int64_t columns) {
    const int64_t stride = w_.units * kLine;
    const uint8_t* lines = w_.lines + (block + b) * stride + part.first * kLine;
    uint8_t* panel = panel_ + b * kBlockBytes;
    const uint8_t *codes = panel, *x = rows_.values + (t * w_.units + part.first) * kRows * A::kUnitBytes;
    typename A::Sum sums[NB * Vector::kParts][MB];
    begin_part<A, MB, NB>(w_, block + b, part, rows_.sums + (t * w_.groups + part.group) * kRows, sums);
    // One unit ahead: what was written just now cannot be read yet.
    const auto decode_unit = [&](int32_t u) {
      unroll<0, NB>([&](auto n) {
        decode(lines + n.value * stride + u * kLine, panel + n.value * kBlockBytes + u * Decoded<A>::kUnitBytes);
      });
    };
    if constexpr (kDecodes) decode_unit(0);
    for (int32_t u = 0; u < part.units; ++u) {
      if (kDecodes && u + 1 < part.units) decode_unit(u + 1);
      add_unit<A, Decoded<A>, MB, NB>(sums, codes, kBlockBytes, x);
      codes += Decoded<A>::kUnitBytes;
      x += kRows * A::kUnitBytes;
    }
    add_part<A, MB, NB>(w_, block + b, part.group, sums, totals + b * kBlock, columns);
  }

  // A unit of a block.
  TM_INLINE static void decode(const uint8_t* line, uint8_t* out) {
    ask_for(line + kPanelUnits * kLine);  // of the next panel
    unroll<0, A::kSteps>([&](auto i) {
      unroll<0, Vector::kParts>([&](auto p) {
        const typename A::Code code = A::template decode<i.value>(line, p.value);
        std::memcpy(out + i.value * kLine + p.value * int(sizeof code), &code, sizeof code);
      });
    });
  }

  const Problem& p_;
  const Weight& w_;
  const Rows& rows_;
  uint8_t* panel_ = nullptr;  // [blocks][units][steps][64]
  float* totals_ = nullptr;   // [tiles][rows][columns of the strip]
};

template <class A>
int floating_tile_rows(int64_t packed_rows, int split) {
  return packed_rows < A::kTallFrom ? best_height(packed_rows, A::kMaxRows, split) : A::kTallRows;
}

template <class A>
void multiply_floating(const Problem& p, const Rows& rows, int64_t first, int64_t last) {
  if (p.M * rows.split < A::kTallFrom) return multiply<A>(p, rows, first, last);
  Tall<A>(p, rows).run(first, last);
}

}  // namespace
}  // namespace tokenmill::int4
