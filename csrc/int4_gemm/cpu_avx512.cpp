// INT4 weights times float32 activations with AVX-512.
// GCC 12 warns about its own _mm512_undefined_*():
// build: flags=-Wno-uninitialized -Wno-maybe-uninitialized
#include "cpu_float.h"

namespace tokenmill::int4 {

const Kernel kAvx512Float = {"avx512", kStrip, unit_row_bytes<Float32>, no_split, floating_tile_rows<Float32>,
                             pack<Float32>, multiply_floating<Float32>};

}  // namespace tokenmill::int4
