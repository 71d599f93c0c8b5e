"""What an implementation of INT4 GEMM provides: `prepare` packs a weight once and returns what multiplies by it."""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from tokenmill.kernels.int4_gemm.weight import Int4Weight

#: (x [M, K], out [M, N], bias [N] or None) writes out = x @ W + bias. The bias is contiguous and of x's dtype.
Multiply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], None]


class Prepare(Protocol):
    """(canonical weight, dtype of x, bits of the activations: 16 or 8) -> `Multiply`."""

    def __call__(self, weight: Int4Weight, dtype: torch.dtype, activation_bits: int) -> Multiply: ...


def from_canonical(prepare: Prepare) -> Callable[..., torch.Tensor]:
    """The registry's `run` for an implementation: prepares and multiplies once, for tests and single calls."""

    def run(x: torch.Tensor, out: torch.Tensor, activation_bits: int, **canonical: Any) -> torch.Tensor:
        weight = as_weight(x, **canonical)
        bias = None if weight.bias is None else weight.bias.to(x.dtype).contiguous()
        prepare(weight, x.dtype, activation_bits)(x, out, bias)
        return out

    return run


def as_weight(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    g_idx: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
) -> Int4Weight:
    """The canonical weight from an op call's arguments."""
    return Int4Weight(codes, scales, group_size, x.shape[1], zeros, g_idx, bias)
