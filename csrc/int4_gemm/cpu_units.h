// Products of one unit, eight rows of K, of a few blocks with a few rows; compiled once per instruction set.
//
// Beside what cpu_tiles.h asks of it, an arithmetic has
//   using Code, Sum;                                    // registers: of codes, of sums
//   static constexpr int kSteps;                        // registers of codes in a unit of one part of a block
//   template <int kStep> static Code decode(const uint8_t* unit, int part);
//   static Row row(const uint8_t* x, int step);         // of activations, for all columns
//   static Sum multiply_add(Code, Row, Sum);
#pragma once

#include "cpu_ahead.h"
#include "cpu_tiles.h"
#include "cpu_vector.h"

namespace tokenmill::int4 {
namespace {

// How far ahead codes are asked for, in lines. AVX-512 reads up to four blocks side by side: a nearest cache that has few
// requests under way (24 on a Zen 4) stands still when all of them are asked of it, so the second level is asked far
// ahead, and the nearest shortly before. Blocks stand a multiple of 4096 bytes apart more often than not, so that lines
// side by side share a set of the first-level cache: a tile reads four blocks at most.
constexpr bool kTwoLevels = Vector::kParts == 1;
constexpr int kCodesAhead = kTwoLevels ? 32 : 16;
constexpr int kCodesNear = 4;

// Asks for codes of NB blocks, `stride` bytes apart: `lines` is read now, `later` is kCodesAhead further on.
template <int NB>
TM_INLINE void ask_for_codes(const uint8_t* lines, const uint8_t* later, int64_t stride) {
  for (int b = 0; b < NB; ++b) {
    if constexpr (kTwoLevels) {
      ask_second_level_for(later + b * stride);
      ask_for(lines + kCodesNear * kLine + b * stride);
    } else {
      ask_for(later + b * stride);
    }
  }
}

// Codes as they are stored.
template <class A>
struct Stored {
  static constexpr int kUnitBytes = kLine;

  template <int kStep>
  TM_INLINE static typename A::Code at(const uint8_t* unit, int part) {
    return A::template decode<kStep>(unit, part);
  }
};

// Adds one unit of NB blocks, `stride` bytes apart, for MB rows.
template <class A, class Codes, int MB, int NB>
TM_INLINE void add_unit(typename A::Sum (*sums)[MB], const uint8_t* codes, int64_t stride, const uint8_t* x) {
  constexpr int kParts = Vector::kParts;
  const auto at = [&](auto i, int r) TM_INLINED {
    return Codes::template at<i.value>(codes + r / kParts * stride, r % kParts);
  };
  unroll<0, A::kSteps>([&](auto i) TM_INLINED {
    if constexpr (MB > NB) {  // whichever are fewer are kept in registers
      typename A::Code code[NB * kParts];
      unroll<0, NB * kParts>([&](auto r) TM_INLINED { code[r.value] = at(i, r.value); });
      unroll<0, MB>([&](auto m) TM_INLINED {
        const auto row = A::row(x + m.value * A::kUnitBytes, i.value);
        unroll<0, NB * kParts>([&](auto r) TM_INLINED {
          sums[r.value][m.value] = A::multiply_add(code[r.value], row, sums[r.value][m.value]);
        });
      });
    } else {
      unroll<0, NB * kParts>([&](auto r) TM_INLINED {
        const auto code = at(i, r.value);
        unroll<0, MB>([&](auto m) TM_INLINED {
          const auto row = A::row(x + m.value * A::kUnitBytes, i.value);
          sums[r.value][m.value] = A::multiply_add(code, row, sums[r.value][m.value]);
        });
      });
    }
  });
}

template <class A, int MB, int NB>
TM_INLINE void zero(typename A::Sum (&sums)[NB * Vector::kParts][MB]) {
  unroll<0, NB * Vector::kParts>([&](auto r) TM_INLINED {
    unroll<0, MB>([&](auto m) TM_INLINED { sums[r.value][m.value] = typename A::Sum{}; });
  });
}

}  // namespace
}  // namespace tokenmill::int4
