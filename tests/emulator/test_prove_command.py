"""`tokenmill kernels prove` on a kernel that is not of this repository: a source, and a description beside it."""

from pathlib import Path

import pytest

from tokenmill import platform
from tokenmill.cli import main
from tokenmill.errors import InputError
from tokenmill.kernels import prove

pytestmark = [
    pytest.mark.emulator,
    pytest.mark.skipif("avx2" not in platform.cpu_flags(), reason="the emulator needs x86-64 with AVX2"),
]

SOURCE = """
#include "launch.cuh"

// y[i] = 2 x[n - 1 - i] through shared memory, one CTA
__global__ void reverse(const float* x, float* y, int n) {
    STATIC_SMEM(float, kept, [256]);
    if (threadIdx.x < n) kept[threadIdx.x] = 2 * x[threadIdx.x];
    __syncthreads();
    if (threadIdx.x < n) y[threadIdx.x] = kept[n - 1 - threadIdx.x];
}

extern "C" int my_reverse(const float* x, float* y, int n, Stream stream) {
    LaunchConfig config;
    config.grid = dim3(1);
    config.block = dim3(256);
    config.stream = stream;
    return launch(reverse, config, x, y, n);
}
"""
DESCRIPTION = """
from pathlib import Path
import torch
from tokenmill.kernels.mutation import Mutant
from tokenmill.kernels.prove import Proof

def check(library, case, seed):
    x = torch.randn(case["n"], generator=torch.Generator().manual_seed(seed))
    source, target = library.upload(x), library.allocate(4 * x.numel())
    if (status := library.call("my_reverse", source, target, case["n"], None)) < 0:
        return f"the launcher refused with {status}"
    y = library.download(target, x.shape, torch.float32)
    return None if torch.equal(y, 2 * x.flip(0)) else "y is not 2 x reversed"

PROOF = Proof(
    name="reverse", root=Path(__file__).parent, source="reverse.cu", check=check, cases=({"n": 1}, {"n": 200}),
    mutants=(Mutant("no barrier", "reverse.cu", "    __syncthreads();\\n", "", ("RACE",)),),
)
"""


@pytest.fixture
def description(tmp_path: Path) -> Path:
    (tmp_path / "reverse.cu").write_text(SOURCE, encoding="utf-8")
    path = tmp_path / "reverse.py"
    path.write_text(DESCRIPTION, encoding="utf-8")
    return path


def test_a_kernel_from_elsewhere_is_proven(description: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "prove", str(description), "--launches", "6", "--jobs", "1"]) == 0
    printed = capsys.readouterr().out
    assert "6 of 6 clean" in printed
    assert "1 of 1" in printed


def test_a_wrong_kernel_fails_with_its_report(description: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = description.with_name("reverse.cu")
    source.write_text(SOURCE.replace("    __syncthreads();\n", ""), encoding="utf-8")
    arguments = ["kernels", "prove", str(description), "--launches", "6", "--jobs", "1", "--only", "emulated"]
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert "RACE" in printed
    assert "reverse.cu:8" in printed
    assert "NOT PROVEN: reverse" in printed


def test_a_check_that_crashes_is_a_finding(description: Path, capsys: pytest.CaptureFixture[str]) -> None:
    description.write_text(DESCRIPTION.replace("x.shape, torch", "x.shapes, torch"), encoding="utf-8")
    arguments = ["kernels", "prove", str(description), "--launches", "1", "--jobs", "1", "--only", "emulated"]
    assert main(arguments) == 1
    assert "CRASH: the process ended with exit code 1" in capsys.readouterr().out


def test_a_mutant_that_nothing_notices_fails(description: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harmless = DESCRIPTION.replace('"    __syncthreads();\\n", ""', '"__syncthreads();", "__syncthreads(); "')
    assert harmless != DESCRIPTION
    description.write_text(harmless, encoding="utf-8")
    arguments = ["kernels", "prove", str(description), "--jobs", "1", "--only", "mutants"]
    assert main(arguments) == 1
    assert "mutant not named: no barrier; expected RACE, got nothing at all" in capsys.readouterr().out


def test_bad_names_are_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "prove", "no_such_kernel"]) == 2
    assert "'no_such_kernel' is no kernel of this repository (int4_gemm_sm90," in capsys.readouterr().err
    broken = tmp_path / "broken.py"
    for text, line, said in (
        ("def check(:\n", "", "SyntaxError: invalid syntax"),
        ("\nimport no_such_module\n", ":2", "ModuleNotFoundError: No module named 'no_such_module'"),
    ):
        broken.write_text(text, encoding="utf-8")
        assert main(["kernels", "prove", str(broken)]) == 2
        message = capsys.readouterr().err
        assert f"{broken}{line} does not load: {said}" in message
        assert message.count("\n") == 1
    empty = tmp_path / "empty.py"
    empty.write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="defines neither PROOF nor a tuple PROOFS"):
        prove.proof_reference(str(empty))
    assert main(["kernels", "prove", "--launches", "0"]) == 2
    assert "--launches=0 must be at least 1" in capsys.readouterr().err


def test_the_list_names_every_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in prove.PROOFS)
