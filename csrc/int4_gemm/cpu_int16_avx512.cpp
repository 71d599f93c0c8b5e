// W4A16 with AVX-512 where VNNI and BF16 are missing, of float16 and bfloat16.
// GCC 12 warns about its own _mm512_undefined_*(), and with -ftree-pre has no registers for the sums:
// build: flags=-Wno-uninitialized -Wno-maybe-uninitialized -fno-tree-pre
#include <immintrin.h>

namespace {
[[gnu::always_inline]] inline __m512i dot2(__m512i sum, __m512i codes, __m512i activations) {
  const __m512i product = _mm512_madd_epi16(codes, activations);
  // Not _mm512_add_epi32: GCC would add up products of several steps first, and has no registers for them.
  asm("vpaddd %1, %0, %0" : "+v"(sum) : "v"(product));
  return sum;
}
}  // namespace

#include "cpu_dot2.h"

namespace tokenmill::int4 {

const Kernel kAvx512Int16 = {"avx512", kStrip, unit_row_bytes<Dot2>, no_split, tile_rows<Dot2>, pack<Dot2>,
                             multiply<Dot2>};

}  // namespace tokenmill::int4
