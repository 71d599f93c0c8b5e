"""The sdist, the wheel and an editable install hold everything, run in an empty environment and say what they lack."""

import json
import os
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.packaging.packages import LAYERS, Built, source_files

#: Calls the first op in the environment it runs in and prints what it found there.
PROBE = """
import importlib.metadata, json, pathlib
import tokenmill
from tokenmill.kernels import extension, registry
from tokenmill.kernels.spec_verify.op import GREEDY, spec_verify_greedy
arguments = GREEDY.inputs_for(GREEDY.problem())
explained = registry.explain(GREEDY, GREEDY.problem())
result = spec_verify_greedy(**arguments)
entry_points = importlib.metadata.distribution("tokenmill").entry_points
print(json.dumps({
    "package": str(pathlib.Path(tokenmill.__file__).parent),
    "chosen": explained.chosen,
    "refusals": dict(explained.refusals),
    "right": result.equal(spec_verify_greedy(**arguments, implementation="reference")),
    "build": extension.build_info(),
    "cuda_op": extension.why_not("spec_verify_greedy_cuda"),
    "plugins": {e.name: callable(e.load()) for e in entry_points if e.group == "vllm.general_plugins"},
    "emulator": (pathlib.Path(tokenmill.__file__).parent / "csrc" / "ptx.cuh").exists(),
}))
"""


def probe(python: Path, elsewhere: Path) -> dict[str, Any]:
    """Runs PROBE with that Python, far from the checkout."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    answer = subprocess.run(
        [str(python), "-c", PROBE], capture_output=True, text=True, check=False, cwd=elsewhere, env=clean
    )
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    assert isinstance(found, dict)
    return found


def test_the_sdist_holds_every_source_file_and_no_link(sdist: Path, source_tree: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert not [member.name for member in members if member.issym() or member.islnk()]
    names = {member.name.partition("/")[2] for member in members if member.isfile()}
    assert source_files(source_tree) <= names
    assert {"pyproject.toml", "setup.py", "README.md"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc")) or name.startswith("tests/")]


def test_one_wheel_serves_every_python(cpu_wheel: Built) -> None:
    """By its tag, and in truth: the library asks nothing of Python, so no version of it can matter."""
    assert "-cp311-abi3-linux_" in cpu_wheel.wheel.name


def test_the_wheel_holds_exactly_the_sources_and_the_library(cpu_wheel: Built, source_tree: Path) -> None:
    with zipfile.ZipFile(cpu_wheel.wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == source_files(source_tree) | {"tokenmill/_C.abi3.so"}
    assert {name.split("/")[1] for name in names} >= set(LAYERS) & {
        path.name for path in source_tree.iterdir() if any_file(path)
    }


def any_file(folder: Path) -> bool:
    return folder.is_dir() and any(path.is_file() for path in folder.rglob("*"))


def test_the_library_needs_no_python_symbol(cpu_wheel: Built, tmp_path: Path) -> None:
    with zipfile.ZipFile(cpu_wheel.wheel) as archive:
        library = archive.extract("tokenmill/_C.abi3.so", tmp_path)
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert "torch_library_impl" in symbols
    assert not [symbol for symbol in symbols if symbol.startswith(("Py", "_Py"))]


def test_a_build_without_nvcc_says_what_it_lacks(cpu_wheel: Built) -> None:
    said = [line for line in cpu_wheel.output.splitlines() if "tokenmill: native library" in line]
    assert len(said) == 1
    assert "no CUDA kernels: nvcc is neither in CUDA_HOME nor on PATH; install the CUDA toolkit 12.8" in said[0]


def test_the_wheel_runs_in_an_empty_environment(
    cpu_wheel: Built, empty_environment: Callable[..., Path], tmp_path: Path
) -> None:
    python = empty_environment(str(cpu_wheel.wheel))
    found = probe(python, tmp_path)
    assert Path(found["package"]).is_relative_to(tmp_path)
    assert (found["chosen"], found["right"], found["emulator"]) == ("cpu", True, True)
    assert found["plugins"] == {"tokenmill": True}
    assert found["build"]["cuda"] is None
    assert found["cuda_op"] == f"the native library has {found['build']['lacks'][0]}"
    command = subprocess.run([python.parent / "tokenmill", "--version"], capture_output=True, text=True, check=True)
    assert command.stdout.startswith("tokenmill ")


def test_without_a_compiler_it_installs_as_pure_python(
    pure_wheel: Built, empty_environment: Callable[..., Path], tmp_path: Path
) -> None:
    assert pure_wheel.wheel.name.endswith("-py3-none-any.whl")
    said = {line.strip() for line in pure_wheel.output.splitlines() if "without native kernels" in line}
    assert len(said) == 1
    assert "C++ compiler: c++, g++ and clang++ not found; apt install g++, or set CXX" in said.pop()
    found = probe(empty_environment(str(pure_wheel.wheel)), tmp_path)
    assert (found["chosen"], found["right"], found["build"]) == ("reference", True, {})
    assert "is not built; install a C++ compiler and ninja" in found["refusals"]["cpu"]
    assert found["plugins"] == {"tokenmill": True}


def test_an_editable_install_builds_in_place(
    source_tree: Path, compilers_only: Path, empty_environment: Callable[..., Path], tmp_path: Path
) -> None:
    checkout = tmp_path / "checkout"
    shutil.copytree(source_tree, checkout, symlinks=True)
    # One op is enough to see where the library goes; all of them compile for the wheel.
    for folder in {path.parent for path in (checkout / "csrc").glob("*/binding*.cpp")} - {
        checkout / "csrc/spec_verify"
    }:
        shutil.rmtree(folder)
    kept = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH", "CXX")}
    python = empty_environment("--editable", str(checkout), environment={**kept, "PATH": str(compilers_only)})
    found = probe(python, tmp_path)
    assert Path(found["package"]).resolve() == (checkout / "tokenmill").resolve()
    assert (found["chosen"], found["right"]) == ("cpu", True), found["refusals"]
    assert (checkout / "tokenmill" / "_C.abi3.so").exists()
