// Instruction-set levels of CPU kernels, in the order of ISA_LEVELS in tokenmill/env.py: Python chooses the level
// (tokenmill.platform asks the processor, TOKENMILL_ISA narrows) and passes its index to the native op.
#pragma once

enum Isa : int {
    ISA_PLAIN,
    ISA_AVX2,
    ISA_AVX_VNNI,
    ISA_AVX512,
    ISA_AVX512_VNNI,
    ISA_AVX512_BF16,
    ISA_AMX,
};
