"""What the compiler made of the CPU kernels' inner loops, read in the objects of this checkout's build."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tokenmill import native_build

PRODUCT = re.compile(r"\s(vfmadd\w+ps|vpmaddubsw|vdpbf16ps|vpdpbusd)\s")
JUMP = re.compile(r"^\s*([0-9a-f]+):\s+j\w+\s+([0-9a-f]+) ")
#: Functions that meet codes as they come from memory. W4A8 of one row with AVX2 leaves it to the processor.
FEW_ROWS = {
    "int4_gemm__cpu_avx2.cpp.o": r"stored_tile<.*Float32, (1, 4|2, 2|3, 2|4, 1|6, 1)>",
    "int4_gemm__cpu_int8_avx2.cpp.o": r"multiply_few<(2, 2|3, 1|4, 1)>",
    "int4_gemm__cpu_avx512.cpp.o": r"stored_tile<.*Float32, (1, 8|2, 8|3, 8|4, 4|6, 4)>",
    "int4_gemm__cpu_avx512_bf16.cpp.o": r"stored_tile<.*Bf16, (1, 8|2, 8|3, 8|4, 4|6, 4)>",
    "int4_gemm__cpu_avx512_vnni.cpp.o": r"run_tile<.*Dot4, (1, 8|2, 8|3, 8|4, 4|6, 4)>",
}


def inner_loop(function: str) -> list[str]:
    """The lines from a backward jump's target to the jump: of the shortest such loop with nearly all products.

    Not all: the loop over groups around it multiplies sums by scales, too.
    """
    lines = function.splitlines()[1:]
    index = {line.split(":")[0].strip(): i for i, line in enumerate(lines) if ":" in line}
    loops = []
    for i, line in enumerate(lines):
        jump = JUMP.match(line)
        start = index.get(jump[2], i) if jump else i
        if start < i:
            loops.append(lines[start : i + 1])
    most = max(map(products, loops), default=0)
    return min((loop for loop in loops if products(loop) >= 0.8 * most), key=len, default=[])


def products(loop: list[str]) -> int:
    return sum(bool(PRODUCT.search(line)) for line in loop)


@pytest.mark.parametrize(("name", "pattern"), FEW_ROWS.items(), ids=str)
def test_loops_over_codes_ask_for_them_ahead(name: str, pattern: str) -> None:
    """GCC drops prefetches that it takes for calls without effect, as from a lambda that does nothing else."""
    path = native_build.work_directory() / name
    if not path.exists() or shutil.which("objdump") is None:
        pytest.skip("the library was not compiled in this checkout, or there is no objdump")
    functions = disassembled(path)
    chosen = {head: text for head, text in functions.items() if re.search(pattern, head)}
    assert chosen, list(functions)
    for head, text in chosen.items():
        loop = inner_loop(text)
        assert products(loop) > 0, head
        assert any("prefetch" in line for line in loop), head


def disassembled(path: Path) -> dict[str, str]:
    """Function's demangled name to its listing."""
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", path]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"\n(?=[0-9a-f]{8,} <)", listing)[1:]
    return {part.split("\n", 1)[0]: part for part in parts}
