"""The CUDA kernels, executed by the emulator, against float64 from the same codes."""

import ctypes
import random

import pytest
import torch

from tokenmill import platform
from tokenmill.kernels import emulator, prove
from tokenmill.kernels.emulator import CSRC
from tokenmill.kernels.int4_gemm import cuda_call
from tokenmill.kernels.int4_gemm.layout import CudaWeight, pack
from tokenmill.kernels.int4_gemm.proof import MMA_SYNC, SM90, random_case
from tokenmill.kernels.int4_gemm.weight import Int4Weight, pack_codes

needs_emulator = pytest.mark.skipif("avx2" not in platform.cpu_flags(), reason="the emulator needs x86-64 with AVX2")

#: Codes of Int4GemmError in csrc/int4_gemm/arguments.h.
BAD_SIZE, BAD_ALIGNMENT, BAD_TILE, BAD_GROUP, BAD_SPLITS = -1001, -1002, -1003, -1004, -1005


@pytest.mark.emulator
@needs_emulator
@pytest.mark.parametrize("proof", [SM90, MMA_SYNC], ids=lambda proof: proof.name)
def test_right_and_clean_for_every_form(proof: prove.Proof) -> None:
    """Every token tile, both dtypes, all group forms, ragged sizes, splits, dependent launches, M = 0 and 1."""
    modes = random.Random(5)
    launches = [
        prove.Launch(case, seed=number + 1, mode=modes.choice(emulator.ASYNC_MODES), resident_ctas=modes.choice((1, 4)))
        for number, case in enumerate(proof.cases)
    ]
    findings = prove.prove_clean(prove.PROOFS[proof.name], launches, jobs=platform.physical_cores())
    assert findings.launches == len(proof.cases)
    assert not findings.bad, f"{findings.bad[0]}\n{findings.bad[0].finding()}"


@pytest.mark.parametrize("kernel", ["sm90", "mma_sync"])
def test_random_cases_wrap_the_pipeline_twice(kernel: str) -> None:
    rng = random.Random(1)
    for _ in range(200):
        drawn = random_case(kernel, rng)
        assert drawn["token_tile"] in cuda_call.TOKEN_TILES[kernel]
        assert -(-drawn["K"] // 64) // drawn["splits"] > 10


@pytest.fixture(scope="module")
def packed() -> CudaWeight:
    generator = torch.Generator().manual_seed(0)
    weight = Int4Weight(
        codes=pack_codes(torch.randint(0, 16, (256, 128), generator=generator, dtype=torch.uint8)),
        scales=torch.rand(2, 128, generator=generator).to(torch.bfloat16),
        group_size=128,
        K=256,
    )
    return pack(weight, torch.bfloat16)


@pytest.mark.emulator
@needs_emulator
@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"M": -1}, BAD_SIZE),
        ({"N": 0}, BAD_SIZE),
        ({"K": 0}, BAD_SIZE),
        ({"x_stride": 248}, BAD_SIZE),
        ({"x_stride": 260}, BAD_ALIGNMENT),
        ({"y": 1 << 20 | 8}, BAD_ALIGNMENT),
        ({"token_tile": 24}, BAD_TILE),
        ({"group_rows": 96}, BAD_GROUP),
        ({"splits": 0}, BAD_SPLITS),
        ({"splits": 5}, BAD_SPLITS),
        ({"splits": 2}, BAD_SPLITS),
        ({"M": 0}, 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("proof", [SM90, MMA_SYNC], ids=lambda proof: proof.name)
def test_launchers_refuse_what_the_kernels_cannot_do(
    proof: prove.Proof, change: dict[str, int], code: int, packed: CudaWeight
) -> None:
    """Before anything is launched: the pointers here lead nowhere."""
    library = emulator.load(CSRC / proof.source, (CSRC,))
    kernel = proof.name.removeprefix("int4_gemm_")
    plan = cuda_call.Plan(kernel, token_tile=64, splits=1)
    arguments = cuda_call.arguments(packed, torch.bfloat16, 64, 256, 128, plan, dependent=False)
    for name in ("x", "words", "scales", "y"):
        setattr(arguments, name, 1 << 20)
    for name, value in change.items():
        setattr(arguments, name, value)
    assert library.call(f"tokenmill_int4_gemm_{kernel}", ctypes.byref(arguments), None) == code


def test_plan_fills_the_gpu_and_not_more(packed: CudaWeight) -> None:
    assert cuda_call.plan(1, packed, sm_count=132, hopper=True) == cuda_call.Plan("mma_sync", 8, 1)
    assert cuda_call.plan(33, packed, sm_count=132, hopper=True).kernel == "sm90"
    assert cuda_call.plan(33, packed, sm_count=132, hopper=False) == cuda_call.Plan("mma_sync", 64, 1)
    large = pack(_zero_weight(4096, 1024), torch.float16)
    for M in (1, 8, 16, 32, 64, 65, 256, 4096):
        plan = cuda_call.plan(M, large, sm_count=132, hopper=True)
        tiles = 8 * -(-M // plan.token_tile)
        assert plan.splits == 1 or plan.splits * tiles <= (132 if plan.kernel == "sm90" else 264)
    assert cuda_call.plan(1, large, sm_count=132, hopper=True).splits == 16


def _zero_weight(K: int, N: int) -> Int4Weight:
    return Int4Weight(
        codes=torch.zeros(K // 8, N, dtype=torch.int32), scales=torch.ones(K // 128, N), group_size=128, K=K
    )


def test_arranged_puts_zeros_where_rows_are_padding() -> None:
    generator = torch.Generator().manual_seed(3)
    g_idx = torch.randint(0, 4, (100,), dtype=torch.int32, generator=generator)
    weight = Int4Weight(
        codes=torch.zeros(13, 8, dtype=torch.int32), scales=torch.ones(4, 8), group_size=32, K=100, g_idx=g_idx
    )
    packed = pack(weight, torch.float16)
    x = torch.randn(3, 100, generator=generator)
    arranged = cuda_call.arranged(x, packed)
    assert packed.order is not None
    for row, feature in enumerate(packed.order.tolist()):
        expected = x[:, feature] if feature >= 0 else torch.zeros(3)
        assert torch.equal(arranged[:, row], expected)
