"""The emulator under other compilers, without warnings, and under AddressSanitizer."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tokenmill.kernels import emulator

pytestmark = pytest.mark.emulator

KERNELS = Path(__file__).parent / "kernels"
COMPILERS = [
    name
    for name in ("g++-12", "g++-13", "g++-14", "clang++-14", "clang++-15", "clang++-16", "clang++-17", "clang++-18")
    if shutil.which(name)
]
#: Runs the correct kernels, and one bug of each kind of ending: report, deadlock, abort, exit in flight.
MAIN = """
#include <cstdio>
#include "emulator/host.h"
typedef int Launcher(unsigned*, int, void*);
#define SCENARIOS(f) f(exchange) f(divergence) f(bulk_pipeline) f(store) f(cp_async) f(cluster_exchange) f(multicast) \\
    f(flag) f(grid_barrier) f(dependent_pair) f(wgmma_rules) f(registers) f(refused)
#define DECLARE(name) extern "C" Launcher name;
SCENARIOS(DECLARE)
int main() {
    struct Run { Launcher* launcher; int bug; bool clean; };
#define CLEAN(name) {name, 0, true},
    const Run runs[] = {SCENARIOS(CLEAN) {divergence, 1, false}, {bulk_pipeline, 1, false}, {wgmma_rules, 11, false},
                        {refused, 5, false}, {cp_async, 5, false}};
    int wrong = 0;
    for (int mode = 0; mode < 3; mode++)
        for (const Run& run : runs) {
            emulator::config.async = (emulator::AsyncMode)mode;
            emulator::device_free_all();
            unsigned* data = (unsigned*)emulator::device_malloc(256);
            for (int i = 0; i < 64; i++) data[i] = 0;
            const int status = run.launcher(data, run.bug, nullptr);
            if ((status == 0) != run.clean) wrong++, printf("bug %d: %d\\n%s", run.bug, status, emulator::reports());
        }
    return wrong;
}
"""


def compile_all(cxx: str, work: Path, runtime_flags: Sequence[str], link_flags: Sequence[str]) -> Path:
    """Runtime (one unit), the hazards and MAIN as an executable; every warning is an error."""
    clang, program = "clang" in cxx, str(work / "all")
    sources = sorted((emulator.CSRC / "emulator").glob("*.cpp"))
    (work / "runtime.cpp").write_text("".join(f'#include "{path}"\n' for path in sources))
    (work / "main.cpp").write_text(MAIN)
    quiet = [] if clang else ["-Wno-psabi"]
    runtime = [cxx, *emulator._RUNTIME, *quiet, "-Werror", *runtime_flags]
    kernel = [cxx, *emulator._KERNEL, *emulator._MEMORY_CALLS, "-Werror", f"-I{emulator.CSRC}"]
    kernel += emulator._KERNEL_CLANG if clang else emulator._KERNEL_GCC
    for command in (
        [*runtime, "-c", str(work / "runtime.cpp"), "-o", str(work / "runtime.o")],
        [*runtime, f"-I{emulator.CSRC}", "-c", str(work / "main.cpp"), "-o", str(work / "main.o")],
        [*kernel, "-x", "c++", "-c", str(KERNELS / "hazards.cu"), "-o", str(work / "hazards.o")],
        [
            cxx,
            *link_flags,
            *(str(work / f"{part}.o") for part in ("main", "hazards", "runtime")),
            "-ldl",
            "-o",
            program,
        ],
    ):
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        assert answer.returncode == 0, answer.stderr[-3000:]
    return Path(program)


@pytest.mark.parametrize("cxx", COMPILERS)
def test_compiler(tmp_path: Path, cxx: str) -> None:
    program = compile_all(cxx, tmp_path, (), ())
    answer = subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=300)
    assert answer.returncode == 0, answer.stdout[-3000:]


@pytest.mark.slow
def test_address_sanitizer_finds_nothing(tmp_path: Path) -> None:
    """In the emulator itself; fibers tell the sanitizer about their stacks."""
    sanitize = ("-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-omit-frame-pointer", "-g")
    program = compile_all("g++", tmp_path, sanitize, sanitize)
    answer = subprocess.run(
        [str(program)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0", "PATH": "/usr/bin:/bin"},
    )
    assert answer.returncode == 0, (answer.stdout + answer.stderr)[-3000:]
    assert "runtime error" not in answer.stderr, answer.stderr[-3000:]
