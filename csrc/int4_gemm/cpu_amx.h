// INT4 weights on AMX, in bf16 or int8: a few rows by cpu_amx_few.h, more here.
//
// The codes of one group are decoded once, into a panel in the first-level cache, where every tile of activations meets
// them. One turn is two row tiles by two blocks for one group: four sums, for which each operand is loaded once for two
// products. Scaling the sums of a turn is work for the vector units and is done between the products of the next.
#pragma once

#include "cpu_amx_few.h"
#include "cpu_memory.h"

namespace tokenmill::int4 {
namespace {

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
      multiply();
    }
    for (int i = 0; i < kParts; ++i) add_part(finished_, i);
    store();
  }

 private:
  static constexpr int kLinesAhead = 32;  // how far ahead of decoding codes are asked for
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

  // Four blocks, and two row tiles with what belongs to them, fit the first-level cache.
  void multiply() {
    for (Segment s = first_segment(); s.steps > 0; s = next(s)) {
      for (int64_t pair = 0; pair < pairs_; pair += 2) {
        const bool two = pair + 1 < pairs_;
        for (int slot = 0; slot <= int(two); ++slot) {
          for (int i = 0; i < s.steps; ++i) decode(s, pair + slot, slot, i);
        }
        for (int64_t tile = 0; tile < rows_.tiles; tile += 2) {
          multiply(s, tile, pair, 0);
          if (two) multiply(s, tile, pair + 1, 1);
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

  // Two row tiles by two blocks, or what there is of them.
  void multiply(const Segment& s, int64_t tile, int64_t pair, int slot) {
    const bool two_tiles = tile + 1 < rows_.tiles, two_blocks = 2 * pair + 1 < blocks_;
    if (two_tiles && two_blocks) {
      turn<2, 2>(s, tile, pair, slot);
    } else if (two_tiles) {
      turn<2, 1>(s, tile, pair, slot);
    } else if (two_blocks) {
      turn<1, 2>(s, tile, pair, slot);
    } else {
      turn<1, 1>(s, tile, pair, slot);
    }
  }

  template <int kTiles, int kBlocks>
  void turn(const Segment& s, int64_t tile, int64_t pair, int slot) {
    const uint8_t* x0 = rows_.values + (s.step * rows_.tiles + tile * s.steps) * tile_bytes_;
    const uint8_t* x1 = x0 + s.steps * tile_bytes_;
    const uint8_t* codes0 = panel_ + slot * kSlotBytes;
    const uint8_t* codes1 = codes0 + kSegment * kTileBytes;
    const int64_t place = (tile / 2 * pairs_ + pair) * int64_t(kTurnFloats);
    float* waiting = waiting_ + place;
    if (s.opens) {
      zero_sums<kTiles, kBlocks>();
    } else {
      load_sums<kTiles, kBlocks>(waiting);
    }
    const Finished before = finished_;
    if (s.closes) finished_ = {sums_ + turn_ * kTurnFloats, results_ + place, s.group, tile, pair};
    const int parts = s.closes ? kParts : 0;
    for (int i = 0; i < s.steps; ++i) {
      if (i < parts) add_part(before, i);
      multiply_step<A, kTiles, kBlocks>(x0, x1, codes0, codes1);
      x0 += tile_bytes_, x1 += tile_bytes_;
      codes0 += kTileBytes, codes1 += kTileBytes;
    }
    for (int i = s.steps; i < parts; ++i) add_part(before, i);
    float* sums = s.closes ? sums_ + turn_ * kTurnFloats : waiting;
    turn_ ^= int(s.closes);
    store_sums<kTiles, kBlocks>(sums);
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
  if (rows.tiles == 1) return FewRows<A, 1>(p, rows).run(first, last);
  if (rows.tiles == 2) return FewRows<A, 2>(p, rows).run(first, last);
  thread_local Memory memory;
  for (int64_t block = first; block < last; block += kStripBlocks) {
    Strip<A> strip(p, rows, block, last - block < kStripBlocks ? last - block : kStripBlocks);
    strip.use(memory.at_least(strip.memory_bytes()));
    strip.run();
  }
}

}  // namespace
}  // namespace tokenmill::int4
