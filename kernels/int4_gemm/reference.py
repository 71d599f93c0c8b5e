"""INT4 GEMM in the plainest torch: the specification of every implementation."""

import torch

from tokenmill.kernels.int4_gemm.weight import Int4Weight, dequantize


def int4_gemm(x: torch.Tensor, weight: Int4Weight, out: torch.Tensor) -> torch.Tensor:
    """See `tokenmill.kernels.int4_gemm.op.int4_gemm`: exact weights, float64 sums, one rounding; writes `out`."""
    y = x.double() @ dequantize(weight, torch.float64)
    if weight.bias is not None:
        y = y + weight.bias.double()
    return out.copy_(y)
