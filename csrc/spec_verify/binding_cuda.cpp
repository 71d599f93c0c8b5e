// spec_verify for torch on CUDA devices.

#include "binding_cuda.h"

#include <torch/csrc/stable/library.h>

#include "spec_verify/binding.h"

namespace {

using torch::stable::Tensor;

void greedy_cuda(Tensor out, const Tensor& draft_token_ids, const Tensor& cu_num_draft_tokens,
                 const Tensor& target_logits, const Tensor& bonus_token_ids) {
    const GreedyProblem problem =
        greedy_problem(out, draft_token_ids, cu_num_draft_tokens, target_logits, bonus_token_ids);
    const tokenmill::DeviceScope device(out);
    tokenmill::check_launch(tokenmill_spec_verify_greedy(&problem, device.stream()), "spec_verify_greedy");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tokenmill_native, m) {
    m.def("spec_verify_greedy_cuda(Tensor(a!) out, Tensor draft_token_ids, Tensor cu_num_draft_tokens, "
          "Tensor target_logits, Tensor bonus_token_ids) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tokenmill_native, CUDA, m) { m.impl("spec_verify_greedy_cuda", TORCH_BOX(&greedy_cuda)); }
