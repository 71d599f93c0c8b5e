// spec_verify for torch, CPU side. Shapes and ranges were checked by kernels/spec_verify/op.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "isa.h"
#include "spec_verify/cpu.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const ArgmaxTable& argmax_table(int64_t isa) {
    switch (isa) {
        case ISA_PLAIN:
            return tokenmill_argmax_plain;
#ifdef __x86_64__
        case ISA_AVX2:
            return tokenmill_argmax_avx2;
        case ISA_AVX512:
            return tokenmill_argmax_avx512;
#endif
        default:
            STD_TORCH_CHECK(false, "spec_verify has no kernel for instruction set ", isa);
    }
}

ArgmaxFunction argmax_for(ScalarType dtype, int64_t isa) {
    const ArgmaxTable& table = argmax_table(isa);
    switch (dtype) {
        case ScalarType::Float:
            return table.f32;
        case ScalarType::Half:
            return table.f16;
        case ScalarType::BFloat16:
            return table.bf16;
        default:
            STD_TORCH_CHECK(false, "spec_verify takes float32, float16 or bfloat16 logits");
    }
}

void greedy_cpu(Tensor out, const Tensor& draft_token_ids, const Tensor& cu_num_draft_tokens,
                const Tensor& target_logits, const Tensor& bonus_token_ids, int64_t isa) {
    GreedyProblem problem{};
    problem.draft_token_ids = static_cast<const int32_t*>(draft_token_ids.const_data_ptr());
    problem.cu_num_draft_tokens = static_cast<const int32_t*>(cu_num_draft_tokens.const_data_ptr());
    problem.target_logits = static_cast<const char*>(target_logits.const_data_ptr());
    problem.row_bytes = target_logits.stride(0) * static_cast<int64_t>(target_logits.element_size());
    problem.vocabulary = target_logits.size(1);
    problem.bonus_token_ids = static_cast<const int32_t*>(bonus_token_ids.const_data_ptr());
    problem.output_token_ids = static_cast<int32_t*>(out.mutable_data_ptr());
    problem.max_spec_len = out.size(1) - 1;
    const ArgmaxFunction argmax = argmax_for(target_logits.scalar_type(), isa);
    torch::stable::parallel_for(0, out.size(0), 1, [&](int64_t begin, int64_t end) {
        tokenmill_greedy_accept(problem, argmax, begin, end);
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tokenmill_native, m) {
    m.def("spec_verify_greedy_cpu(Tensor(a!) out, Tensor draft_token_ids, Tensor cu_num_draft_tokens, "
          "Tensor target_logits, Tensor bonus_token_ids, int isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tokenmill_native, CPU, m) { m.impl("spec_verify_greedy_cpu", TORCH_BOX(&greedy_cpu)); }
