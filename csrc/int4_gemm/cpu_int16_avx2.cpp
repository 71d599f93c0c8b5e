// W4A16 with AVX2 only, of float16 and bfloat16.
// With -ftree-pre GCC 12 has no registers for the sums:
// build: flags=-fno-tree-pre
#include <immintrin.h>

namespace {
[[gnu::always_inline]] inline __m256i dot2(__m256i sum, __m256i codes, __m256i activations) {
  const __m256i product = _mm256_madd_epi16(codes, activations);
  // Not _mm256_add_epi32: GCC would add up products of several steps first, and has no registers for them.
  asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(product));
  return sum;
}
}  // namespace

#include "cpu_dot2.h"

namespace tokenmill::int4 {

const Kernel kAvx2Int16 = {"avx2", kStrip, unit_row_bytes<Dot2>, no_split, tile_rows<Dot2>, pack<Dot2>,
                           multiply<Dot2>};

}  // namespace tokenmill::int4
