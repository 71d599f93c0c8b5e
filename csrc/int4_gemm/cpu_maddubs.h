// The inner loops of W4A8 with AVX2: VPMADDUBSW multiplies unsigned codes by signed activations and adds pairs in
// int16. A pair is at most 2 * 15 * 127 = 3810, so eight of them are added before they have to be widened.
#pragma once

#include "cpu_ahead.h"
#include "cpu_int8.h"

namespace tokenmill::int4 {
namespace {

constexpr int kPanelUnit = 2 * kLine;  // bytes of one unit of one block, a byte a code
constexpr int kUnitsPerWidening = 4;   // two pairs a unit
constexpr int kLinesAhead = 16;        // how far ahead codes are asked for
// The same where a panel is filled: of the second level beyond this panel, since nothing is read while other rows meet it
// and the nearest cache would lose what came too soon.
constexpr int kLinesFar = 24, kLinesNear = 4;

// Codes as they are stored, a nibble each.
struct Nibbles {
  static constexpr int kUnitBytes = kLine;
  static constexpr bool kFills = false;

  // Four codes of each of eight columns, of the even or of the odd rows of a unit.
  template <int kOdd>
  TM_INLINE static __m256i four(const uint8_t* unit, int part) {
    const __m256i words = Vector::load(unit + part * 32);
    return _mm256_and_si256(kOdd ? _mm256_srli_epi32(words, 4) : words, _mm256_set1_epi8(0x0f));
  }
};

// The same, and fills a panel with them, a byte each: even rows of a unit, then odd rows.
struct Filling : Nibbles {
  static constexpr bool kFills = true;
};

// Codes of a panel.
struct Bytes {
  static constexpr int kUnitBytes = kPanelUnit;
  static constexpr bool kFills = false;

  template <int kOdd>
  TM_INLINE static __m256i four(const uint8_t* unit, int part) {
    return Vector::load(unit + kOdd * kLine + part * 32);
  }
};

// sum += codes * values, in int16. The addition is written out: GCC would make a tree of several, and spill what waits
// for its turn.
TM_INLINE void add_pairs(__m256i& sum, __m256i codes, __m256i values) {
  __m256i added = sum;  // a copy: `sum` itself, an element of an array, would have to be in memory
  asm("vpaddw %1, %0, %0" : "+x"(added) : "x"(_mm256_maddubs_epi16(codes, values)));
  sum = added;
}

// Adds the products of the even or the odd rows of one unit: NR registers of columns (two a block) and MB rows of
// activations. Whichever are fewer are kept in registers. The first products of a sum are the sum.
template <class Codes, int kOdd, bool kFirst, int MB, int NR>
TM_INLINE void add_half(__m256i (&narrow)[NR][MB], const uint8_t* codes, int64_t stride, const uint8_t* x,
                        uint8_t* panel) {
  const auto column = [&](int r) {
    const __m256i four = Codes::template four<kOdd>(codes + r / 2 * stride, r % 2);
    if constexpr (Codes::kFills) {
      static_assert(NR == 2);
      _mm256_store_si256(reinterpret_cast<__m256i*>(panel + kOdd * kLine) + r, four);
    }
    return four;
  };
  const auto row = [&](int m) { return _mm256_set1_epi32(four_bytes(x + m * kInt8UnitBytes + kOdd * 4)); };
  const auto add = [&](auto r, auto m, __m256i four, __m256i values) {
    if constexpr (kFirst) {
      narrow[r.value][m.value] = _mm256_maddubs_epi16(four, values);
    } else {
      add_pairs(narrow[r.value][m.value], four, values);
    }
  };
  if constexpr (MB < NR) {
    __m256i values[MB];
    unroll<0, MB>([&](auto m) { values[m.value] = row(m.value); });
    unroll<0, NR>([&](auto r) {
      const __m256i four = column(r.value);
      unroll<0, MB>([&](auto m) { add(r, m, four, values[m.value]); });
    });
  } else {
    __m256i fours[NR];
    unroll<0, NR>([&](auto r) { fours[r.value] = column(r.value); });
    unroll<0, MB>([&](auto m) {
      const __m256i values = row(m.value);
      unroll<0, NR>([&](auto r) { add(r, m, fours[r.value], values); });
    });
  }
}

// Codes and activations of a group, or of a part of one.
struct Chunk {
  const uint8_t* codes;
  int64_t stride;  // bytes from block to block
  int32_t units;
  const uint8_t* x;
  uint8_t* panel = nullptr;  // of one block, for `Filling`
};

// Sums in int32, [MB][NR][8 columns], in memory: what adds to them needs all the registers.
template <int MB, int NR>
struct Sums {
  __m256i* at;

  TM_INLINE __m256i& of(int r, int m) const { return at[m * NR + r]; }
};

// Adds kUnits units, or sets the sums to theirs. A unit of activations has kRows rows.
template <class Codes, int kUnits, int kRows, int MB, int NR>
TM_INLINE void add_units(Sums<MB, NR> sums, const Chunk& c, bool first) {
  static_assert(kUnits <= kUnitsPerWidening);
  __m256i narrow[NR][MB];
  unroll<0, kUnits>([&](auto u) {
    const uint8_t* codes = c.codes + u.value * Codes::kUnitBytes;
    const uint8_t* x = c.x + u.value * kRows * kInt8UnitBytes;
    // One row is multiplied as fast as memory can be read: the processor's own prefetching does no worse there.
    if constexpr (Codes::kFills) {
      ask_second_level_for(codes + kLinesFar * kLine);
      ask_for(codes + kLinesNear * kLine);
    } else if constexpr (Codes::kUnitBytes == kLine && MB > 1) {
      for (int b = 0; b < NR / 2; ++b) ask_for(codes + b * c.stride + kLinesAhead * kLine);
    }
    uint8_t* panel = nullptr;
    if constexpr (Codes::kFills) panel = c.panel + u.value * kPanelUnit;
    add_half<Codes, 0, u.value == 0>(narrow, codes, c.stride, x, panel);
    add_half<Codes, 1, false>(narrow, codes, c.stride, x, panel);
  });
  unroll<0, NR>([&](auto r) {
    unroll<0, MB>([&](auto m) {
      narrow[r.value][m.value] = _mm256_madd_epi16(narrow[r.value][m.value], _mm256_set1_epi16(1));
    });
  });
  if (!first) {
    unroll<0, NR>([&](auto r) {
      unroll<0, MB>([&](auto m) {
        narrow[r.value][m.value] = _mm256_add_epi32(narrow[r.value][m.value], sums.of(r.value, m.value));
      });
    });
  }
  unroll<0, NR>([&](auto r) {
    unroll<0, MB>([&](auto m) { _mm256_store_si256(&sums.of(r.value, m.value), narrow[r.value][m.value]); });
  });
}

// What makes numbers of the sums of a group, and where they are added: rows `columns` floats apart.
struct Group {
  const float *scales, *zeros;         // of the columns
  const float *row_scales, *row_sums;  // of the activations
  float* totals;
  int columns;
};

// Multiplies a chunk of MB rows by NB blocks. `dots`, int32 [MB][NB][16], holds what the chunks before it came to,
// unless it is the first of its group. With the last of a group the totals are made.
template <class Codes, int kRows, int MB, int NB>
TM_INLINE void multiply_chunk(Chunk c, const Group& group, int32_t* dots, bool first, bool last) {
  constexpr int NR = NB * 2;
  const Sums<MB, NR> sums{reinterpret_cast<__m256i*>(dots)};
  for (; c.units >= kUnitsPerWidening; c.units -= kUnitsPerWidening, first = false) {
    add_units<Codes, kUnitsPerWidening, kRows>(sums, c, first);
    c.codes += kUnitsPerWidening * Codes::kUnitBytes;
    if constexpr (Codes::kFills) c.panel += kUnitsPerWidening * kPanelUnit;
    c.x += kUnitsPerWidening * kRows * kInt8UnitBytes;
  }
  for (; c.units > 0; --c.units, first = false) {
    add_units<Codes, 1, kRows>(sums, c, first);
    c.codes += Codes::kUnitBytes;
    if constexpr (Codes::kFills) c.panel += kPanelUnit;
    c.x += kRows * kInt8UnitBytes;
  }
  if (!last) return;
  unroll<0, NR>([&](auto r) {
    const Vector::Float zero = Vector::load(group.zeros + r.value * kLanes);
    const Vector::Float scale = Vector::load(group.scales + r.value * kLanes);
    unroll<0, MB>([&](auto m) {
      float* total = group.totals + m.value * group.columns + r.value * kLanes;
      const Vector::Float value = Vector::subtract_product(zero, Vector::all(group.row_sums[m.value]),
                                                           Vector::to_float(sums.of(r.value, m.value)));
      const Vector::Float both = Vector::multiply(scale, Vector::all(group.row_scales[m.value]));
      Vector::store(total, Vector::multiply_add(value, both, Vector::load(total)));
    });
  });
}

}  // namespace
}  // namespace tokenmill::int4
