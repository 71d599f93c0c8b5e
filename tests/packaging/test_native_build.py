"""The build finds sources by their names, compiles each for what its name says and rebuilds only what changed."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tokenmill import env, native_build, platform
from tokenmill.errors import ConfigurationError, UnsupportedError
from tokenmill.kernels import extension

BINDING = """
#include <torch/csrc/stable/library.h>
#include "build_info.h"
int tiny();
const char* info() { return TOKENMILL_BUILD_INFO; }
STABLE_TORCH_LIBRARY(tokenmill_tiny, m) { m.def("tiny(Tensor x) -> ()"); }
"""
KERNEL = """
#include <cuda_runtime.h>
#include "shared.cuh"
__global__ void NAME_kernel(float* x) { x[threadIdx.x] = VALUE; }
extern "C" int NAME(float* x, cudaStream_t stream) { NAME_kernel<<<1, 32, 0, stream>>>(x); return cudaGetLastError(); }
"""


def write_tree(folder: Path) -> Path:
    """A csrc of one small op with every kind of file."""
    op = folder / "tiny"
    (folder / "emulator").mkdir(parents=True)
    op.mkdir()
    (folder / "binding.cpp").write_text(BINDING)
    (folder / "shared.cuh").write_text("#define VALUE 1.0f\n")
    (folder / "emulator" / "machine.cpp").write_text("#error the emulator is not part of the library\n")
    (op / "binding.cpp").write_text('#include "tiny/cpu.h"\nint tiny() { return tiny_plain() + tiny_avx2(); }\n')
    (op / "cpu.h").write_text("int tiny_plain();\nint tiny_avx2();\n")
    (op / "cpu.cpp").write_text('#include "tiny/cpu.h"\nint tiny_plain() { return 1; }\n')
    (op / "cpu_avx2.cpp").write_text(
        '// build: flags=-DTINY=2\n#include "tiny/cpu.h"\n#ifndef __AVX2__\n#error\n#endif\n'
        "int tiny_avx2() { return TINY; }\n"
    )
    (op / "binding_cuda.cpp").write_text('#include <cuda_runtime_api.h>\nextern "C" int first(float*, cudaStream_t);\n')
    (op / "first.cu").write_text(KERNEL.replace("NAME", "first"))
    (op / "second_sm90.cu").write_text(
        KERNEL.replace("NAME", "second").replace('#include "shared.cuh"', "").replace("VALUE", "2.0f")
    )
    return folder


def steps(output: str) -> list[str]:
    """The files that ninja made, from its lines `[1/3] c++ /path/file` (quoted where the path has spaces)."""
    return sorted(Path(line.split()[-1].strip("'")).name for line in output.splitlines() if line.startswith("["))


def test_sources_are_found_by_name(tmp_path: Path) -> None:
    csrc = write_tree(tmp_path)
    units = {str(unit.source.relative_to(csrc)): unit for unit in native_build.find_units(csrc, cuda=True)}
    rules = {name: unit.rule for name, unit in units.items()}
    assert rules == {
        "binding.cpp": "cxx",
        "tiny/binding.cpp": "cxx",
        "tiny/binding_cuda.cpp": "cxx_cuda",
        "tiny/cpu.cpp": "kernel",
        "tiny/cpu_avx2.cpp": "kernel",
        "tiny/first.cu": "nvcc",
        "tiny/second_sm90.cu": "nvcc",
    }
    assert units["tiny/cpu.cpp"].flags == ()
    assert units["tiny/cpu_avx2.cpp"].flags == (*native_build.ISA_FLAGS["avx2"], "-DTINY=2")
    without = {str(unit.source.relative_to(csrc)) for unit in native_build.find_units(csrc, cuda=False)}
    assert without == {name for name, rule in rules.items() if rule not in ("cxx_cuda", "nvcc")}


@pytest.mark.parametrize(
    ("name", "first_line", "architectures"),
    [
        ("gemm.cu", "", ["90a", "100a"]),
        ("sm90.cu", "", ["90a"]),
        ("gemm_sm100.cu", "", ["100a"]),
        ("mma_sync.cu", "// build: arch=80, 89,90,120", ["80", "89", "90", "120"]),
        ("chasm90.cu", "", ["90a", "100a"]),
    ],
)
def test_architectures_of_a_cuda_file(tmp_path: Path, name: str, first_line: str, architectures: list[str]) -> None:
    csrc = write_tree(tmp_path)
    (csrc / "tiny" / name).write_text(f"{first_line}\nint x;\n")
    (unit,) = (unit for unit in native_build.find_units(csrc, cuda=True) if unit.source.name == name)
    assert list(unit.flags) == [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("cpu.cpp", "plain"),
        ("cpu_avx2.cpp", "avx2"),
        ("cpu_w4a8_avx512_vnni.cpp", "avx512_vnni"),
        ("cpu_avx_vnni.cpp", "avx_vnni"),
        ("cpu_avx512_bf16.cpp", "avx512_bf16"),
        ("cpu_pack.cpp", "plain"),
    ],
)
def test_instruction_set_of_a_cpu_file(name: str, level: str) -> None:
    assert native_build.isa_of(Path(name)) == level


def test_every_instruction_set_has_flags() -> None:
    assert tuple(native_build.ISA_FLAGS) == env.ISA_LEVELS


def test_objects_of_wider_instruction_sets_share_no_function() -> None:
    """A weak function compiled for AVX-512 could be the copy the linker keeps for a processor without it."""
    objects = list(native_build.work_directory().glob("*__cpu_*.o"))
    if not objects:
        pytest.skip("the library was not compiled in this checkout")
    for path in objects:
        listed = subprocess.run(["nm", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        weak = [line.split()[-1] for line in listed.splitlines() if line.split()[-2] in "WVu"]
        assert weak == [], path.name


def test_rebuilds_only_what_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    csrc, output, directory = write_tree(tmp_path / "c src"), tmp_path / "lib" / "_C.abi3.so", tmp_path / "objects"
    monkeypatch.setenv(env.BUILD.name, "cpu")
    assert "TOKENMILL_BUILD=cpu" in native_build.describe(native_build.build(output, csrc=csrc, directory=directory))
    everything = ["_C.abi3.so", "binding.cpp", "binding.cpp", "cpu.cpp", "cpu_avx2.cpp"]
    assert steps(capsys.readouterr().out) == everything
    first = output.read_bytes()

    native_build.build(output, csrc=csrc, directory=directory)
    assert steps(capsys.readouterr().out) == []

    (csrc / "tiny" / "cpu_avx2.cpp").touch()
    native_build.build(output, csrc=csrc, directory=directory)
    assert steps(capsys.readouterr().out) == ["_C.abi3.so", "cpu_avx2.cpp"]
    assert output.read_bytes() == first

    (csrc / "tiny" / "cpu.h").touch()
    native_build.build(output, csrc=csrc, directory=directory)
    assert steps(capsys.readouterr().out) == ["_C.abi3.so", "binding.cpp", "cpu.cpp", "cpu_avx2.cpp"]

    (csrc / "tiny" / "cpu.cpp").write_text("int tiny_plain( {\n")
    with pytest.raises(ConfigurationError, match="the native build failed"):
        native_build.build(output, csrc=csrc, directory=directory)
    assert "cpu.cpp" in capsys.readouterr().out
    assert output.read_bytes() == first


@pytest.mark.skipif(platform.nvcc() is None, reason="needs nvcc")
def test_touching_one_cuda_file_rebuilds_one_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    csrc, output, directory = write_tree(tmp_path / "c src"), tmp_path / "_C.abi3.so", tmp_path / "objects"
    monkeypatch.setenv(env.BUILD.name, "cuda")
    toolchain = native_build.build(output, csrc=csrc, directory=directory)
    assert toolchain.lacks == ()
    assert {"first.cu", "second_sm90.cu", "binding_cuda.cpp"} <= set(steps(capsys.readouterr().out))
    for changed, rebuilt in (
        ("tiny/second_sm90.cu", "second_sm90.cu"),
        ("tiny/first.cu", "first.cu"),
        ("shared.cuh", "first.cu"),
    ):
        (csrc / changed).touch()
        native_build.build(output, csrc=csrc, directory=directory)
        assert steps(capsys.readouterr().out) == ["_C.abi3.so", rebuilt]


def test_a_missing_compiler_and_ninja_are_named_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native_build, "_find_ninja", lambda: None)
    with pytest.raises(UnsupportedError, match=r"C\+\+ compiler: .*apt install g\+\+.*; ninja: .*pip install ninja"):
        native_build.find_toolchain()


def test_a_compiler_that_is_named_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UnsupportedError, match="no-such-compiler not found"):
        native_build.find_toolchain()


def test_demanded_cuda_is_an_error_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.BUILD.name, "cuda")
    monkeypatch.setattr(platform, "nvcc", lambda: None)
    with pytest.raises(ConfigurationError, match="TOKENMILL_BUILD=cuda, but nvcc is neither in CUDA_HOME nor on PATH"):
        native_build.find_toolchain()


@pytest.mark.parametrize(
    ("version", "reason"), [("12.4.131", "nvcc 12.4.131 cannot compile for sm_100a"), (None, "does not answer")]
)
def test_an_nvcc_that_will_not_do_means_a_cpu_build_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, version: str | None, reason: str
) -> None:
    monkeypatch.setenv(env.BUILD.name, "auto")
    monkeypatch.setattr(platform, "nvcc", lambda: "nvcc")
    monkeypatch.setattr(platform, "nvcc_version", lambda: version)
    toolchain = native_build.find_toolchain()
    assert toolchain.nvcc is None
    assert reason in toolchain.lacks[0]
    assert toolchain.lacks[0].startswith("no CUDA kernels: ")


def test_an_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_build.importlib.metadata, "version", lambda name: "2.9.1+cu126")
    with pytest.raises(
        UnsupportedError, match=r"torch: 2\.9\.1\+cu126 is older than 2\.11; pip install 'torch>=2\.11'"
    ):
        native_build.find_toolchain()


def test_paths_with_spaces_are_escaped(tmp_path: Path) -> None:
    ninja = native_build.NinjaFile()
    ninja.rule("copy", "cp $in $out", "copy $in")
    ninja.edge(Path("out put"), "copy", [tmp_path / "in $put: 1"])
    ninja.save(tmp_path)
    text = (tmp_path / "build.ninja").read_text()
    assert "build out$ put: copy" in text
    assert "in$ $$put$:$ 1" in text


def test_the_loaded_library_is_that_of_this_source_tree() -> None:
    assert extension.LIBRARY == native_build.PACKAGE / native_build.LIBRARY_NAME
    assert shutil.which(native_build.find_toolchain().ninja)
