"""AWQ (Lin et al., 2023): before rounding, make the rows that see large inputs larger, and their inputs smaller.

Row k of W [K, N] is multiplied by ``s[k]`` and the layer before it (a norm or another linear) divided by it, which
changes nothing but the rounding. ``s = rms(x)^a``, and the exponent a is searched for the least output error.
"""

import torch

from tokenmill.kernels.int4_gemm.weight import dequantize
from tokenmill.quant.rtn import round_to_nearest

#: Exponents that are tried; 0 scales nothing.
EXPONENTS = tuple(step / 20 for step in range(20))


def search_scales(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    group_size: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> torch.Tensor:
    """The scale of each input feature under which rounding to nearest hurts the output least.

    Args:
        weight: [K, N], the weights of all layers that read this input, side by side.
        hessian: [K, K] float32, mean of x x' over the inputs.
        group_size: Rows that share a scale; must divide K.
        symmetric: Whether the zero point is 8 everywhere.
        scale_dtype: What the quantization scales will be stored as.

    Returns:
        [K] float32, positive, with a geometric mid-range of 1.

    Raises:
        InputError: The group size does not divide K.
    """
    weight = weight.float()
    rms = hessian.diagonal().sqrt()
    # A feature that is always zero would divide the layer before it by zero.
    rms = rms.clamp(min=float(rms.max()) * 1e-4 + torch.finfo(torch.float32).tiny)
    best_error, best = torch.inf, torch.ones_like(rms)
    for exponent in EXPONENTS:
        scales = rms.pow(exponent)
        scales = scales / (scales.max() * scales.min()).sqrt()
        rounded = round_to_nearest(
            weight * scales.unsqueeze(1), group_size, symmetric, scale_dtype, hessian.diagonal() / scales.square()
        )
        difference = weight - dequantize(rounded, torch.float32) / scales.unsqueeze(1)
        error = float((difference * (hessian @ difference)).sum(dtype=torch.float64))
        if error < best_error:
            best_error, best = error, scales
    return best
