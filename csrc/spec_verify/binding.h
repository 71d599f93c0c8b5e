// From torch tensors to a GreedyProblem, for both bindings.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "spec_verify/greedy.h"

namespace {

inline int32_t logits_type(torch::headeronly::ScalarType dtype) {
    switch (dtype) {
        case torch::headeronly::ScalarType::Float:
            return LOGITS_FLOAT32;
        case torch::headeronly::ScalarType::Half:
            return LOGITS_FLOAT16;
        case torch::headeronly::ScalarType::BFloat16:
            return LOGITS_BFLOAT16;
        default:
            STD_TORCH_CHECK(false, "spec_verify takes float32, float16 or bfloat16 logits");
    }
}

inline GreedyProblem greedy_problem(const torch::stable::Tensor& out, const torch::stable::Tensor& draft_token_ids,
                                    const torch::stable::Tensor& cu_num_draft_tokens,
                                    const torch::stable::Tensor& target_logits,
                                    const torch::stable::Tensor& bonus_token_ids) {
    GreedyProblem problem{};
    problem.draft_token_ids = static_cast<const int32_t*>(draft_token_ids.const_data_ptr());
    problem.cu_num_draft_tokens = static_cast<const int32_t*>(cu_num_draft_tokens.const_data_ptr());
    problem.target_logits = static_cast<const char*>(target_logits.const_data_ptr());
    problem.bonus_token_ids = static_cast<const int32_t*>(bonus_token_ids.const_data_ptr());
    problem.output_token_ids = static_cast<int32_t*>(out.mutable_data_ptr());
    problem.row_bytes = target_logits.stride(0) * static_cast<int64_t>(target_logits.element_size());
    problem.drafts = target_logits.size(0);
    problem.requests = out.size(0);
    problem.vocabulary = target_logits.size(1);
    problem.max_spec_len = out.size(1) - 1;
    problem.type = logits_type(target_logits.scalar_type());
    return problem;
}

}  // namespace
