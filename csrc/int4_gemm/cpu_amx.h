// INT4 weights on AMX: tiles of 16 columns of W meet tiles of at most 16 rows of x, in bf16 or int8.
//
// A line of the packed weight (8 rows of K by 16 columns) is, nibble by nibble, what rows of AMX's second operand are:
// a shift and a mask give 16 columns of two bf16 (or four int8) rows of K. The codes of one group are decoded once,
// into a panel in the first-level cache, where every tile of activations meets them.
//
// The sums of a group are codes times activations; they leave the tile registers once a group, to be scaled and added
// in float32. That is work for the vector units, like decoding; both are done between the products of another turn,
// which keep the tile unit busy meanwhile. One turn is two row tiles by two blocks for one group: four sums, for which
// each operand is loaded once for two products.
//
// An arithmetic is a struct with
//   static constexpr int kStepUnits;                              // units of 8 rows of K in one tile, 64 bytes a row
//   static void decode(const uint8_t* lines, int units, uint8_t* tile);
//   template <int kTile, int kBlock> static void product();       // sums (tile, block) += activations x codes
//   static Scales scales_of(const Weight&, int64_t index);        // of 16 columns of one group
//   static __m512 scaled(const Scales&, const float* sums, const float* row_sum, const float* row_scale, __m512 total);
#pragma once

#include <immintrin.h>

#include "cpu_ahead.h"
#include "cpu_memory.h"
#include "cpu_tiles.h"
#include "cpu_vector.h"

namespace tokenmill::int4 {
namespace {

constexpr int kTileRows = 16;                  // rows of a tile register
constexpr int kTileBytes = kTileRows * kLine;  // bytes of one
constexpr int kTileFloats = kTileRows * kBlock;
constexpr int kSegment = 4;  // steps in a panel; the sums of a longer group wait in memory from segment to segment
constexpr int64_t kStripBlocks = 16;  // blocks that meet a group of the activations before the next group does
constexpr int kLinesAhead = 32;  // how far ahead of decoding codes are asked for: the processor's own looks shorter

// What is written before tiles are loaded must have been written: GCC 12 does not say so of its tile loads.
TM_INLINE void written() { __atomic_signal_fence(__ATOMIC_SEQ_CST); }

// Steps of all groups: each group is filled up to whole steps.
template <class A>
int64_t steps_of(const Weight& w) {
  int64_t steps = 0;
  for (int64_t g = 0; g < w.groups; ++g) {
    steps += (w.group_units[g + 1] - w.group_units[g] + A::kStepUnits - 1) / A::kStepUnits;
  }
  return steps;
}

// Where a row of a tile of activations is: segment by segment, in each tile by tile, step by step, so that what one
// segment reads is one stretch of memory.
class RowPlaces {
 public:
  RowPlaces(const Rows& rows, int64_t packed_row)
      : base_(rows.values + packed_row % rows.rows * kLine), tile_(packed_row / rows.rows), tiles_(rows.tiles),
        tile_bytes_(int64_t(rows.rows) * kLine) {}

  // Step `i` of a group of `steps` that begins at step `first` of all.
  uint8_t* operator()(int64_t first, int64_t steps, int64_t i) const {
    const int64_t segment = i / kSegment * kSegment;
    const int64_t length = steps - segment < kSegment ? steps - segment : kSegment;
    return base_ + ((first + segment) * tiles_ + tile_ * length + i - segment) * tile_bytes_;
  }

 private:
  uint8_t* base_;
  int64_t tile_, tiles_, tile_bytes_;
};

template <class A>
int64_t row_bytes(const Weight& w) {
  return steps_of<A>(w) * kLine;
}

// All tiles are as high as each other, so that few rows are filling; an even number of rows, so that the two parts of a
// split row are in one tile.
inline int tile_rows_amx(int64_t packed_rows) {
  if (packed_rows <= kTileRows) return int(packed_rows);
  const int64_t tiles = (packed_rows + kTileRows - 1) / kTileRows;
  return int((packed_rows + 2 * tiles - 1) / (2 * tiles) * 2);
}

// The shapes of this thread's tile registers while it lives: 0..3 sums and 4..5 activations of `rows` rows, 6..7 codes.
class TileShapes {
 public:
  explicit TileShapes(int rows) {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int t = 0; t < 8; ++t) {
      shapes.row_bytes[t] = kLine;
      shapes.rows[t] = uint8_t(t < 6 ? rows : kTileRows);
    }
    _tile_loadconfig(&shapes);
  }
  ~TileShapes() { _tile_release(); }
  TileShapes(const TileShapes&) = delete;
  TileShapes& operator=(const TileShapes&) = delete;
};

// A strip of up to kStripBlocks blocks for all rows.
template <class A>
class Strip {
 public:
  Strip(const Problem& p, const Rows& rows, int64_t block, int64_t blocks)
      : p_(p), w_(p.weight), rows_(rows), block_(block), blocks_(blocks), pairs_((blocks + 1) / 2),
        tile_bytes_(int64_t(rows.rows) * kLine) {}

  size_t memory_bytes() const { return 2 * kSlotBytes + kRowsBytes + (2 + 2 * turns()) * kTurnFloats * sizeof(float); }

  void use(uint8_t* memory) {
    panel_ = memory;
    row_ = reinterpret_cast<float*>(panel_ + 2 * kSlotBytes);
    sums_ = row_ + kRowsBytes / sizeof(float);
    results_ = sums_ + 2 * kTurnFloats;
    waiting_ = results_ + turns() * kTurnFloats;
    std::memset(results_, 0, turns() * kTurnFloats * sizeof(float));
  }

  void run() {
    {
      const TileShapes shapes(rows_.rows);
      if (rows_.tiles <= 2) {
        few_rows();
      } else {
        many_rows();
      }
    }
    for (int i = 0; i < kParts; ++i) add_part(finished_, i);
    store();
  }

 private:
  static constexpr size_t kSlotBytes = size_t(2) * kSegment * kTileBytes;  // the codes of two blocks
  static constexpr size_t kTurnFloats = 4 * kTileFloats;                   // the sums of one turn
  static constexpr size_t kRowsBytes = size_t(kTileRows) * kStripBlocks * kBlock * sizeof(float);

  // A group, or as much of it as fits the panel.
  struct Segment {
    int64_t group;
    int32_t first, last;  // units
    int64_t step;         // where it begins in the packed activations
    int steps;
    bool opens, closes;  // its group
  };

  size_t turns() const { return size_t((rows_.tiles + 1) / 2 * pairs_); }

  Segment segment(int64_t group, int32_t first, int64_t step) const {
    const int32_t end = w_.group_units[group + 1];
    const int32_t last = end - first > kSegment * A::kStepUnits ? first + kSegment * A::kStepUnits : end;
    const int steps = (last - first + A::kStepUnits - 1) / A::kStepUnits;
    return {group, first, last, step, steps, first == w_.group_units[group], last == end};
  }

  // Groups without rows have no segment. Past the last one, `group` is the number of groups.
  Segment first_segment() const { return after(0, 0); }
  Segment next(const Segment& s) const {
    return s.closes ? after(s.group + 1, s.step + s.steps) : segment(s.group, s.last, s.step + s.steps);
  }
  Segment after(int64_t group, int64_t step) const {
    while (group < w_.groups && w_.group_units[group] == w_.group_units[group + 1]) ++group;
    if (group == w_.groups) return {group, 0, 0, step, 0, true, true};
    return segment(group, w_.group_units[group], step);
  }

  // Decoding takes longer than multiplying: while one segment is multiplied the next is decoded, tile by tile. Pair
  // after pair, so that the codes are read from memory as two long streams, which the processor sees coming.
  void few_rows() {
    Segment s = first_segment();
    int64_t pair = 0;
    for (int i = 0; i < s.steps; ++i) decode(s, 0, 0, i);
    for (int slot = 0; pair < pairs_ && s.steps > 0; slot ^= 1) {
      Segment later = next(s);
      int64_t later_pair = pair;
      if (later.steps == 0 && ++later_pair < pairs_) later = first_segment();
      if (s.closes) ask_for_scales<2>(w_, block_ + 2 * pair + 2, s.group);
      multiply<true>(s, 0, pair, slot, later, later_pair);
      s = later, pair = later_pair;
    }
  }

  // Four blocks, and two row tiles with what belongs to them, fit the first-level cache.
  void many_rows() {
    for (Segment s = first_segment(); s.steps > 0; s = next(s)) {
      for (int64_t pair = 0; pair < pairs_; pair += 2) {
        const bool two = pair + 1 < pairs_;
        for (int slot = 0; slot <= int(two); ++slot) {
          for (int i = 0; i < s.steps; ++i) decode(s, pair + slot, slot, i);
        }
        for (int64_t tile = 0; tile < rows_.tiles; tile += 2) {
          multiply<false>(s, tile, pair, 0, s, 0);
          if (two) multiply<false>(s, tile, pair + 1, 1, s, 0);
        }
      }
    }
  }

  // Step i of both blocks of a pair.
  TM_INLINE void decode(const Segment& s, int64_t pair, int slot, int i) {
    decode_one(s, pair, slot, i, 0);
    if (2 * pair + 1 < blocks_) decode_one(s, pair, slot, i, 1);
  }

  TM_INLINE void decode_one(const Segment& s, int64_t pair, int slot, int i, int b) {
    const int32_t unit = s.first + i * A::kStepUnits;
    const uint8_t* lines = w_.lines + ((block_ + 2 * pair + b) * w_.units + unit) * kLine;
    for (int u = 0; u < A::kStepUnits; ++u) {
      ask_for(lines + (u + kLinesAhead) * kLine);
    }
    A::decode(lines, s.last - unit, panel_ + slot * kSlotBytes + (b * kSegment + i) * kTileBytes);
    written();
  }

  // Two row tiles by two blocks, or what there is of them. With kDecode, pair `later` of segment `s_later` is decoded
  // into the other slot meanwhile.
  template <bool kDecode>
  void multiply(const Segment& s, int64_t tile, int64_t pair, int slot, const Segment& s_later, int64_t later) {
    const bool two_tiles = tile + 1 < rows_.tiles, two_blocks = 2 * pair + 1 < blocks_;
    if (two_tiles && two_blocks) {
      turn<kDecode, 2, 2>(s, tile, pair, slot, s_later, later);
    } else if (two_tiles) {
      turn<kDecode, 2, 1>(s, tile, pair, slot, s_later, later);
    } else if (two_blocks) {
      turn<kDecode, 1, 2>(s, tile, pair, slot, s_later, later);
    } else {
      turn<kDecode, 1, 1>(s, tile, pair, slot, s_later, later);
    }
  }

  template <bool kDecode, int kTiles, int kBlocks>
  void turn(const Segment& s, int64_t tile, int64_t pair, int slot, const Segment& s_later, int64_t later) {
    const uint8_t* x0 = rows_.values + (s.step * rows_.tiles + tile * s.steps) * tile_bytes_;
    const uint8_t* x1 = x0 + s.steps * tile_bytes_;
    const uint8_t* codes0 = panel_ + slot * kSlotBytes;
    const uint8_t* codes1 = codes0 + kSegment * kTileBytes;
    const int64_t place = (tile / 2 * pairs_ + pair) * int64_t(kTurnFloats);
    float* waiting = waiting_ + place;
    if (s.opens) {
      _tile_zero(0);
      if constexpr (kBlocks == 2) _tile_zero(1);
      if constexpr (kTiles == 2) _tile_zero(2);
      if constexpr (kTiles + kBlocks == 4) _tile_zero(3);
    } else {
      _tile_loadd(0, waiting, kLine);
      if constexpr (kBlocks == 2) _tile_loadd(1, waiting + kTileFloats, kLine);
      if constexpr (kTiles == 2) _tile_loadd(2, waiting + 2 * kTileFloats, kLine);
      if constexpr (kTiles + kBlocks == 4) _tile_loadd(3, waiting + 3 * kTileFloats, kLine);
    }
    const Finished before = finished_;
    if (s.closes) finished_ = {sums_ + turn_ * kTurnFloats, results_ + place, s.group, tile, pair};
    const int parts = s.closes ? kParts : 0;
    for (int i = 0; i < s.steps; ++i) {
      if (i < parts) add_part(before, i);
      if constexpr (kDecode) {
        if (i < s_later.steps) decode(s_later, later, slot ^ 1, i);
      }
      _tile_loadd(4, x0, kLine);
      _tile_loadd(6, codes0, kLine);
      if constexpr (kBlocks == 2) _tile_loadd(7, codes1, kLine);
      A::template product<0, 0>();
      if constexpr (kBlocks == 2) A::template product<0, 1>();
      if constexpr (kTiles == 2) {
        _tile_loadd(5, x1, kLine);
        A::template product<1, 0>();
        if constexpr (kBlocks == 2) A::template product<1, 1>();
      }
      x0 += tile_bytes_, x1 += tile_bytes_;
      codes0 += kTileBytes, codes1 += kTileBytes;
    }
    for (int i = s.steps; i < parts; ++i) add_part(before, i);
    if constexpr (kDecode) {
      for (int i = s.steps; i < s_later.steps; ++i) decode(s_later, later, slot ^ 1, i);
    }
    float* sums = s.closes ? sums_ + turn_ * kTurnFloats : waiting;
    turn_ ^= int(s.closes);
    _tile_stored(0, sums, kLine);
    if constexpr (kBlocks == 2) _tile_stored(1, sums + kTileFloats, kLine);
    if constexpr (kTiles == 2) _tile_stored(2, sums + 2 * kTileFloats, kLine);
    if constexpr (kTiles + kBlocks == 4) _tile_stored(3, sums + 3 * kTileFloats, kLine);
  }

  struct Finished {
    const float* sums = nullptr;  // [2 row tiles][2 blocks][16][16]; null: none yet
    float* results = nullptr;     // likewise
    int64_t group = 0, tile = 0, pair = 0;
  };

  // Scales one tile of a finished turn and adds it to the results.
  static constexpr int kParts = 4;
  TM_INLINE void add_part(const Finished& f, int part) {
    const int t = part / 2, b = part % 2;
    if (!f.sums || f.tile + t >= rows_.tiles || 2 * f.pair + b >= blocks_) return;
    const auto scales = A::scales_of(w_, ((block_ + 2 * f.pair + b) * w_.groups + f.group) * kBlock);
    const float* sums = f.sums + part * kTileFloats;
    float* results = f.results + part * kTileFloats;
    const int64_t row = ((f.tile + t) * w_.groups + f.group) * rows_.rows;
    const float *row_sums = rows_.sums + row, *row_scales = rows_.scales + row;
    const auto add_row = [&](int r) {
      _mm512_store_ps(results + r * kBlock, A::scaled(scales, sums + r * kBlock, row_sums + r, row_scales + r,
                                                      _mm512_load_ps(results + r * kBlock)));
    };
    if (rows_.rows == kTileRows) {
      unroll<0, kTileRows>([&](auto r) { add_row(r.value); });
    } else {
      for (int r = 0; r < rows_.rows; ++r) add_row(r);
    }
  }

  void store() {
    const int64_t columns = blocks_ * kBlock;
    for (int64_t t = 0; t < rows_.tiles; ++t) {
      for (int64_t b = 0; b < blocks_; ++b) {
        const float* results =
            results_ + (t / 2 * pairs_ + b / 2) * int64_t(kTurnFloats) + (2 * (t % 2) + b % 2) * kTileFloats;
        for (int r = 0; r < rows_.rows; ++r) {
          _mm512_store_ps(row_ + r * columns + b * kBlock, _mm512_load_ps(results + r * kBlock));
        }
      }
      store_tile(p_, rows_, t * rows_.rows, block_, int(columns), row_);
    }
  }

  const Problem& p_;
  const Weight& w_;
  const Rows& rows_;
  const int64_t block_, blocks_, pairs_, tile_bytes_;
  uint8_t* panel_;  // [2 slots][2 blocks][steps of a segment][1024]
  float* row_;      // [rows of a tile][columns]
  float* sums_;     // two turns: the last one's sums and those of the one before
  float* results_;  // [pairs of tiles][pairs of blocks], each a turn
  float* waiting_;  // likewise: sums of a group of several segments
  int turn_ = 0;
  Finished finished_;
};

template <class A>
void multiply_amx(const Problem& p, const Rows& rows, int64_t first, int64_t last) {
  thread_local Memory memory;
  for (int64_t block = first; block < last; block += kStripBlocks) {
    Strip<A> strip(p, rows, block, last - block < kStripBlocks ? last - block : kStripBlocks);
    strip.use(memory.at_least(strip.memory_bytes()));
    strip.run();
  }
}

}  // namespace
}  // namespace tokenmill::int4
