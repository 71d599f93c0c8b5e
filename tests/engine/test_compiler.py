"""Where torch.compile lacks something, models run uncompiled."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tokenmill.engine.vllm import compiler

#: Doubles a number through torch.compile, which would write C++; `early` and `late`: before or after torch has asked.
PROBE = """
import os, sys
from tokenmill.engine.vllm import compiler
if sys.argv[1] == "early":
    compiler.disable()
import torch, torch._dynamo.config
if sys.argv[1] == "late":
    compiler.disable()
compiled = torch.compile(lambda x: x * 2)
assert compiled(torch.ones(3)).tolist() == [2, 2, 2]
assert torch._dynamo.config.disable
assert os.environ["TORCH_COMPILE_DISABLE"] == "1"
"""


def test_headers_and_a_compiler_are_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("CXX", sys.executable)
    assert compiler.why_not() == (
        "the headers of this Python are not installed; on Debian or Ubuntu: apt-get install python3-dev"
    )
    (tmp_path / "Python.h").touch()
    assert compiler.why_not() is None
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    reason = compiler.why_not()
    assert reason is not None
    assert reason.startswith(f"the C++ compiler {tmp_path}/no-compiler is not installed")


@pytest.mark.parametrize("when", ["early", "late"])
def test_disabled_needs_no_compiler(when: str, tmp_path: Path) -> None:
    environment = {**os.environ, "CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    environment.pop("TORCH_COMPILE_DISABLE", None)
    subprocess.run([sys.executable, "-c", PROBE, when], env=environment, check=True, timeout=120)
