"""Round to nearest: scales and zero points by search, then every weight to its nearest code.

Weights are [K, N] (in, out), as in `Int4Weight`. A scale is rounded to the dtype in which it will be stored *before*
the codes are chosen, so nothing is lost between quantizing and loading.
"""

import torch

from tokenmill.errors import InputError
from tokenmill.kernels.int4_gemm.weight import SYMMETRIC_ZERO, Int4Weight, pack_codes

MAX_CODE = 15
#: Fractions of the full range that are tried as the range of the codes. Clipping the outliers of a group a little
#: costs them less than it saves all others; beyond these limits no group of a normal distribution had its optimum.
RANGES = tuple(0.6 + 0.04 * step for step in range(14))


def nearest_codes(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """The codes, as floating point, whose values are closest to `weight`; all arguments broadcast."""
    return torch.clamp(torch.round(weight / scales) + zeros, 0, MAX_CODE)


def find_parameters(
    weight: torch.Tensor,
    symmetric: bool,
    scale_dtype: torch.dtype,
    importance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each group that minimise the weighted square error of rounding.

    A symmetric scale may come out negative: codes reach from -8 to 7, and the sign decides which end of the range
    gets the extra step. Every kernel multiplies by the scale, so its sign costs nothing.

    Args:
        weight: [G, g, N] float32, the g rows of each group.
        symmetric: Whether the zero point must be 8.
        scale_dtype: What the scales will be stored as.
        importance: [G, g] non-negative weight of each row's error; None weighs them equally.

    Returns:
        Scales and zero points, both [G, N] float32; the scales are representable in `scale_dtype`.
    """
    weighting = 1.0 if importance is None else importance.unsqueeze(-1)
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    if symmetric:
        full = torch.maximum(-low, high) / 8
        candidates = [sign * fraction * full for fraction in RANGES for sign in (1.0, -1.0)]
    else:
        candidates = [fraction * (high - low) / MAX_CODE for fraction in RANGES]
    best_error = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.ones_like(low), torch.full_like(low, float(SYMMETRIC_ZERO))
    for candidate in candidates:
        scale = _storable(candidate, scale_dtype)
        zero = torch.full_like(low, float(SYMMETRIC_ZERO))
        if not symmetric:
            # Centre the shrunken range in the full one.
            zero = torch.clamp(torch.round(7.5 - (low + high) / 2 / scale), 0, MAX_CODE)
        codes = nearest_codes(weight, scale.unsqueeze(1), zero.unsqueeze(1))
        error = (((codes - zero.unsqueeze(1)) * scale.unsqueeze(1) - weight).square() * weighting).sum(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _storable(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scale as the dtype can hold it; never zero, so that it can be divided by."""
    limits = torch.finfo(dtype)
    tiny = max(limits.tiny * limits.eps, torch.finfo(torch.float32).tiny)  # subnormals of float16 are welcome
    away_from_zero = torch.where(scale < 0, scale.clamp(max=-tiny), scale.clamp(min=tiny))
    return away_from_zero.to(dtype).float()


def split_groups(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """[K, N] as [G, group_size, N].

    Raises:
        InputError: The group size does not divide K.
    """
    K = weight.shape[0]
    if group_size < 1 or K % group_size:
        raise InputError(f"K={K} is not a multiple of group_size={group_size}; use a divisor of K, or -1 (per channel)")
    return weight.view(K // group_size, group_size, -1)


def round_to_nearest(
    weight: torch.Tensor,
    group_size: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    importance: torch.Tensor | None = None,
) -> Int4Weight:
    """Quantizes one layer without looking at how rows depend on each other.

    Args:
        weight: [K, N] floating point.
        group_size: Rows that share a scale; must divide K.
        symmetric: Whether the zero point is 8 everywhere.
        scale_dtype: float16, bfloat16 or float32.
        importance: [K] weight of each row's error, for example its mean square input; None weighs them equally.

    Raises:
        InputError: The group size does not divide K.
    """
    groups = split_groups(weight.float().contiguous(), group_size)
    weights = None if importance is None else importance.float().view(-1, group_size)
    scales, zeros = find_parameters(groups, symmetric, scale_dtype, weights)
    codes = nearest_codes(groups, scales.unsqueeze(1), zeros.unsqueeze(1)).to(torch.uint8)
    return Int4Weight(
        codes=pack_codes(codes.view(weight.shape)),
        scales=scales.to(scale_dtype),
        group_size=group_size,
        K=weight.shape[0],
        zeros=None if symmetric else zeros.to(torch.uint8),
    )
