// The argmax for processors with AVX-512; the build compiles this file for them.

#include "spec_verify/argmax.h"
#include "spec_verify/cpu.h"

const ArgmaxTable tokenmill_argmax_avx512 = {{argmax_f32, argmax_f16, argmax_bf16}};
