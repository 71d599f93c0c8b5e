// W4A8 with AVX-VNNI: client processors that have VPDPBUSD but no AVX-512.
// With -ftree-pre GCC 12 has no registers for the sums:
// build: flags=-fno-tree-pre
#include <immintrin.h>

namespace {
[[gnu::always_inline]] inline __m256i dot4(__m256i sum, __m256i codes, __m256i activations) {
  return _mm256_dpbusd_avx_epi32(sum, codes, activations);
}
}  // namespace

#include "cpu_dot4.h"

namespace tokenmill::int4 {

const Kernel kAvxVnniInt8 = {"avx_vnni", kStrip, unit_row_bytes<Dot4>, no_split, tile_rows<Dot4>, pack<Dot4>,
                             multiply<Dot4>};

}  // namespace tokenmill::int4
