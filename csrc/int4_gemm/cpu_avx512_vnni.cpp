// W4A8, and W4A16 of float16 and bfloat16, with AVX512_VNNI.
// GCC 12 warns about its own _mm512_undefined_*(), and with -ftree-pre has no registers for the sums:
// build: flags=-Wno-uninitialized -Wno-maybe-uninitialized -fno-tree-pre
#include <immintrin.h>

namespace {
[[gnu::always_inline]] inline __m512i dot4(__m512i sum, __m512i codes, __m512i activations) {
  return _mm512_dpbusd_epi32(sum, codes, activations);
}
[[gnu::always_inline]] inline __m512i dot2(__m512i sum, __m512i codes, __m512i activations) {
  return _mm512_dpwssd_epi32(sum, codes, activations);
}
}  // namespace

#include "cpu_dot2.h"
#include "cpu_dot4.h"

namespace tokenmill::int4 {

const Kernel kAvx512VnniInt16 = {"avx512_vnni", kStrip, unit_row_bytes<Dot2>, no_split, tile_rows<Dot2>, pack<Dot2>,
                                 multiply<Dot2>};
const Kernel kAvx512VnniInt8 = {"avx512_vnni", kStrip, unit_row_bytes<Dot4>, no_split, tile_rows<Dot4>, pack<Dot4>,
                                multiply<Dot4>};

}  // namespace tokenmill::int4
