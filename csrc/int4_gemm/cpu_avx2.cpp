// W4A16 and W4A8 with AVX2 only.
#include "cpu_float.h"
#include "cpu_int8.h"

namespace tokenmill::int4 {
namespace {

// VPMADDUBSW multiplies unsigned codes by signed activations and adds pairs in int16: at most 2 * 15 * 127 = 3810, so
// eight of them fit before they have to be widened.
constexpr int kUnitsPerWidening = 4;

struct Int8 {
  static constexpr int kUnitBytes = kInt8UnitBytes;
  static constexpr int kMaxRows = 4;

  static constexpr int width(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

  template <int MB, int NB>
  static void tile(const Weight& w, const uint8_t* x, const float* sums, const float* scales, int64_t block,
                   float* out) {
    constexpr int NR = NB * 2;
    const __m256i nibbles = _mm256_set1_epi8(0x0f), ones = _mm256_set1_epi16(1);
    const int64_t stride = w.units * kLine;
    const uint8_t* lines = w.lines + block * stride;
    std::memset(out, 0, sizeof(float) * MB * NB * kBlock);
    for (int64_t g = 0; g < w.groups; ++g) {
      __m256i wide[NR][MB];
      unroll<0, NR>([&](auto r) { unroll<0, MB>([&](auto m) { wide[r.value][m.value] = _mm256_setzero_si256(); }); });
      for (int32_t u = w.group_units[g]; u < w.group_units[g + 1];) {
        const int32_t limit = u + kUnitsPerWidening;
        const int32_t end = limit < w.group_units[g + 1] ? limit : w.group_units[g + 1];
        __m256i narrow[NR][MB];
        unroll<0, NR>(
            [&](auto r) { unroll<0, MB>([&](auto m) { narrow[r.value][m.value] = _mm256_setzero_si256(); }); });
        for (; u < end; ++u) {
          unroll<0, NR>([&](auto r) {
            const __m256i q = Vector::load(lines + r.value / 2 * stride + r.value % 2 * 32);
            const __m256i even = _mm256_and_si256(q, nibbles);
            const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(q, 4), nibbles);
            unroll<0, MB>([&](auto m) {
              const uint8_t* row = x + m.value * kUnitBytes;
              __m256i& sum = narrow[r.value][m.value];
              sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(even, _mm256_set1_epi32(four_bytes(row))));
              sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(odd, _mm256_set1_epi32(four_bytes(row + 4))));
            });
          });
          lines += kLine;
          x += MB * kUnitBytes;
        }
        unroll<0, NR>([&](auto r) {
          unroll<0, MB>([&](auto m) {
            __m256i& sum = wide[r.value][m.value];
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(narrow[r.value][m.value], ones));
          });
        });
      }
      unroll<0, NR>([&](auto r) {
        unroll<0, MB>([&](auto m) {
          add_int8_group(w, g, block, r.value, wide[r.value][m.value], sums[g * MB + m.value],
                         scales[g * MB + m.value], out + m.value * NB * kBlock + r.value * kLanes);
        });
      });
    }
  }

  static void pack_row(const float* row, const Weight& w, int, uint8_t* out, int64_t stride, float* sums,
                       float* scales, int sum_stride) {
    pack_int8_row(row, w, out, stride, sums, scales, sum_stride);
  }
};

}  // namespace

const Kernel kAvx2Float = {"avx2", Float32::kUnitBytes, no_split, tile_rows<Float32>, pack<Float32>, multiply<Float32>};
const Kernel kAvx2Int8 = {"avx2", Int8::kUnitBytes, no_split, tile_rows<Int8>, pack<Int8>, multiply<Int8>};

}  // namespace tokenmill::int4
