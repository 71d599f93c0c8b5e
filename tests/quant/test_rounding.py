"""Rounding: nearest codes are nearest, GPTQ beats them on its Hessian, orders and blocks do what they promise."""

import pytest
import torch

from tokenmill.errors import InputError
from tokenmill.kernels.int4_gemm.weight import Int4Weight, dequantize, unpack_codes
from tokenmill.quant.awq import search_scales
from tokenmill.quant.gptq import ACT_ORDERS, GptqOptions, gptq, relative_error
from tokenmill.quant.rtn import round_to_nearest


def problem(K: int = 128, N: int = 48, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [K, N] and the Hessian of correlated inputs of very unequal size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(K, N, generator=generator)
    inputs = torch.randn(4 * K, K, generator=generator) @ torch.randn(K, K, generator=generator)
    inputs *= torch.randn(K, generator=generator).exp()
    return weight, inputs.T @ inputs / inputs.shape[0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, 128])
def test_each_code_is_the_nearest(symmetric: bool, dtype: torch.dtype, group_size: int) -> None:
    weight, _ = problem()
    quantized = round_to_nearest(weight, group_size, symmetric, dtype)
    quantized.check_values()
    assert quantized.scales.dtype == dtype
    error = (dequantize(quantized, torch.float32) - weight).abs()
    groups = quantized.groups()
    scales = quantized.scales.float()[groups]
    zeros = torch.full_like(scales, 8) if quantized.zeros is None else quantized.zeros.float()[groups]
    for code in range(16):
        assert bool((((code - zeros) * scales - weight).abs() >= error - 1e-6).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_is_better_than_the_full_range(symmetric: bool) -> None:
    weight, _ = problem()
    groups = weight.view(4, 32, -1)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = torch.maximum(-low, high) / 7.5 if symmetric else (high - low) / 15
    zero = torch.tensor(8.0) if symmetric else torch.round(-low / scale)
    plain = (torch.clamp(torch.round(groups / scale) + zero, 0, 15) - zero) * scale
    found = dequantize(round_to_nearest(weight, 32, symmetric, torch.float32), torch.float32)
    assert float((found - weight).square().mean()) < 0.95 * float((plain.view_as(weight) - weight).square().mean())


def test_constant_and_zero_groups_survive() -> None:
    weight = torch.cat([torch.zeros(32, 3), torch.full((32, 3), 0.25), torch.full((32, 3), -3.0)])
    for symmetric in (True, False):
        dense = dequantize(round_to_nearest(weight, 32, symmetric, torch.float32), torch.float32)
        assert torch.allclose(dense, weight, rtol=0.02)


def test_a_weight_below_the_smallest_normal_scale_survives_in_float16() -> None:
    weight = torch.linspace(-1e-4, 1e-4, 32).unsqueeze(1)
    dense = dequantize(round_to_nearest(weight, 32, True, torch.float16), torch.float32)
    assert float((dense - weight).abs().max()) < 1.2e-5


@pytest.mark.parametrize("act_order", ACT_ORDERS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 128])
def test_gptq_halves_the_error_of_rounding(act_order: str, symmetric: bool, group_size: int) -> None:
    weight, hessian = problem()
    options = GptqOptions(act_order=act_order)  # type: ignore[arg-type]
    quantized = gptq(weight, hessian, group_size, symmetric, torch.float32, options)
    quantized.check_values()
    nearest = round_to_nearest(weight, group_size, symmetric, torch.float32)
    assert relative_error(weight, quantized, hessian) < 0.5 * relative_error(weight, nearest, hessian)
    assert (quantized.g_idx is not None) == (act_order == "dynamic" and group_size == 32)
    if quantized.g_idx is not None:
        assert quantized.g_idx.bincount().tolist() == [32] * 4


def test_ordering_by_activation_helps() -> None:
    errors = {}
    for act_order in ACT_ORDERS:
        total = 0.0
        for seed in range(4):
            weight, hessian = problem(seed=seed)
            options = GptqOptions(act_order=act_order)  # type: ignore[arg-type]
            total += relative_error(weight, gptq(weight, hessian, 32, True, torch.float32, options), hessian)
        errors[act_order] = total
    assert errors["group-aware"] < errors["none"]
    assert errors["dynamic"] < errors["none"]


@pytest.mark.parametrize("act_order", ACT_ORDERS)
@pytest.mark.parametrize("group_size", [16, 48, 96])
def test_the_block_size_changes_nothing(act_order: str, group_size: int) -> None:
    weight, hessian = problem(K=96)
    codes = []
    for block in (8, 16, 96, 128):
        options = GptqOptions(act_order=act_order, block=block)  # type: ignore[arg-type]
        codes.append(unpack_codes(gptq(weight, hessian, group_size, True, torch.float32, options).codes, 96))
    for other in codes[1:]:
        # The sums are grouped differently, so a weight between two codes may fall the other way; then its row's
        # successors compensate. Anything else than a few such cases is a wrong update.
        assert float((other != codes[0]).float().mean()) < 0.02


def test_gptq_is_the_papers_algorithm() -> None:
    """One group, no order: against the textbook loop that removes a row and updates the inverse each time."""
    weight, hessian = problem(K=24, N=5)
    quantized = gptq(weight, hessian, 24, True, torch.float32, GptqOptions(act_order="none"))
    damped = hessian.double() + 0.01 * hessian.diagonal().mean().double() * torch.eye(24, dtype=torch.float64)
    scales, rest = quantized.scales.double(), weight.double().clone()
    for i in range(24):
        inverse = torch.linalg.inv(damped[i:, i:])
        value = (torch.clamp(torch.round(rest[i] / scales[0]), -8, 7)) * scales[0]
        rest[i:] -= torch.outer(inverse[:, 0] / inverse[0, 0], rest[i] - value)
    assert torch.allclose(dequantize(quantized), rest, atol=1e-5)


def test_unseen_inputs_are_rounded_to_nearest() -> None:
    weight, hessian = problem()
    hessian[5], hessian[:, 5] = 0, 0
    quantized = gptq(weight, hessian, 32, True, torch.float32, GptqOptions())
    assert bool(((dequantize(quantized, torch.float32) - weight)[5].abs() < 0.6).all())


def test_a_singular_hessian_is_damped_until_it_works() -> None:
    weight, _ = problem()
    one = torch.randn(1, 128, generator=torch.Generator().manual_seed(1))
    quantized = gptq(weight, one.T @ one, 32, True, torch.float32, GptqOptions(damping=0.0))
    quantized.check_values()


def test_a_hessian_with_nan_is_refused() -> None:
    weight, hessian = problem()
    hessian[3, 3] = float("nan")
    with pytest.raises(InputError, match="not positive definite however much it is damped"):
        gptq(weight, hessian, 32, True, torch.float32, GptqOptions())


@pytest.mark.parametrize("damping", [-5.0, 1.5, 1000.0, float("nan"), float("inf")])
def test_damping_has_a_range(damping: float) -> None:
    with pytest.raises(InputError, match=rf"damping={damping} is not in 0..1"):
        GptqOptions(damping=damping)


@pytest.mark.parametrize("group_size", [48, 0, 256])
def test_a_group_size_that_does_not_divide_is_refused(group_size: int) -> None:
    weight, hessian = problem()
    with pytest.raises(InputError, match=f"K=128 is not a multiple of group_size={group_size}"):
        round_to_nearest(weight, group_size, True, torch.float16)
    with pytest.raises(InputError, match=f"K=128 is not a multiple of group_size={group_size}"):
        gptq(weight, hessian, group_size, True, torch.float16, GptqOptions())


def scaled_error(weight: torch.Tensor, hessian: torch.Tensor, scales: torch.Tensor) -> float:
    importance = hessian.diagonal() / scales.square()
    rounded: Int4Weight = round_to_nearest(weight * scales.unsqueeze(1), 32, True, torch.float32, importance)
    difference = dequantize(rounded, torch.float32) / scales.unsqueeze(1) - weight
    return float((difference * (hessian @ difference)).sum())


def test_scaling_inputs_helps_rounding() -> None:
    weight, hessian = problem()
    scales = search_scales(weight, hessian, 32, True, torch.float32)
    assert float(scales.min()) > 0
    assert scaled_error(weight, hessian, scales) < 0.9 * scaled_error(weight, hessian, torch.ones(128))


def test_an_input_that_is_always_zero_gets_a_finite_scale() -> None:
    weight, hessian = problem()
    hessian[5], hessian[:, 5] = 0, 0
    scales = search_scales(weight, hessian, 32, True, torch.float32)
    assert bool(torch.isfinite(scales).all())
    assert float(scales.min()) > 0
