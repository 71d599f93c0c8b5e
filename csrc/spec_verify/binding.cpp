// spec_verify for torch on the CPU.

#include "spec_verify/binding.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "isa.h"
#include "spec_verify/cpu.h"

namespace {

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

void greedy_cpu(Tensor out, const Tensor& draft_token_ids, const Tensor& cu_num_draft_tokens,
                const Tensor& target_logits, const Tensor& bonus_token_ids, int64_t isa) {
    const GreedyProblem problem =
        greedy_problem(out, draft_token_ids, cu_num_draft_tokens, target_logits, bonus_token_ids);
    const ArgmaxFunction argmax = argmax_table(isa).of_type[problem.type];
    torch::stable::parallel_for(0, problem.requests, 1, [&](int64_t begin, int64_t end) {
        tokenmill_greedy_accept(problem, argmax, begin, end);
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tokenmill_native, m) {
    m.def("spec_verify_greedy_cpu(Tensor(a!) out, Tensor draft_token_ids, Tensor cu_num_draft_tokens, "
          "Tensor target_logits, Tensor bonus_token_ids, int isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tokenmill_native, CPU, m) { m.impl("spec_verify_greedy_cpu", TORCH_BOX(&greedy_cpu)); }
