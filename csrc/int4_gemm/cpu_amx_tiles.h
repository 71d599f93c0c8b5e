// What both ways of multiplying with AMX share: tile registers, and how activations lie for them.
//
// A line of the packed weight (8 rows of K by 16 columns) is, nibble by nibble, what rows of AMX's second operand are:
// a shift and a mask give 16 columns of two bf16 (or four int8) rows of K. So codes are decoded into first-level cache
// and loaded from there as tiles of 16 columns, which meet tiles of at most 16 rows of x.
//
// The sums of a group are codes times activations; they leave the tile registers once a group, to be scaled and added
// in float32.
//
// An arithmetic is a struct with
//   static constexpr int kStepUnits;                              // units of 8 rows of K in one tile, 64 bytes a row
//   static constexpr int kParts;                                  // tiles that a tile of rows is cut into: 2 for int16
//   static void decode(const uint8_t* lines, int units, uint8_t* tile);
//   template <int kTile, int kBlock> static void product();       // sums (tile, block) += activations x codes
//   static Scales scales_of(const Weight&, int64_t index);        // of 16 columns of one group
//   static __m512 scaled(const Scales&, const float* sums, const float* row_sum, const float* row_scale, __m512 total);
// Registers: 0 and 1 the sums of the first tile of rows for two blocks, 2 and 3 those of the second; 4 and 5 the
// activations of both; 6 and 7 the codes of both blocks.
#pragma once

#include <immintrin.h>

#include "cpu_ahead.h"
#include "cpu_tiles.h"
#include "cpu_vector.h"

namespace tokenmill::int4 {
namespace {

constexpr int kTileRows = 16;                  // rows of a tile register
constexpr int kTileBytes = kTileRows * kLine;  // bytes of one
constexpr int kTileFloats = kTileRows * kBlock;
constexpr int kFewTiles = 2;  // tiles of rows for which a code takes longer to decode than to multiply: cpu_amx_few.h
constexpr int kSegment = 4;   // steps that are decoded together for more

constexpr int64_t kStripBlocks = 16;  // blocks that meet a group of the activations before the next group does
constexpr int64_t kAnyBytes = INT64_MAX;  // of packed rows at once: to decode codes again costs more than to read rows

// What is written before tiles are loaded must have been written: GCC 12 does not say so of its tile loads.
TM_INLINE void written() { __atomic_signal_fence(__ATOMIC_SEQ_CST); }

// What arithmetics share whose codes are bytes: row 2u of the tile holds the even ones of unit u, row 2u + 1 the odd
// ones, as cpu_int8.h orders activations.
struct ByteCodes {
  static constexpr int kStepUnits = 8;

  struct Scales {
    __m512 scale, zero;
  };

  TM_INLINE static void decode(const uint8_t* lines, int units, uint8_t* tile) {
    const __m512i nibbles = _mm512_set1_epi32(0x0f0f0f0f);
    unroll<0, kStepUnits>([&](auto u) {
      const __m512i q = u.value < units ? _mm512_loadu_si512(lines + u.value * kLine) : _mm512_setzero_si512();
      _mm512_store_si512(tile + 2 * u.value * kLine, _mm512_and_si512(q, nibbles));
      _mm512_store_si512(tile + (2 * u.value + 1) * kLine, _mm512_and_si512(_mm512_srli_epi32(q, 4), nibbles));
    });
  }

  TM_INLINE static Scales scales_of(const Weight& w, int64_t index) {
    return {load_scales(w, index), load_zeros(w, index)};
  }

  // Adds to `total` the dot that was computed with the codes as they are.
  TM_INLINE static __m512 added(const Scales& s, __m512 dot, float row_sum, float row_scale, __m512 total) {
    const __m512 value = _mm512_fnmadd_ps(s.zero, _mm512_set1_ps(row_sum), dot);
    return _mm512_fmadd_ps(value, _mm512_mul_ps(s.scale, _mm512_set1_ps(row_scale)), total);
  }
};

// Steps of all groups: each group is filled up to whole steps.
template <class A>
int64_t steps_of(const Weight& w) {
  int64_t steps = 0;
  for (int64_t g = 0; g < w.groups; ++g) {
    steps += (w.group_units[g + 1] - w.group_units[g] + A::kStepUnits - 1) / A::kStepUnits;
  }
  return steps;
}

// Where a row of a tile of activations is: segment by segment (for few rows step by step), in each tile by tile, step by
// step, so that what one segment reads is one stretch of memory.
class RowPlaces {
 public:
  RowPlaces(const Rows& rows, int64_t packed_row)
      : base_(rows.values + packed_row % rows.rows * kLine), tile_(packed_row / rows.rows), tiles_(rows.tiles),
        segment_(rows.tiles <= kFewTiles ? 1 : kSegment), tile_bytes_(int64_t(rows.rows) * kLine) {}

  // Step `i` of a group of `steps` that begins at step `first` of all.
  uint8_t* operator()(int64_t first, int64_t steps, int64_t i) const {
    const int64_t segment = i / segment_ * segment_;
    const int64_t length = steps - segment < segment_ ? steps - segment : segment_;
    return base_ + ((first + segment) * tiles_ + tile_ * length + i - segment) * tile_bytes_;
  }

 private:
  uint8_t* base_;
  int64_t tile_, tiles_, segment_, tile_bytes_;
};

template <class A>
int64_t row_bytes(const Weight& w) {
  return steps_of<A>(w) * kLine;
}

// All tiles are as high as each other, so that few rows are filling; an even number of rows, so that the two parts of a
// split row are in one tile.
inline int tile_rows_amx(int64_t packed_rows, int) {
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

// Registers of the sums of kTiles tiles of rows by kBlocks blocks; in memory [2 tiles][2 blocks][16][16].
template <int kTiles, int kBlocks>
TM_INLINE void zero_sums() {
  _tile_zero(0);
  if constexpr (kBlocks == 2) _tile_zero(1);
  if constexpr (kTiles == 2) _tile_zero(2);
  if constexpr (kTiles + kBlocks == 4) _tile_zero(3);
}

template <int kTiles, int kBlocks>
TM_INLINE void load_sums(const float* sums) {
  _tile_loadd(0, sums, kLine);
  if constexpr (kBlocks == 2) _tile_loadd(1, sums + kTileFloats, kLine);
  if constexpr (kTiles == 2) _tile_loadd(2, sums + 2 * kTileFloats, kLine);
  if constexpr (kTiles + kBlocks == 4) _tile_loadd(3, sums + 3 * kTileFloats, kLine);
}

template <int kTiles, int kBlocks>
TM_INLINE void store_sums(float* sums) {
  _tile_stored(0, sums, kLine);
  if constexpr (kBlocks == 2) _tile_stored(1, sums + kTileFloats, kLine);
  if constexpr (kTiles == 2) _tile_stored(2, sums + 2 * kTileFloats, kLine);
  if constexpr (kTiles + kBlocks == 4) _tile_stored(3, sums + 3 * kTileFloats, kLine);
}

// The products of a step: activations of the one or two tiles of rows, codes of the one or two blocks.
template <class A, int kTiles, int kBlocks>
TM_INLINE void multiply_step(const uint8_t* x0, const uint8_t* x1, const uint8_t* codes0, const uint8_t* codes1) {
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
}

}  // namespace
}  // namespace tokenmill::int4
