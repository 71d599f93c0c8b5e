"""Building and driving emulated kernels from Python; what cannot be modelled does not compile."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tokenmill.errors import InputError, UnsupportedError
from tokenmill.kernels import emulator
from tokenmill.kernels.emulator import EmulatedLibrary, EmulatorError

pytestmark = pytest.mark.emulator

Kernels = Callable[[str], EmulatedLibrary]

SCALE = """
#include "launch.cuh"
#include "factor.cuh"
__global__ void scale(const float* x, float* y, int n) {
    const int i = (int)(blockIdx.x * 128 + threadIdx.x);
    if (i < n) y[i] = FACTOR * x[i];
}
extern "C" int my_scale(const float* x, float* y, int n, Stream stream) {
    return launch(scale, LaunchConfig{dim3((unsigned)(n + 127) / 128), dim3(128), 0, stream}, x, y, n);
}
"""


def write_scale(folder: Path, factor: int) -> Path:
    (folder / "factor.cuh").write_text(f"#define FACTOR {factor}\n")
    source = folder / "scale.cu"
    source.write_text(SCALE)
    return source


def test_kernel_outside_the_repository(tmp_path: Path) -> None:
    library = EmulatedLibrary(emulator.build(write_scale(tmp_path, 3)))
    storage = torch.full((8, 300), float("nan"))
    x, y = torch.randn(200), storage[3, 50:250]  # a view: what lies around it must stay
    library.run("my_scale", x, y, 200)
    assert torch.equal(y, 3 * x)
    assert int(storage.isnan().sum()) == 8 * 300 - 200
    with pytest.raises(EmulatorError, match=r"OUT OF BOUNDS: read of 4 bytes of global memory at scale\.cu"):
        library.run("my_scale", x, y, 201)
    library.run("my_scale", x, y, 200)  # a report ends nothing


def test_builds_are_reused_until_something_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = emulator.build_runtime()
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "emulator").mkdir(parents=True)
    monkeypatch.setattr(emulator, "build_runtime", lambda: runtime)
    first = emulator.build(write_scale(tmp_path, 3))
    assert emulator.build(tmp_path / "scale.cu") == first
    second = emulator.build(write_scale(tmp_path, 5))
    assert second != first
    assert emulator.build(write_scale(tmp_path, 3)) == first
    chosen = emulator.build(tmp_path / "scale.cu", defines=("UNUSED=1",), output=tmp_path / "mine.so")
    assert chosen == tmp_path / "mine.so"
    assert chosen.exists()


@pytest.mark.parametrize(
    "statement",
    [
        "__shared__ int words[4]; words[0] = 1;",
        'asm volatile("bar.sync 0;");',
        "unsigned m = __activemask(); (void)m;",
        "long long now = clock64(); (void)now;",
        "float d[6] = {}; u32 a[4] = {}; wgmma_rs_bf16<12>(d, a, 0, 1);",
        "float d[4] = {}; wgmma_ss_e4m3<8, 1, 1>(d, 0, 0, 1);",
        "setmaxnreg_inc<233>();",
        "static u32* const once = new u32[4]; (void)once;",
    ],
)
def test_unmodelled_does_not_compile(tmp_path: Path, statement: str) -> None:
    source = tmp_path / "unmodelled.cu"
    source.write_text(
        '#include "launch.cuh"\n__global__ void kernel() { '
        + statement
        + ' }\nextern "C" int run(Stream s) { return launch(kernel, LaunchConfig{dim3(1), dim3(32), 0, s}); }\n'
    )
    with pytest.raises(InputError, match=r"unmodelled\.cu does not compile for the emulator"):
        emulator.build(source, output=tmp_path / "never.so")


def test_inputs_are_checked(kernels: Kernels, tmp_path: Path) -> None:
    library = kernels("hazards")
    with pytest.raises(InputError, match="is not a file"):
        emulator.build(tmp_path / "absent.cu")
    with pytest.raises(InputError, match="no launcher nonsense"):
        library.call("nonsense")
    with pytest.raises(InputError, match="use one of early, late, random"):
        library.configure(mode="eventually")
    with pytest.raises(InputError, match="must be at least 1"):
        library.configure(resident_ctas=0)
    with pytest.raises(EmulatorError, match="has no room"):
        library.allocate(1 << 40)


def test_missing_compiler_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    emulator.compiler.cache_clear()
    try:
        with pytest.raises(UnsupportedError, match=r"apt install g\+\+"):
            emulator.compiler()
    finally:
        emulator.compiler.cache_clear()


def test_generated_header_is_current(tmp_path: Path) -> None:
    shutil.copy(emulator.CSRC / "generate_wgmma.py", tmp_path)
    subprocess.run([sys.executable, str(tmp_path / "generate_wgmma.py")], check=True)
    committed = (emulator.CSRC / "ptx_wgmma.cuh").read_text(encoding="utf-8")
    assert (tmp_path / "ptx_wgmma.cuh").read_text(encoding="utf-8") == committed
