"""AWQ (Lin et al., 2023): before rounding, make the rows that see large inputs larger, and their inputs smaller.

Row k of W [K, N] is multiplied by ``s[k]`` and the layer before it (a norm or another linear) divided by it, which
changes nothing but the rounding. ``s = rms(x)^a``, and the exponent a is searched for the least output error.
"""

from collections.abc import Sequence

import torch

from tokenmill.kernels.int4_gemm.weight import dequantize
from tokenmill.quant.rtn import round_to_nearest

#: Exponents that are tried; 0 scales nothing.
EXPONENTS = tuple(step / 20 for step in range(20))


def candidates(mean_squares: torch.Tensor) -> list[torch.Tensor]:
    """The scales that are tried, by exponent; the first scales nothing.

    Args:
        mean_squares: [K] float32, of each input feature.

    Returns:
        [K] float32 each, positive, with a geometric mid-range of 1.
    """
    rms = mean_squares.sqrt()
    # A feature that is always zero would divide the layer before it by zero.
    rms = rms.clamp(min=float(rms.max()) * 1e-4 + torch.finfo(torch.float32).tiny)
    powers = (rms.pow(exponent) for exponent in EXPONENTS)
    return [scales / (scales.max() * scales.min()).sqrt() for scales in powers]


def output_errors(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    tried: Sequence[torch.Tensor],
    group_size: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> list[float]:
    """The mean square error of the output that rounding to nearest makes under each of some scales.

    Args:
        weight: [K, N], the weights of all layers that read this input, side by side.
        hessian: [K, K] float32, mean of x x' over the inputs.
        tried: [K] float32 each, the scales.
        group_size: Rows that share a scale; must divide K.
        symmetric: Whether the zero point is 8 everywhere.
        scale_dtype: What the quantization scales will be stored as.

    Raises:
        InputError: The group size does not divide K.
    """
    weight = weight.float()
    errors = []
    for scales in tried:
        rounded = round_to_nearest(
            weight * scales.unsqueeze(1), group_size, symmetric, scale_dtype, hessian.diagonal() / scales.square()
        )
        difference = weight - dequantize(rounded, torch.float32) / scales.unsqueeze(1)
        errors.append(float((difference * (hessian @ difference)).sum(dtype=torch.float64)))
    return errors


def search_scales(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    group_size: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> torch.Tensor:
    """The scale of each input feature, [K], under which rounding hurts the output least; see `output_errors`."""
    tried = candidates(hessian.diagonal())
    return least(tried, output_errors(weight, hessian, tried, group_size, symmetric, scale_dtype))


def least(tried: Sequence[torch.Tensor], errors: Sequence[float]) -> torch.Tensor:
    """Of some scales those with the least error; the first of equal ones."""
    return tried[min(range(len(tried)), key=errors.__getitem__)]
