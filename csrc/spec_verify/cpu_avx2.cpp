// The argmax for processors with AVX2; the build compiles this file for them.

#include "spec_verify/argmax.h"
#include "spec_verify/cpu.h"

const ArgmaxTable tokenmill_argmax_avx2 = {{argmax_f32, argmax_f16, argmax_bf16}};
