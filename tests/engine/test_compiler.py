"""Where torch.compile lacks something, models run uncompiled."""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tokenmill.engine.vllm import compiler

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
FLAT = VERSION.replace(".", "")
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


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A distribution's own Python with a compiler but without headers; where Python.h would lie."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name == "g++" else None)
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: {"ID": "debian"})
    monkeypatch.setattr(Path, "resolve", lambda path: Path(f"/usr/bin/python{VERSION}"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path


def test_headers_and_a_compiler_are_asked_for(monkeypatch: pytest.MonkeyPatch, bare: Path) -> None:
    lack = compiler.why_not()
    assert str(lack) == "the headers of this Python are not installed; remedy: apt-get install python3-dev"
    (bare / "Python.h").touch()
    assert compiler.why_not() is None
    monkeypatch.setenv("CXX", "no-compiler")
    assert str(compiler.why_not()) == (
        "the C++ compiler no-compiler that CXX names is not installed; "
        "remedy: let CXX name an installed compiler, or unset it"
    )
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert str(compiler.why_not()) == "the C++ compiler g++ is not installed; remedy: apt-get install g++"


@pytest.mark.parametrize(
    ("release", "default", "remedy"),
    [
        ({"ID": "ubuntu", "ID_LIKE": "debian"}, VERSION, "apt-get install python3-dev"),
        ({"ID": "debian"}, "3.1", f"apt-get install python{VERSION}-dev"),
        ({"ID": "rocky", "ID_LIKE": "rhel centos fedora"}, "3.1", f"dnf install python{VERSION}-devel"),
        ({"ID": "opensuse-leap", "ID_LIKE": "suse opensuse"}, "3.1", f"zypper install python{FLAT}-devel"),
        ({"ID": "other"}, VERSION, "install the headers of this Python, often a package named python3-dev"),
    ],
)
def test_the_remedy_is_the_distributions(
    release: dict[str, str], default: str, remedy: str, monkeypatch: pytest.MonkeyPatch, bare: Path
) -> None:
    """Another Python than the distribution's default one needs the package that has its number."""
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: release)
    monkeypatch.setattr(Path, "resolve", lambda path: Path(f"/usr/bin/python{default}"))
    lack = compiler.why_not()
    assert lack is not None
    assert lack.remedy.startswith(remedy)


def test_no_package_is_named_for_a_python_that_is_not_of_the_distribution(
    monkeypatch: pytest.MonkeyPatch, bare: Path
) -> None:
    monkeypatch.setattr(sys, "base_prefix", "/opt/python")
    lack = compiler.why_not()
    assert lack is not None
    assert lack.remedy == "install the Python in /opt/python with its headers"


def test_an_unknown_system_gets_general_words(monkeypatch: pytest.MonkeyPatch, bare: Path) -> None:
    def none() -> dict[str, str]:
        raise OSError

    monkeypatch.setattr(platform, "freedesktop_os_release", none)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert str(compiler.why_not()) == "the C++ compiler g++ is not installed; remedy: install the C++ compiler g++"


def test_what_was_announced_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_UNCOMPILED", "")  # so that it is gone afterwards
    assert compiler.announced() is None
    compiler.announce(compiler.Uncompiled("why", "how"))
    assert compiler.announced() == {"reason": "why", "remedy": "how"}
    compiler.announce(None)
    assert compiler.announced() is None
    for nonsense in ("{", "[]", '{"reason": 3}'):
        monkeypatch.setenv("TOKENMILL_UNCOMPILED", nonsense)
        assert compiler.announced() is None


@pytest.mark.parametrize("when", ["early", "late"])
def test_disabled_needs_no_compiler(when: str, tmp_path: Path) -> None:
    environment = {**os.environ, "CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    environment.pop("TORCH_COMPILE_DISABLE", None)
    subprocess.run([sys.executable, "-c", PROBE, when], env=environment, check=True, timeout=120)
