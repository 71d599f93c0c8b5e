"""GPTQ (Frantar et al., 2022): round row by row, and let the rows that are still free make up for each error.

With inputs X [T, K] the layer's error is ``tr(D' H D)`` for ``D = W - Q [K, N]`` and ``H = X'X / T``. Rows are
rounded in an order; after row i the rows behind it move by ``-U[i, j] / U[i, i] * error``, where ``U'U`` is the
inverse of the damped H. Rows are called columns in the paper, which holds the weight transposed.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from tokenmill.errors import InputError
from tokenmill.kernels.int4_gemm.weight import Int4Weight, dequantize, pack_codes
from tokenmill.quant.rtn import find_parameters, nearest_codes, split_groups

#: In which order rows are rounded.
#: none: as they come. static: by falling diagonal of H, with the scales of the original groups.
#: group-aware: groups by falling diagonal, and rows within each; a group's scale is chosen when its turn comes.
#: dynamic: by falling diagonal, and groups are made of rows that follow each other in that order (GPTQ's desc_act).
#: All but dynamic leave ``k // group_size`` as the group of row k.
ActOrder = Literal["none", "static", "group-aware", "dynamic"]
ACT_ORDERS: tuple[str, ...] = get_args(ActOrder)


@dataclass(frozen=True)
class GptqOptions:
    """How GPTQ works.

    Attributes:
        act_order: See `ActOrder`.
        damping: Added to the diagonal of H, as a fraction of its mean: 0..1.
        block: Rows whose effect on the rest is applied at once; changes the speed, not the result.

    Raises:
        InputError: The damping is outside its range.
    """

    act_order: ActOrder = "group-aware"
    damping: float = 0.01
    block: int = 128

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= 1:  # false for nan, too
            raise InputError(f"damping={self.damping} is not in 0..1; 0.01 is usual, more where calibration is short")


def relative_error(weight: torch.Tensor, quantized: Int4Weight, hessian: torch.Tensor) -> float:
    """``tr(D'HD) / tr(W'HW)``: the mean square error of the layer's output over its mean square.

    Args:
        weight: [K, N] what the layer should compute with.
        quantized: What it will compute with.
        hessian: [K, K] mean of x x' over its inputs.
    """
    weight = weight.float()
    difference = weight - dequantize(quantized, torch.float32)
    error = (difference * (hessian @ difference)).sum(dtype=torch.float64)
    power = (weight * (hessian @ weight)).sum(dtype=torch.float64)
    return float(error / power.clamp(min=torch.finfo(torch.float64).tiny))


def _order(diagonal: torch.Tensor, group_size: int, act_order: ActOrder) -> torch.Tensor:
    """[K] int64: the row that is rounded first, second, ..."""
    if act_order == "none":
        return torch.arange(diagonal.numel(), device=diagonal.device)
    if act_order in ("static", "dynamic"):
        return torch.argsort(diagonal, descending=True, stable=True)
    rows = diagonal.view(-1, group_size)
    within = torch.argsort(rows, dim=1, descending=True, stable=True)
    groups = torch.argsort(rows.sum(1), descending=True, stable=True)
    return (within[groups] + group_size * groups.unsqueeze(1)).flatten()


def _inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper triangular U with U'U = inverse of the damped H; damps ten times more until H is positive definite."""
    mean = hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    while damping <= 100:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped  # K = 28672 makes each of these 3.3 GB
        if not bool(failed):
            inverse = torch.cholesky_inverse(lower)
            del lower
            upper: torch.Tensor
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not bool(failed):
                return upper
        damping = max(damping * 10, 1e-4)
    raise InputError("the Hessian is not positive definite however much it is damped; the calibration has inf or nan")


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    group_size: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    options: GptqOptions,
) -> Int4Weight:
    """Quantizes one layer.

    Args:
        weight: [K, N] floating point.
        hessian: [K, K] float32, mean of x x' over the layer's inputs.
        group_size: Rows that share a scale; must divide K.
        symmetric: Whether the zero point is 8 everywhere.
        scale_dtype: float16, bfloat16 or float32.
        options: Order, damping, block.

    Returns:
        The quantized weight; with a g_idx if the order is dynamic and there is more than one group.

    Raises:
        InputError: The group size does not divide K, or the Hessian has inf or nan.
    """
    original = split_groups(weight.float().contiguous(), group_size)  # [G, g, N]
    K, N = weight.shape
    G = K // group_size
    hessian = hessian.float().clone()
    diagonal = hessian.diagonal()  # a view: what is written here changes the Hessian
    # An input that was always zero says nothing about its row: give it the mean, which rounds it to nearest.
    diagonal[diagonal == 0] = diagonal.mean()
    order = _order(diagonal, group_size, options.act_order)
    scales = torch.empty(G, N, device=weight.device)
    zeros = torch.empty(G, N, device=weight.device)
    is_static = options.act_order == "static"
    if is_static:
        scales, zeros = find_parameters(original, symmetric, scale_dtype, diagonal.view(G, group_size))
        group_of = order // group_size
    else:
        group_of = order[::group_size].repeat_interleave(group_size) // group_size
        if options.act_order == "dynamic":
            group_of = torch.arange(K, device=weight.device) // group_size
    groups: list[int] = group_of.tolist()

    rest = original.view(K, N)[order]  # consumed: row i holds what is still to be rounded
    U = _inverse_factor(hessian[order.unsqueeze(1), order], options.damping)
    step: list[float] = U.diagonal().tolist()
    codes = torch.empty(K, N, dtype=torch.uint8, device=weight.device)
    divides = options.block % group_size == 0 or group_size % options.block == 0
    block = options.block if divides or is_static else group_size
    for start in range(0, K, block):
        end = min(start + block, K)
        errors = torch.empty(end - start, N, device=weight.device)
        for i in range(start, end):
            g = groups[i]
            if not is_static and i % group_size == 0:
                # An error of row i costs its square over U[i, i]^2.
                members = slice(i, i + group_size)
                importance = U.diagonal()[members].pow(-2).unsqueeze(0)
                found = find_parameters(rest[members].unsqueeze(0), symmetric, scale_dtype, importance)
                scales[g], zeros[g] = found[0][0], found[1][0]
            code = nearest_codes(rest[i], scales[g], zeros[g])
            codes[i] = code.to(torch.uint8)
            error = (rest[i] - (code - zeros[g]) * scales[g]) / step[i]
            errors[i - start] = error
            rest[i + 1 : end].addr_(U[i, i + 1 : end], error, alpha=-1)
        rest[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)

    natural = torch.empty_like(codes)
    natural[order] = codes
    g_idx = None
    if options.act_order == "dynamic" and G > 1:
        g_idx = torch.empty(K, dtype=torch.int32, device=weight.device)
        g_idx[order] = group_of.to(torch.int32)
    return Int4Weight(
        codes=pack_codes(natural),
        scales=scales.to(scale_dtype),
        group_size=group_size,
        K=K,
        zeros=None if symmetric else zeros.to(torch.uint8),
        g_idx=g_idx,
    )
