"""The stand-in for libnuma, which the setup makes where it is not installed, is enough for vLLM's CPU build."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tokenmill import platform

ROOT = Path(__file__).resolve().parents[1]
#: `_C` is the build for the newest processors, `_C_AVX2` the one for the others.
LOAD = """
import ctypes, sys
stand_in = ctypes.CDLL(sys.argv[1])
assert stand_in.numa_available() == -1
import torch
ctypes.CDLL(sys.argv[2])
loaded = {line.split()[-1] for line in open("/proc/self/maps") if "libnuma" in line}
assert loaded - {sys.prefix + "/lib/libnuma.so.1"} == {sys.argv[1]}, loaded  # the setup may have made one, too
"""


@pytest.mark.parametrize("build", ["_C", "_C_AVX2"])
def test_vllm_loads_with_it(build: str, tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    found = importlib.util.find_spec("vllm")
    if compiler is None or found is None or not found.submodule_search_locations:
        pytest.skip("needs a C++ compiler and vLLM's CPU build")
    extension = next(Path(found.submodule_search_locations[0]).glob(f"{build}.*so"), None)
    if extension is None:
        pytest.skip(f"this vLLM has no {build}")
    if build == "_C" and "avx512f" not in platform.cpu_flags():
        pytest.skip("loading it runs instructions that this processor lacks")
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from bootstrap import libnuma_command
    finally:
        sys.path.pop(0)
    library = tmp_path / "libnuma.so.1"
    subprocess.run(libnuma_command(compiler, library), check=True)
    # Every symbol is looked up at once: one that the stand-in lacks would be found missing here.
    environment = {**os.environ, "LD_BIND_NOW": "1"}
    answer = subprocess.run(
        [sys.executable, "-c", LOAD, str(library), str(extension)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
