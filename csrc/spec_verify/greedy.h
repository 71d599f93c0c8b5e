// Greedy acceptance: the problem as the CPU and the CUDA code take it. The contract is in
// kernels/spec_verify/op.py, which has checked shapes and dtypes; on the CPU it has checked the sums too.
#pragma once

#include <stdint.h>

enum LogitsType { LOGITS_FLOAT32 = 0, LOGITS_FLOAT16 = 1, LOGITS_BFLOAT16 = 2 };

typedef struct GreedyProblem {
    const int32_t* draft_token_ids;      // [T]
    const int32_t* cu_num_draft_tokens;  // [B], inclusive sums
    const char* target_logits;           // [T, V] of type
    const int32_t* bonus_token_ids;      // [B]
    int32_t* output_token_ids;           // [B, max_spec_len + 1]
    int64_t row_bytes;                   // from one row of logits to the next
    int64_t drafts;                      // T
    int64_t requests;                    // B
    int64_t vocabulary;                  // V, at least 1
    int64_t max_spec_len;
    int32_t type;  // LogitsType
} GreedyProblem;

#ifdef __cplusplus
extern "C" {
#endif
// `stream` is a cudaStream_t. Returns 0 or a negative CUDA error.
int tokenmill_spec_verify_greedy(const GreedyProblem* problem, void* stream);
#ifdef __cplusplus
}
#endif
