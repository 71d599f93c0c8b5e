"""The public op with `implementation="cuda-emulated"`: the host code of the CUDA path on CPU tensors, its refusals."""

import pytest
import torch

from tokenmill import platform
from tokenmill.errors import UnsupportedError
from tokenmill.kernels import registry
from tokenmill.kernels.int4_gemm.op import INT4_GEMM, int4_gemm, prepare
from tokenmill.kernels.int4_gemm.weight import Int4Weight, dequantize, pack_codes
from tokenmill.kernels.numerics import assert_within

pytestmark = [
    pytest.mark.emulator,
    pytest.mark.skipif("avx2" not in platform.cpu_flags(), reason="the emulator needs x86-64 with AVX2"),
]


def weight_of(K: int, N: int, group: int, *, act_order: bool = False, bias: bool = False) -> Int4Weight:
    generator = torch.Generator().manual_seed(K + N)
    G = -(-K // group)
    g_idx = (torch.arange(K) // group).to(torch.int32)[torch.randperm(K, generator=generator)]
    return Int4Weight(
        codes=pack_codes(torch.randint(0, 16, (K, N), generator=generator, dtype=torch.uint8)),
        scales=(torch.rand(G, N, generator=generator) * 0.02 + 0.01).to(torch.bfloat16),
        group_size=group,
        K=K,
        g_idx=g_idx if act_order else None,
        bias=torch.randn(N, generator=generator).to(torch.bfloat16) if bias else None,
    )


@pytest.mark.parametrize(
    ("M", "K", "N", "group", "act_order", "bias"),
    [
        (1, 1024, 128, 128, False, False),  # splits K
        (5, 100, 67, 32, False, True),  # nothing is a multiple of 8: x and out are copied into aligned rows
        (40, 192, 72, 64, True, True),  # wgmma, inputs reordered
    ],
)
def test_the_op_equals_float64(M: int, K: int, N: int, group: int, act_order: bool, bias: bool) -> None:
    weight = weight_of(K, N, group, act_order=act_order, bias=bias)
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(torch.bfloat16)
    out = int4_gemm(x, weight, implementation="cuda-emulated")
    dense = dequantize(weight)
    exact = x.double() @ dense + (weight.bias.double() if weight.bias is not None else 0)
    bound = (x.double().abs() @ dense.abs()) * 2**-8 + exact.abs() * 2**-7 + 2**-7
    assert_within(out, exact, bound)


def test_tickets_serve_the_next_launch() -> None:
    """The counters of the split sum are zero again after a launch: a second one gives the same bits."""
    layer = prepare(weight_of(1024, 64, 128), torch.bfloat16, implementation="cuda-emulated")
    x = torch.randn(2, 1024, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    assert torch.equal(layer(x), layer(x))


def test_it_is_never_chosen_automatically_and_says_what_it_cannot_do() -> None:
    problem = INT4_GEMM.problem(dtype=torch.bfloat16)
    assert registry.choose(INT4_GEMM, problem).name != "cuda-emulated"
    for dtype, options, message in (
        (torch.float32, {}, "take float16 or bfloat16"),
        (torch.bfloat16, {"activation_bits": 8}, "multiply 16-bit activations"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            registry.choose(INT4_GEMM, INT4_GEMM.problem(dtype=dtype, **options), "cuda-emulated")
