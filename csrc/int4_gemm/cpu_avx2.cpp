// INT4 weights times float32 activations with AVX2.
#include "cpu_float.h"

namespace tokenmill::int4 {

const Kernel kAvx2Float = {"avx2", kStrip, unit_row_bytes<Float32>, no_split, floating_tile_rows<Float32>,
                           pack<Float32>, multiply_floating<Float32>};

}  // namespace tokenmill::int4
