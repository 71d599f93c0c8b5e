"""Static gates of Triton kernels: compiled ahead of time for a GPU that this machine does not have.

Triton's wheel contains ptxas and cuobjdump, so that these rows need neither a GPU nor the CUDA toolkit. They are the
same `GateRow`s as those of the CUDA sources, judged by the same rules.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from tokenmill.errors import TokenmillError
from tokenmill.kernels.gates import (
    COUNTED,
    HGMMA_REGISTERS,
    HGMMA_SHARED,
    GateRow,
    Instruction,
    count_instructions,
    disassemble,
    instructions,
)

#: Triton's number of an architecture, and ptxas's name of it.
_TARGETS = {"80": 80, "89": 89, "90a": 90, "100a": 100, "120a": 120}

#: The tensor cores' instructions on 16-bit numbers.
MATRIX = ("HGMMA", "UTCHMMA", "HMMA")
_COLUMNS = (*COUNTED, HGMMA_REGISTERS, HGMMA_SHARED)


@dataclass(frozen=True)
class Configuration:
    """One specialisation of a Triton kernel.

    Attributes:
        label: Names the row, e.g. `BLOCK_M=16, warps=4`.
        signature: Argument name to Triton type (`*bf16`, `i32`) or `constexpr`.
        constants: Values of the constexpr arguments.
        num_warps: Warps of a program.
        num_stages: Depth of software pipelining.
        aligned: Arguments known to be multiples of 16, as the launcher finds out at run time.
    """

    label: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()


def source(kernel: Any, configuration: Configuration) -> ASTSource:
    """What triton.compile takes for a configuration of a `triton.jit` function."""
    names = list(configuration.signature)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in configuration.aligned}
    constants = {(names.index(name),): value for name, value in configuration.constants.items()}
    return ASTSource(fn=kernel, signature=dict(configuration.signature), constexprs=constants, attrs=attributes)


def measure(kernel: Any, configuration: Configuration, architecture: str) -> GateRow:
    """Compiles a `triton.jit` function for one architecture and reads off what it became.

    Args:
        kernel: The jitted function.
        configuration: Types, constants and launch options.
        architecture: `80`, `89`, `90a`, `100a` or `120a`.

    Raises:
        TokenmillError: Triton or ptxas refuses it.
    """
    compiled = triton.compile(
        source(kernel, configuration),
        target=GPUTarget("cuda", _TARGETS[architecture], 32),
        options={
            "num_warps": configuration.num_warps,
            "num_stages": configuration.num_stages,
            "enable_fp_fusion": True,  # triton's default up to 3.9, which warns when it is left out
        },
    )
    with tempfile.TemporaryDirectory() as directory:
        log, cubin = _assemble(compiled.asm["ptx"], architecture, Path(directory))
        sass = disassemble(cubin)
    name = compiled.metadata.name
    counts = count_instructions(sass)[name]
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if registers is None or spills is None:
        raise TokenmillError(f"ptxas did not say what {name} uses; its -v output has changed")
    return GateRow(
        kernel=name,
        instance=configuration.label,
        architecture=architecture,
        registers=int(registers[1]),
        spill_bytes=int(spills[2]) + int(spills[3]),
        stack_bytes=int(spills[1]),
        static_smem_bytes=int(compiled.metadata.shared),
        warnings=tuple(sorted(set(re.findall(r"\((C7\d\d\d)\)", log)))),
        instructions={label: counts[label] for label in _COLUMNS if counts[label]},
        toolchain=f"triton {triton.__version__}",
        step_instructions=step_instructions(instructions(sass)[name]),
    )


def step_instructions(code: Sequence[Instruction]) -> int | None:
    """Instructions from head to backward branch of the innermost loop with matrix instructions; None without one.

    What stands behind the last EXIT are waits moved out of line, which jump back into the code without being loops.
    """
    end = max((item.address for item in code if item.mnemonic == "EXIT"), default=0)
    lengths = []
    for item in code:
        target = re.search(r"0x([0-9a-f]+)", item.operands) if item.mnemonic == "BRA" else None
        if target is None or item.address > end or int(target[1], 16) > item.address:
            continue
        body = [other.mnemonic for other in code if int(target[1], 16) <= other.address <= item.address]
        if any(matrix in body for matrix in MATRIX):
            lengths.append(len(body))
    return min(lengths, default=None)


def _assemble(ptx: str, architecture: str, directory: Path) -> tuple[str, Path]:
    """(ptxas's -v output, cubin): triton's own ptxas again, because triton.compile does not keep its log."""
    program = get_ptxas(_TARGETS[architecture]).path
    text, cubin = directory / "kernel.ptx", directory / "kernel.cubin"
    text.write_text(ptx, encoding="utf-8")
    result = subprocess.run(
        [program, "-v", f"--gpu-name=sm_{architecture}", str(text), "-o", str(cubin)],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise TokenmillError(f"ptxas refuses the kernel for sm_{architecture}: {result.stderr.splitlines()[0]}")
    return result.stderr + result.stdout, cubin
