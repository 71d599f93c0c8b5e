"""What the compiler made of the CPU kernels' inner loops, read in the objects of this checkout's build."""

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tokenmill import native_build

PRODUCT = re.compile(r"\s(vfmadd\w+ps|vpmaddubsw|vpmaddwd|vdpbf16ps|vpdpbusd|vpdpwssd)\s")
SPILL = re.compile(r"\svmov\w+\s+%[yz]mm\d+,\S*\(%r[sb]p")
JUMP = re.compile(r"^\s*([0-9a-f]+):\s+j\w+\s+([0-9a-f]+) ")
#: Functions that meet codes as they come from memory. W4A8 of one row with AVX2 leaves it to the processor.
FEW_ROWS = {
    "int4_gemm__cpu_avx2.cpp.o": r"stored_tile<.*Float32, (1, 4|2, 2|[3-6], 1)>",
    "int4_gemm__cpu_int16_avx2.cpp.o": r"dots_tile<.*Dot2, (1, 4|2, 2|[3-5], 1)>",
    "int4_gemm__cpu_int8_avx2.cpp.o": r"multiply_few<(2, 2|3, 1|4, 1)>",
    "int4_gemm__cpu_avx_vnni.cpp.o": r"dots_tile<.*Dot[24], (1, 4|2, 2|[3-5], 1)>",
    "int4_gemm__cpu_avx512.cpp.o": r"stored_tile<.*Float32, ([1-6], 4|(7|8|10|12), 2|16, 1)>",
    "int4_gemm__cpu_int16_avx512.cpp.o": r"dots_tile<.*Dot2, ([1-6], 4|(7|8|10|12), 2)>",
    "int4_gemm__cpu_avx512_bf16.cpp.o": r"stored_tile<.*Bf16, ([1-6], 4|(7|8|10|12), 2)>",
    "int4_gemm__cpu_avx512_vnni.cpp.o": r"dots_tile<.*Dot[24], ([1-6], 4|(7|8|10|12), 2)>",
}
#: Functions that meet codes of a panel.
MANY_ROWS = {
    "int4_gemm__cpu_avx2.cpp.o": r"Tall<.*Float32>::tile<(2|4|6), 1, (true|false)>",
    "int4_gemm__cpu_avx512.cpp.o": r"Tall<.*Float32>::tile<(4|8|12), 2, (true|false)>",
    "int4_gemm__cpu_avx512_bf16.cpp.o": r"Tall<.*Bf16>::tile<(4|8|12), 2, (true|false)>",
}
#: Of those the ones that make the panel, of codes as they come from memory.
MAKING = {name: pattern.replace("(true|false)", "true") for name, pattern in MANY_ROWS.items()}
#: Not W4A8 with AVX2, whose sums do not fit into 16 registers.
IN_REGISTERS = [item for item in (*FEW_ROWS.items(), *MANY_ROWS.items()) if "int8_avx2" not in item[0]]


def inner_loop(function: str) -> list[str]:
    """The lines from a backward jump's target to the jump: of the shortest such loop with nearly all products.

    Products are what there is most of among the instructions that multiply and add. Not all of them: where they are
    FMA, the loop over groups around it multiplies sums by scales with FMA, too.
    """
    lines = function.splitlines()[1:]
    index = {line.split(":")[0].strip(): i for i, line in enumerate(lines) if ":" in line}
    kinds = Counter(match[1] for line in lines if (match := PRODUCT.search(line)))
    product = kinds.most_common(1)[0][0] if kinds else ""

    def count(loop: list[str]) -> int:
        return sum(product in line for line in loop)

    loops = []
    for i, line in enumerate(lines):
        jump = JUMP.match(line)
        start = index.get(jump[2], i) if jump else i
        if start < i:
            loops.append(lines[start : i + 1])
    most = max(map(count, loops), default=0)
    return min((loop for loop in loops if count(loop) >= 0.8 * most > 0), key=len, default=[])


def products(loop: list[str]) -> int:
    return sum(bool(PRODUCT.search(line)) for line in loop)


def functions_of(name: str, pattern: str) -> dict[str, str]:
    """Those of an object of this checkout's build whose name matches."""
    path = native_build.work_directory() / name
    if not path.exists() or shutil.which("objdump") is None:
        pytest.skip("the library was not compiled in this checkout, or there is no objdump")
    functions = disassembled(path)
    chosen = {head: text for head, text in functions.items() if re.search(pattern, head)}
    assert chosen, list(functions)
    return chosen


@pytest.mark.parametrize(("name", "pattern"), FEW_ROWS.items(), ids=str)
def test_loops_over_codes_ask_for_them_ahead(name: str, pattern: str) -> None:
    """GCC drops prefetches that it takes for calls without effect, as from a lambda that does nothing else."""
    for head, text in functions_of(name, pattern).items():
        loop = inner_loop(text)
        assert loop, head
        assert any("prefetch" in line for line in loop), head


@pytest.mark.parametrize(("name", "pattern"), MAKING.items(), ids=str)
def test_tiles_that_make_a_panel_ask_for_the_next(name: str, pattern: str) -> None:
    """Once before their loop, and in it, where GCC puts decoding behind the products."""
    for head, text in functions_of(name, pattern).items():
        first_product = PRODUCT.search(text)
        assert first_product, head
        assert "prefetch" in text[: first_product.start()], head
        assert "prefetch" in text[first_product.start() :], head


@pytest.mark.parametrize(("name", "pattern"), IN_REGISTERS, ids=str)
def test_loops_keep_their_sums_in_registers(name: str, pattern: str) -> None:
    """GCC likes to keep something else there; a few stores do no harm."""
    for head, text in functions_of(name, pattern).items():
        loop = inner_loop(text)
        assert loop, head
        assert sum(bool(SPILL.search(line)) for line in loop) * 12 <= products(loop), head


def disassembled(path: Path) -> dict[str, str]:
    """Function's demangled name to its listing."""
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", path]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"\n(?=[0-9a-f]{8,} <)", listing)[1:]
    return {part.split("\n", 1)[0]: part for part in parts}
