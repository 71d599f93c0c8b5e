// The instances of the Hopper INT4 GEMM and its launcher.
#include "sm90.cuh"

extern "C" int tokenmill_int4_gemm_sm90(const Int4GemmArguments* arguments, void* stream) {
    const Int4GemmArguments& a = *arguments;
    if (const int refusal = check_arguments(a)) return refusal;
    if (a.M == 0) return 0;
    return with_weight_form(a, [&](auto form) -> int {
        using Form = decltype(form);
        switch (a.token_tile) {  // as many stages as 227 KB hold, at most 8
            case 64: return launch_sm90<Form, 64, 8>(a, (Stream)stream);
#ifndef INT4_GEMM_NARROW
            case 128: return launch_sm90<Form, 128, 8>(a, (Stream)stream);
            case 256: return launch_sm90<Form, 256, 5>(a, (Stream)stream);
#endif
            default: return INT4_GEMM_BAD_TILE;
        }
    });
}
