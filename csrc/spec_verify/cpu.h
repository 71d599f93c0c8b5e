// Greedy acceptance on the CPU; the contract is in kernels/spec_verify/op.py.
#pragma once

#include <cstdint>

// (row, n) -> index of the largest value; n >= 1.
using ArgmaxFunction = int64_t (*)(const void* row, int64_t n);

// The argmax of each logits format, for one instruction set.
struct ArgmaxTable {
    ArgmaxFunction f32;
    ArgmaxFunction f16;
    ArgmaxFunction bf16;
};

extern const ArgmaxTable tokenmill_argmax_plain;
extern const ArgmaxTable tokenmill_argmax_avx2;
extern const ArgmaxTable tokenmill_argmax_avx512;

struct GreedyProblem {
    const int32_t* draft_token_ids;      // [T]
    const int32_t* cu_num_draft_tokens;  // [B], inclusive sums
    const char* target_logits;           // [T, V]
    int64_t row_bytes;                   // from one row of logits to the next
    int64_t vocabulary;                  // V
    const int32_t* bonus_token_ids;      // [B]
    int32_t* output_token_ids;           // [B, max_spec_len + 1]
    int64_t max_spec_len;
};

// Requests begin..end of the batch; requests are independent, so threads take ranges of them.
void tokenmill_greedy_accept(const GreedyProblem& problem, ArgmaxFunction argmax, int64_t begin, int64_t end);
