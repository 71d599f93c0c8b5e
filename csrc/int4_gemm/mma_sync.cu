// build: arch=80,90a,100a,120a
// The instances of the portable INT4 GEMM and its launcher. Code for sm_80 runs on sm_86 and sm_89 too.
#include "mma_sync.cuh"

extern "C" int tokenmill_int4_gemm_mma_sync(const Int4GemmArguments* arguments, void* stream) {
    const Int4GemmArguments& a = *arguments;
    if (const int refusal = check_arguments(a)) return refusal;
    if (a.M == 0) return 0;
    return with_weight_form(a, [&](auto form) -> int {
        using Form = decltype(form);
        switch (a.token_tile) {  // stages: enough bytes in flight with two or three CTAs on a multiprocessor
            case 16: return launch_mma_sync<Form, 16, 8>(a, (Stream)stream);
#ifndef INT4_GEMM_NARROW
            case 8: return launch_mma_sync<Form, 8, 8>(a, (Stream)stream);
            case 32: return launch_mma_sync<Form, 32, 6>(a, (Stream)stream);
            case 64: return launch_mma_sync<Form, 64, 5>(a, (Stream)stream);
#endif
            default: return INT4_GEMM_BAD_TILE;
        }
    });
}
