// INT4 GEMM for torch on CUDA devices. Shapes, dtypes and the plan are those of kernels/int4_gemm/cuda_impl.py.

#include "binding_cuda.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>

#include "int4_gemm/arguments.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void int4_gemm_cuda(Tensor out, const Tensor& x, const Tensor& words, const Tensor& scales,
                    const std::optional<Tensor>& zeros, Tensor workspace, Tensor tickets, int64_t group_rows,
                    const std::string& kernel, int64_t token_tile, int64_t splits) {
    Int4GemmArguments a{};
    a.x = x.const_data_ptr();
    a.words = words.const_data_ptr();
    a.scales = scales.const_data_ptr();
    a.zeros = zeros ? zeros->const_data_ptr() : nullptr;
    a.y = out.mutable_data_ptr();
    if (splits > 1) {
        a.workspace = static_cast<float*>(workspace.mutable_data_ptr());
        a.tickets = static_cast<uint32_t*>(tickets.mutable_data_ptr());
    }
    a.x_stride = x.stride(0);
    a.y_stride = out.stride(0);
    a.M = int32_t(x.size(0));
    a.N = int32_t(out.size(1));
    a.K = int32_t(x.size(1));
    a.tiles = int32_t(words.size(1));
    a.group_rows = int32_t(group_rows);
    a.type = x.scalar_type() == ScalarType::BFloat16 ? INT4_GEMM_BFLOAT16 : INT4_GEMM_FLOAT16;
    a.token_tile = int32_t(token_tile);
    a.splits = int32_t(splits);
    const tokenmill::DeviceScope device(out);
    const auto launcher = kernel == "sm90" ? tokenmill_int4_gemm_sm90 : tokenmill_int4_gemm_mma_sync;
    tokenmill::check_launch(launcher(&a, device.stream()), "int4_gemm");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tokenmill_native, m) {
    m.def("int4_gemm_cuda(Tensor(a!) out, Tensor x, Tensor words, Tensor scales, Tensor? zeros, "
          "Tensor(b!) workspace, Tensor(c!) tickets, int group_rows, str kernel, int token_tile, int splits) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tokenmill_native, CUDA, m) { m.impl("int4_gemm_cuda", TORCH_BOX(&int4_gemm_cuda)); }
