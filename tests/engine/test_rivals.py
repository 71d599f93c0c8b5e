"""The adapter of vLLM's linear kernels packs and calls them as vLLM does: shown with the kernel that runs on a CPU."""

from typing import Any

import pytest
import torch

from tokenmill.bench import rivals_vllm_linear
from tokenmill.bench.kernels import random_weight
from tokenmill.bench.rivals_gpu import VLLM_LINEARS, VllmLinear
from tokenmill.bench.rivals_vllm import VllmInt4, VllmInt4A8
from tokenmill.kernels.int4_gemm.weight import dequantize

CPU_KERNEL = VllmLinear("cpu", "CPUWNA16LinearKernel")


@pytest.mark.parametrize("rival", [VllmInt4(), VllmInt4A8()], ids=lambda rival: rival.name)
def test_a_kernel_of_vllm_multiplies_by_our_weight(
    plain: Any, rival: VllmInt4 | VllmInt4A8, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = CPU_KERNEL.why_not(256, 192, 128) or rival.why_not(256, 192, 128)
    if reason is not None:
        pytest.skip(reason)  # vLLM has no INT4 operator for AVX2, and 8 bits only with AMX
    # Not the environment: a vLLM whose engine has started keeps what it once read there.
    monkeypatch.setattr("vllm.envs.VLLM_CPU_INT4_W4A8", rival.activation_bits == 8, raising=False)
    weight = random_weight(256, 192, 128, torch.device("cpu"))
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer = CPU_KERNEL.prepare(weight)
    exact = x.double() @ dequantize(weight, torch.float64)
    tolerance = 2**-7 if rival.activation_bits == 16 else 2**-5  # a step of 8 bits is 1/127 of the largest activation
    assert (layer.call(x).double() - exact).abs().max() < tolerance * exact.abs().max()
    assert layer.nbytes >= 256 * 192 // 2


def test_what_cannot_run_here_says_why(plain: Any) -> None:
    for rival in VLLM_LINEARS:
        reason = rival.why_not(4096, 4096, 128)
        assert reason is not None
        assert "\n" not in reason
    unknown = rivals_vllm_linear.why_not("NoSuchKernel", 64, 64, 32, torch.bfloat16)
    assert unknown is not None
    assert "this vLLM does not offer NoSuchKernel" in unknown
