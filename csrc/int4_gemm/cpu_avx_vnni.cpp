// W4A8, and W4A16 of float16 and bfloat16, with AVX-VNNI: client processors that have VPDPBUSD but no AVX-512.
// With -ftree-pre GCC 12 has no registers for the sums:
// build: flags=-fno-tree-pre
#include <immintrin.h>

namespace {
[[gnu::always_inline]] inline __m256i dot4(__m256i sum, __m256i codes, __m256i activations) {
  return _mm256_dpbusd_avx_epi32(sum, codes, activations);
}
[[gnu::always_inline]] inline __m256i dot2(__m256i sum, __m256i codes, __m256i activations) {
  return _mm256_dpwssd_avx_epi32(sum, codes, activations);
}
}  // namespace

#include "cpu_dot2.h"
#include "cpu_dot4.h"

namespace tokenmill::int4 {

const Kernel kAvxVnniInt16 = {"avx_vnni", kStrip, unit_row_bytes<Dot2>, no_split, tile_rows<Dot2>, pack<Dot2>,
                              multiply<Dot2>};
const Kernel kAvxVnniInt8 = {"avx_vnni", kStrip, unit_row_bytes<Dot4>, no_split, tile_rows<Dot4>, pack<Dot4>,
                             multiply<Dot4>};

}  // namespace tokenmill::int4
