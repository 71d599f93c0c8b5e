"""The Triton kernels against float64 from the same codes, how they are planned, and what they refuse."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.int4_gemm import triton_cases
from tests.kernels.int4_gemm.triton_cases import CASES, Case
from tokenmill import platform
from tokenmill.errors import UnsupportedError
from tokenmill.kernels import registry
from tokenmill.kernels.int4_gemm import configs, triton_gates
from tokenmill.kernels.int4_gemm.layout import DEPTH, ROWS, CudaWeight, pack
from tokenmill.kernels.int4_gemm.op import INT4_GEMM, int4_gemm, prepare
from tokenmill.kernels.int4_gemm.triton_gates import Target
from tokenmill.kernels.spec import Problem

pytest.importorskip("triton", reason="triton is not installed; pip install triton")

FAMILIES = ("sm80", "sm90", "sm100", "sm120")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def interpreted() -> dict[int, str | None]:
    """Case number to what is wrong with it, from one process: triton decides at import whether it interprets."""
    program = Path(triton_cases.__file__)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    answer = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert answer.returncode == 0, answer.stderr
    return {row["case"]: row["wrong"] for row in map(json.loads, answer.stdout.splitlines())}


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: str(CASES[number]))
def test_right_in_the_interpreter(number: int, interpreted: dict[int, str | None]) -> None:
    """Every scheme, ragged sizes, M = 0 and 1, both kinds of scaling, splits of K; twice the same bits."""
    assert interpreted[number] is None, interpreted[number]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_right_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    triton_cases.check(case, dtype, "cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("M", [1, 16, 33, 200])
def test_the_op_on_a_gpu(M: int) -> None:
    """The public function, planned for the GPU at hand, repeated: bit-equal and within the bound."""
    device = platform.gpus()[0]
    case = Case(M, 4096, 4096, zeros=True, family=device.family, sm_count=_sm_count())
    weight, x = case.weight(torch.bfloat16), case.activations(torch.bfloat16, "cuda")
    layer = prepare(weight, torch.bfloat16, device="cuda", implementation="triton")
    first = layer(x)
    for _ in range(20):
        assert torch.equal(layer(x), first)
    packed = pack(weight, torch.bfloat16)
    triton_cases.judge(first.cpu(), x.cpu(), weight, packed, case)


def _sm_count() -> int:
    return int(torch.cuda.get_device_properties(0).multi_processor_count)


class PretendedGpu:
    """Triton's driver as far as compiling asks it: an sm_90 that nothing is launched on."""

    def get_current_device(self) -> int:
        return -1  # no device of this machine: triton keeps what it compiled by this number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.mark.parametrize(
    ("case", "target"),
    [
        (Case(1, 4096, 4096, sm_count=132), Target("90a", 16, 0, partial=True)),
        (Case(5, 160, 96, group=32, zeros=True, bias=True), Target("90a", 16, 0, zeros=True, group_rows=32)),
    ],
    ids=["split", "whole"],
)
def test_a_launch_is_what_the_gates_compile(case: Case, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bound by triton's own launcher, every argument has the type, constant and alignment that the gates assume."""
    from triton.runtime import driver

    from tokenmill.kernels import aot
    from tokenmill.kernels.int4_gemm import triton_impl

    compiled: dict[str, Any] = {}

    class Compiling:
        """A jitted function whose launches only compile."""

        def __init__(self, name: str) -> None:
            self.kernel = getattr(triton_impl, name)

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*arguments: Any, **options: Any) -> None:
                made = self.kernel.warmup(*arguments, grid=grid, **options)
                compiled[made.metadata.name] = made

            return launch

    weight = case.weight(torch.bfloat16)
    multiply = triton_impl.multiplier(pack(weight, torch.bfloat16), case.sm_count, case.family)
    for name in ("int4_gemm_product", "int4_gemm_sum"):
        monkeypatch.setattr(triton_impl, name, Compiling(name))
    monkeypatch.setattr(driver, "_active", PretendedGpu())
    x, out = case.activations(torch.bfloat16, "cpu"), torch.empty(case.M, case.N, dtype=torch.bfloat16)
    multiply(x, out, weight.bias)
    monkeypatch.undo()
    product = compiled["int4_gemm_product"]
    expected = triton_gates.configuration(target)
    assert product.src.signature == expected.signature
    assert product.src.constants == aot.source(triton_impl.int4_gemm_product, expected).constants
    aligned = {name for place, name in enumerate(expected.signature) if product.src.attrs.get((place,))}
    assert aligned == set(expected.aligned)
    assert (product.metadata.num_warps, product.metadata.num_stages) == (expected.num_warps, expected.num_stages)
    assert ("int4_gemm_sum" in compiled) == target.partial


def sized(blocks: int, tiles: int, group_rows: int) -> CudaWeight:
    """A packed weight of which only the sizes are real."""
    empty = torch.empty(0)
    words = torch.empty(blocks, tiles, 256, 4, dtype=torch.int32, device="meta")
    return CudaWeight(words, empty, None, group_rows, tiles * DEPTH, blocks * ROWS, None, empty, group_rows, 1)


@given(
    M=st.integers(1, 5000),
    blocks=st.integers(1, 500),
    tiles=st.integers(1, 500),
    group_rows=st.sampled_from([32, 64, 128, 256, 1024, -1]),
    sm_count=st.integers(1, 200),
    family=st.sampled_from(FAMILIES),
)
@settings(max_examples=300, deadline=None)
def test_a_plan_covers_the_problem(
    M: int, blocks: int, tiles: int, group_rows: int, sm_count: int, family: str
) -> None:
    """Every tile of K belongs to one split, no split is empty or ends within a step, no step within a group."""
    group_rows = tiles * DEPTH if group_rows == -1 else group_rows
    plan = configs.plan(M, sized(blocks, tiles, group_rows), sm_count, family)
    config = plan.config
    assert config in configs.SEARCH_SPACE
    assert tiles % config.step_tiles == plan.split_tiles % config.step_tiles == 0
    assert (plan.splits - 1) * plan.split_tiles < tiles <= plan.splits * plan.split_tiles
    assert config.step_tiles == 1 or group_rows % (config.step_tiles * DEPTH) == 0
    assert config.scale_weights or group_rows != 32
    if plan.splits > 1:
        programs = blocks * -(-M // config.token_tile) * plan.splits
        assert programs <= 2 * sm_count
        assert plan.split_tiles >= 4 * config.step_tiles


def test_configurations_follow_the_batch() -> None:
    tiles = [configs.configuration(M, "sm90", 128, 64).token_tile for M in (1, 16, 17, 32, 33, 64, 65, 128, 129, 4096)]
    assert tiles == [16, 16, 32, 32, 64, 64, 128, 128, 128, 128]
    assert configs.configuration(8, "sm90", 128, 64).step_tiles == 2
    assert configs.configuration(8, "sm90", 128, 63).step_tiles == 1
    assert not configs.configuration(8, "sm90", 128, 64).scale_weights
    assert configs.configuration(8, "sm100", 128, 64).scale_weights
    assert configs.configuration(200, "sm90", 128, 64).scale_weights


def test_it_stands_between_cuda_and_the_cpu() -> None:
    assert registry.names(INT4_GEMM)[:3] == ("cuda", "triton", "cpu")


def test_refusals_are_one_line() -> None:
    from tokenmill.kernels.int4_gemm import triton_impl

    weight = CASES[0].weight(torch.float16)
    with pytest.raises(UnsupportedError, match="the tensors are on cpu, not on a CUDA device") as caught:
        int4_gemm(torch.zeros(1, 2048, dtype=torch.float16), weight, implementation="triton")
    assert "\n" not in str(caught.value)
    assert "not on a CUDA device" in registry.explain(INT4_GEMM, INT4_GEMM.problem()).refusals["triton"]
    for dtype, bits, message in (
        (torch.float32, 16, "the activations are float32; the Triton kernels take float16 or bfloat16"),
        (torch.bfloat16, 8, "activation_bits=8; the Triton kernels multiply 16-bit activations"),
    ):
        problem = INT4_GEMM.problem(dtype=dtype, device="cuda", activation_bits=bits)
        assert triton_impl.refusal(problem) == message


def test_an_old_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenmill.kernels.int4_gemm import triton_impl

    problem: Problem = INT4_GEMM.problem(device="cuda")
    assert triton_impl.refusal(problem) is None
    monkeypatch.setattr(triton_impl.triton, "__version__", "3.5.1")
    assert "triton 3.5.1 is older than 3.6" in str(triton_impl.refusal(problem))
