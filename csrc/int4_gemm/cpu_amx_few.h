// AMX for at most two tiles of rows, where decoding takes longer than multiplying and reading the codes longer still.
//
// Two blocks go side by side. Their codes are decoded into a ring a few steps before their products: by then they have
// reached the cache that tiles are loaded from, and decoding, which is the vector units' work, overlaps the products,
// which are the tile unit's. The sums of a group are scaled while the next group is multiplied.
#pragma once

#include "cpu_amx_tiles.h"

namespace tokenmill::int4 {
namespace {

template <class A, int kTiles>
class FewRows {
  static constexpr int kXTiles = kTiles * A::kParts;  // tiles of activations, each with sums of its own
  static_assert(kXTiles <= kFewTiles);

 public:
  FewRows(const Problem& p, const Rows& rows) : p_(p), w_(p.weight), rows_(rows) {}

  void run(int64_t first, int64_t last) {
    const TileShapes shapes(rows_.rows);
    for (; first + 1 < last; first += 2) columns<2>(first);
    if (first < last) columns<1>(first);
  }

 private:
  static constexpr int kRing = 4;         // steps
  static constexpr int kDecodeAhead = 2;  // steps
  static constexpr int kLinesAhead = 48;  // how far ahead of decoding codes are asked for

  // A step: units of one group. Groups without rows have none.
  struct Step {
    const Weight& w;
    int64_t group = -1;
    int32_t unit = 0, end = 0;

    explicit Step(const Weight& weight) : w(weight) { next(); }
    bool exists() const { return group < w.groups; }
    bool closes() const { return end - unit <= A::kStepUnits; }  // its group
    void next() {
      unit += A::kStepUnits;
      while (unit >= end) {
        if (++group == w.groups) return;
        unit = w.group_units[group];
        end = w.group_units[group + 1];
      }
    }
  };

  // All of K for kBlocks blocks.
  template <int kBlocks>
  void columns(int64_t block) {
    const uint8_t* lines = w_.lines + block * w_.units * kLine;
    const LinesAhead<kBlocks, kLinesAhead> ahead(w_);
    Step decoded(w_), step(w_);
    int to = 0, from = 0;
    const auto decode = [&] {
      if (!decoded.exists()) return;
      unroll<0, kBlocks>([&](auto b) {
        const uint8_t* at = lines + (b.value * w_.units + decoded.unit) * kLine;
        const uint8_t* later = ahead.of(at, decoded.unit);
        for (int u = 0; u < A::kStepUnits; ++u) ask_for(later + u * kLine);
        A::decode(at, decoded.end - decoded.unit, ring_ + (to * 2 + b.value) * kTileBytes);
      });
      written();
      to = (to + 1) % kRing;
      decoded.next();
    };
    std::memset(results_, 0, sizeof results_);
    for (int i = 0; i < kDecodeAhead; ++i) decode();
    const uint8_t* x = rows_.values;
    const int64_t tile_bytes = int64_t(rows_.rows) * kLine;
    int64_t finished = -1;  // group whose sums are still to be scaled
    while (step.exists()) {
      zero_sums<kXTiles, kBlocks>();
      const int64_t group = step.group;
      for (bool more = true; more; step.next()) {
        more = !step.closes();
        decode();
        const uint8_t* codes = ring_ + from * 2 * kTileBytes;
        multiply_step<A, kXTiles, kBlocks>(x, x + tile_bytes, codes, codes + kTileBytes);
        from = (from + 1) % kRing;
        x += kXTiles * tile_bytes;
        if (finished >= 0) add<kBlocks>(block, finished);
        finished = -1;
      }
      store_sums<kXTiles, kBlocks>(sums_);
      ask_for_scales<kBlocks>(w_, block + kBlocks, group);
      finished = group;
    }
    if (finished >= 0) add<kBlocks>(block, finished);
    for (int t = 0; t < kTiles; ++t) {
      store_tile(p_, rows_, t * rows_.rows, block, kBlocks * kBlock, results_ + t * kTileRows * kBlocks * kBlock);
    }
  }

  // Scales the sums of a group and adds them to the results.
  template <int kBlocks>
  TM_INLINE void add(int64_t block, int64_t group) {
    unroll<0, kBlocks>([&](auto b) {
      const auto scales = A::scales_of(w_, ((block + b.value) * w_.groups + group) * kBlock);
      unroll<0, kTiles>([&](auto t) {
        const int64_t row = (t.value * w_.groups + group) * rows_.rows;
        const float* sums = sums_ + (2 * t.value + b.value) * kTileFloats;
        float* results = results_ + t.value * kTileRows * kBlocks * kBlock + b.value * kBlock;
        for (int r = 0; r < rows_.rows; ++r) {
          float* result = results + r * kBlocks * kBlock;
          _mm512_store_ps(result, A::scaled(scales, sums + r * kBlock, rows_.sums + row + r, rows_.scales + row + r,
                                            _mm512_load_ps(result)));
        }
      });
    });
  }

  const Problem& p_;
  const Weight& w_;
  const Rows& rows_;
  alignas(64) uint8_t ring_[kRing * 2 * kTileBytes];     // [steps][2 blocks][1024]
  alignas(64) float sums_[kXTiles * 2 * kTileFloats];    // [tiles of activations][2 blocks][16][16]: of the last group
  alignas(64) float results_[kTiles * 2 * kTileFloats];  // [tiles][16][columns]
};

}  // namespace
}  // namespace tokenmill::int4
