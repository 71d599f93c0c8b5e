// W4A8 with AVX2 only.
//
// Four blocks of columns are walked along K side by side: as many streams as the memory serves best. Up to four rows of
// activations meet the codes as they are read. For more, the first four unpack the codes of four blocks to a panel of
// bytes while they meet them, 128 rows of K at a time, and the panel stays in the first-level cache until all rows of
// activations have met it.
#include "cpu_ahead.h"
#include "cpu_maddubs.h"

namespace tokenmill::int4 {
namespace {

constexpr int kTileRows = 4;     // with two registers of columns: eight sums, and registers for all that feeds them
constexpr int kStripBlocks = 4;  // walked side by side
constexpr int kPanelUnits = 16;  // of K: a group of 128 rows, or part of a larger one
constexpr int kPanelTiles = 32;  // tiles that meet a panel: their totals stay in the second-level cache

// The units of a panel.
struct Step {
  int64_t group;
  int32_t unit, units;  // where it begins, how many
  bool first, last;     // of its group
};

template <class Body>
TM_INLINE void each_step_of(const Weight& w, int64_t group, Body&& body) {
  const int32_t begin = w.group_units[group], end = w.group_units[group + 1];
  for (int32_t u = begin; u < end; u += kPanelUnits) {
    const bool last = end - u <= kPanelUnits;
    body(Step{group, u, last ? end - u : kPanelUnits, u == begin, last});
  }
}

template <class Body>
TM_INLINE void each_step(const Weight& w, Body&& body) {
  for (int64_t g = 0; g < w.groups; ++g) each_step_of(w, g, body);
}

// Activations are stored step by step, all tiles of one before the next, so that a panel meets them in one stream:
// values [steps][tiles][units of the step][rows of a tile][8], sums and scales [groups][tiles][rows of a tile].
TM_INLINE uint8_t* values_of(const Rows& rows, const Step& s, int64_t tile) {
  return rows.values + (s.unit * rows.tiles + s.units * tile) * rows.rows * kInt8UnitBytes;
}

TM_INLINE int64_t group_of(const Rows& rows, int64_t group, int64_t tile) {
  return (group * rows.tiles + tile) * rows.rows;
}

void pack_int8(const Problem& p, const Rows& rows, int64_t first, int64_t last, float* scratch) {
  for (int64_t t = first; t < last; ++t) {
    for (int64_t g = 0; g < p.weight.groups; ++g) {
      const int32_t begin = p.weight.group_units[g], end = p.weight.group_units[g + 1];
      for (int r = 0; r < rows.rows; ++r) {
        read_row(p, t * rows.rows + r, begin, end, scratch);
        const Quantiser q = quantiser_of(scratch, end - begin);
        __m256i sum = _mm256_setzero_si256();
        each_step_of(p.weight, g, [&](const Step& s) {
          quantise(scratch + (s.unit - begin) * kUnit, s.units, q, values_of(rows, s, t) + r * kInt8UnitBytes,
                   rows.rows * kInt8UnitBytes, sum);
        });
        rows.sums[group_of(rows, g, t) + r] = total_of(sum);
        rows.scales[group_of(rows, g, t) + r] = q.scale;
      }
    }
  }
}

// Blocks that are walked along K side by side.
struct Strip {
  const Weight& weight;
  int64_t first;
  int count;

  int64_t stride() const { return weight.units * kLine; }

  const uint8_t* lines(int32_t unit) const { return weight.lines + first * stride() + unit * kLine; }
};

// Scales and zero points of one group for the columns of a strip.
struct Columns {
  alignas(64) float scales[kStripBlocks * kBlock];
  alignas(64) float zeros[kStripBlocks * kBlock];

  TM_INLINE void load(const Strip& strip, int64_t group) {
    for (int b = 0; b < strip.count; ++b) {
      const int64_t index = ((strip.first + b) * strip.weight.groups + group) * kBlock;
      unroll<0, Vector::kParts>([&](auto part) {
        const int column = b * kBlock + part.value * kLanes;
        Vector::store(scales + column, load_scales(strip.weight, index + part.value * kLanes));
        Vector::store(zeros + column, load_zeros(strip.weight, index + part.value * kLanes));
      });
    }
  }
};

// MB rows, codes straight from memory, NB blocks in one inner loop. Where that is not the whole strip, its blocks take
// turns every few lines, which keeps their streams going side by side.
template <int MB, int NB>
void multiply_few(const Problem& p, const Rows& rows, const Strip& strip) {
  alignas(64) float totals[MB * kStripBlocks * kBlock] = {};
  alignas(64) int32_t dots[kStripBlocks][MB * kBlock];
  Columns columns;
  for (int64_t g = 0; g < p.weight.groups; ++g) {
    const int32_t first = p.weight.group_units[g], last = p.weight.group_units[g + 1];
    const int32_t turn = NB == kStripBlocks ? last - first : kUnitsPerWidening;
    columns.load(strip, g);
    ask_for_scales<kStripBlocks>(p.weight, strip.first + kStripBlocks, g);
    for (int32_t u = first; u < last; u += turn) {
      const int32_t units = last - u < turn ? last - u : turn;
      const uint8_t* x = rows.values + u * MB * kInt8UnitBytes;
      const auto multiply = [&](auto blocks, int b) {
        const Group group{columns.scales + b * kBlock, columns.zeros + b * kBlock, rows.scales + g * MB,
                          rows.sums + g * MB,          totals + b * kBlock,        strip.count * kBlock};
        const Chunk chunk{strip.lines(u) + b * strip.stride(), strip.stride(), units, x};
        multiply_chunk<Nibbles, MB, MB, blocks.value>(chunk, group, dots[b], u == first, u + units == last);
      };
      int b = 0;
      for (; b + NB <= strip.count; b += NB) multiply(Constant<NB>{}, b);
      if constexpr (NB > 1) {
        for (; b < strip.count; ++b) multiply(Constant<1>{}, b);
      }
    }
  }
  store_tile(p, rows, 0, strip.first, strip.count * kBlock, totals);
}

struct Panel {
  alignas(64) uint8_t codes[kStripBlocks][kPanelUnits * kPanelUnit];
  Columns columns;
  alignas(64) float totals[kPanelTiles][kTileRows * kStripBlocks * kBlock];
  alignas(64) int32_t dots[kPanelTiles][kStripBlocks][kTileRows * kBlock];  // of groups of several steps
};

// MB rows of each of some tiles against a panel. Not inlined: the compiler has registers for one loop of this kind.
template <class Codes, int MB>
[[gnu::noinline]] void multiply_tiles(Panel& panel, const Rows& rows, const Strip& strip, const Step& s,
                                      int64_t first_tile, int first_slot, int last_slot) {
  for (int slot = first_slot; slot < last_slot; ++slot) {
    const uint8_t* x = values_of(rows, s, first_tile + slot);
    const int64_t row = group_of(rows, s.group, first_tile + slot);
    for (int b = 0; b < strip.count; ++b) {
      const Group group{panel.columns.scales + b * kBlock, panel.columns.zeros + b * kBlock, rows.scales + row,
                        rows.sums + row, panel.totals[slot] + b * kBlock, strip.count * kBlock};
      const uint8_t* codes = Codes::kFills ? strip.lines(s.unit) + b * strip.stride() : panel.codes[b];
      const Chunk chunk{codes, 0, s.units, x, panel.codes[b]};
      multiply_chunk<Codes, kTileRows, MB, 1>(chunk, group, panel.dots[slot][b], s.first, s.last);
    }
  }
}

// Tiles first_tile.. of rows against one strip.
void multiply_panel(const Problem& p, const Rows& rows, const Strip& strip, int64_t first_tile, int tiles) {
  Panel panel;
  std::memset(panel.totals, 0, sizeof panel.totals[0] * size_t(tiles));
  const int64_t left = p.M - first_tile * kTileRows;
  const int full = left < tiles * kTileRows ? tiles - 1 : tiles;
  const int64_t rest = full < tiles ? left % kTileRows : 0;
  each_step(p.weight, [&](const Step& s) {
    if (s.last) panel.columns.load(strip, s.group);
    const auto meet = [&](auto rows_of_tile, int from, int to) {
      if (from == to) return;
      const int fills = from == 0 ? 1 : 0;
      if (fills) multiply_tiles<Filling, rows_of_tile.value>(panel, rows, strip, s, first_tile, 0, 1);
      multiply_tiles<Bytes, rows_of_tile.value>(panel, rows, strip, s, first_tile, from + fills, to);
    };
    meet(Constant<kTileRows>{}, 0, full);
    unroll<1, kTileRows>([&](auto m) {
      if (rest == m.value) meet(m, full, tiles);
    });
  });
  for (int t = 0; t < tiles; ++t) {
    store_tile(p, rows, (first_tile + t) * kTileRows, strip.first, strip.count * kBlock, panel.totals[t]);
  }
}

int64_t row_bytes(const Weight& w) { return w.units * kInt8UnitBytes; }

int rows_of_tile(int64_t rows, int) { return rows < kTileRows ? int(rows) : kTileRows; }

void multiply_int8(const Problem& p, const Rows& rows, int64_t first, int64_t last) {
  for (int64_t block = first; block < last; block += kStripBlocks) {
    const Strip strip{p.weight, block, int(last - block < kStripBlocks ? last - block : kStripBlocks)};
    if (rows.tiles == 1) {
      unroll<1, kTileRows + 1>([&](auto m) {
        // Eight sums in registers here, too.
        if (rows.rows == m.value) multiply_few<m.value, m.value == 1 ? 4 : m.value == 2 ? 2 : 1>(p, rows, strip);
      });
      continue;
    }
    for (int64_t t = 0; t < rows.tiles; t += kPanelTiles) {
      multiply_panel(p, rows, strip, t, int(rows.tiles - t < kPanelTiles ? rows.tiles - t : kPanelTiles));
    }
  }
}

}  // namespace

const Kernel kAvx2Int8 = {"avx2", kStrip, row_bytes, no_split, rows_of_tile, pack_int8, multiply_int8};

}  // namespace tokenmill::int4
