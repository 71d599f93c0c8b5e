"""Builds the native library `tokenmill/_C.abi3.so` from csrc/ with a C++ compiler, ninja and, if present, nvcc.

Standard library only: setup.py runs this before anything is installed. `tokenmill build` runs it in place.

Sources are found by their names, so a new op edits no shared file:

    csrc/binding.cpp                    defines the library and says what it was built with
    csrc/<op>/binding*.cpp              the op's torch schema and CPU registration (stable ABI)
    csrc/<op>/binding_cuda*.cpp         its CUDA registration; compiled only with nvcc
    csrc/<op>/cpu*.cpp                  CPU kernels without torch; a name that ends in an instruction-set level
                                        (cpu_avx2, cpu_w4a8_avx512_vnni, ...) is compiled for that level
    csrc/<op>/*.cu                      CUDA kernels behind extern "C" launchers; sm90.cu and *_sm90.cu for sm_90a
                                        only, sm100 likewise, others for both

A file may say more in its first lines: `// build: arch=80,89,90a` or `// build: flags=-fno-math-errno`.
A folder without any binding*.cpp (csrc/emulator) is not an op and is left alone.
"""

import argparse
import fcntl
import importlib.metadata
import importlib.util
import json
import os
import platform as machine
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tokenmill import env, platform
from tokenmill.errors import ConfigurationError, UnsupportedError

PACKAGE = Path(__file__).resolve().parent
CSRC = (PACKAGE / "csrc").resolve()
LIBRARY_NAME = "_C.abi3.so"
#: The oldest torch whose stable ABI the library uses, as a version and as torch's header macro.
OLDEST_TORCH = (2, 11)
TORCH_TARGET = "0x020b000000000000"
#: sm_100a first came with this release.
OLDEST_NVCC = (12, 8)
DEFAULT_ARCHITECTURES = ("90a", "100a")

#: Compiler flags of each instruction-set level of `env.ISA_LEVELS`.
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
_AVX512_BF16 = (*_AVX512, "-mavx512vnni", "-mavx512bf16")
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "avx2": _AVX2,
    "avx_vnni": (*_AVX2, "-mavxvnni"),
    "avx512": _AVX512,
    "avx512_vnni": (*_AVX512, "-mavx512vnni"),
    "avx512_bf16": _AVX512_BF16,
    "amx": (*_AVX512_BF16, "-mbmi2", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
}

_DIRECTIVE = re.compile(r"^//\s*build:\s*(arch|flags)=(.*\S)\s*$")


class NinjaFile:
    """Collects rules and edges of a build.ninja; `save` touches the file only when its text changed."""

    def __init__(self) -> None:
        self._lines = ["ninja_required_version = 1.8"]

    def rule(self, name: str, command: str, description: str, *, depfile: bool = False) -> None:
        """One command with `$in`, `$out` and `$flags`; `depfile`: it writes gcc-style `$out.d`."""
        self._lines += [f"rule {name}", f"  command = {command}", f"  description = {description}"]
        if depfile:
            self._lines += ["  depfile = $out.d", "  deps = gcc"]

    def edge(self, output: Path | str, rule: str, inputs: Sequence[Path], *, flags: Sequence[str] = ()) -> None:
        """`output` is made from `inputs` by `rule`."""
        sources = " ".join(_escape(path) for path in inputs)
        self._lines.append(f"build {_escape(output)}: {rule} {sources}")
        if flags:
            self._lines.append(f"  flags = {' '.join(flags)}")

    def save(self, directory: Path) -> None:
        """Writes `directory`/build.ninja."""
        write_if_changed(directory / "build.ninja", "\n".join(self._lines) + "\n")


def _quote(path: Path | str) -> str:
    """A path inside a command of build.ninja, which a shell reads."""
    return shlex.quote(str(path)).replace("$", "$$")


def _escape(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def write_if_changed(path: Path, text: str) -> None:
    """Writes a generated file, and leaves its time alone when nothing changed."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Nvcc:
    """The CUDA compiler: its path, release and the folder with libcudart_static.a and the folder with its headers."""

    path: str
    version: str
    libraries: Path
    headers: Path


@dataclass(frozen=True)
class Toolchain:
    """What builds the library on this machine.

    Attributes:
        cxx: The C++ compiler.
        ninja: The ninja executable.
        torch: The torch package's folder.
        torch_version: Its version.
        nvcc: The CUDA compiler, or None.
        lacks: What the build will not contain and why, one sentence each.
    """

    cxx: str
    ninja: str
    torch: Path
    torch_version: str
    nvcc: Nvcc | None
    lacks: tuple[str, ...]


@dataclass(frozen=True)
class Unit:
    """One source file: the rule that compiles it and its own flags."""

    source: Path
    rule: str
    flags: tuple[str, ...] = field(default=())


def find_toolchain() -> Toolchain:
    """Finds compilers, ninja and torch.

    `TOKENMILL_BUILD=cpu` ignores nvcc; `TOKENMILL_BUILD=cuda` demands it.

    Raises:
        UnsupportedError: Something indispensable is absent; names all of it, with the remedies.
        ConfigurationError: CUDA is demanded and cannot be had.
    """
    missing: dict[str, str] = {}
    cxx = os.environ.get("CXX") or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), "")
    if not cxx or not shutil.which(cxx):
        missing["C++ compiler"] = f"{cxx or 'c++, g++ and clang++'} not found; apt install g++, or set CXX"
    ninja = _find_ninja()
    if ninja is None:
        missing["ninja"] = "not found; pip install ninja"
    torch, torch_version, reason = _find_torch()
    if reason:
        missing["torch"] = reason
    if missing or ninja is None or torch is None:
        raise UnsupportedError("building the native library", missing)
    nvcc, reason = (None, "TOKENMILL_BUILD=cpu asks for none") if env.BUILD.get() == "cpu" else _find_nvcc()
    if nvcc is None and env.BUILD.get() == "cuda":
        raise ConfigurationError(f"TOKENMILL_BUILD=cuda, but {reason}")
    lacks = () if nvcc else (f"no CUDA kernels: {reason}",)
    return Toolchain(cxx, ninja, torch, torch_version, nvcc, lacks)


def _find_ninja() -> str | None:
    """The executable of the ninja package beside this Python, else the one on PATH."""
    beside = Path(sysconfig.get_path("scripts")) / "ninja"
    return str(beside) if beside.exists() else shutil.which("ninja")


def _find_torch() -> tuple[Path | None, str, str]:
    """Torch's folder and version without importing it, or the reason why it will not do."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None, "", "not installed; pip install torch, then install with --no-build-isolation"
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        return None, version, f"{version} is older than 2.11; pip install 'torch>=2.11'"
    return Path(spec.submodule_search_locations[0]), version, ""


def _find_nvcc() -> tuple[Nvcc | None, str]:
    """The CUDA compiler, or the reason why there is none that will do."""
    oldest = ".".join(map(str, OLDEST_NVCC))
    remedy = f"install the CUDA toolkit {oldest} or newer and set CUDA_HOME"
    path, version = platform.nvcc(), platform.nvcc_version()
    if path is None:
        return None, f"nvcc is neither in CUDA_HOME nor on PATH; {remedy}"
    if version is None:
        return None, f"{path} does not answer to --version; {remedy}"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_NVCC:
        return None, f"nvcc {version} cannot compile for sm_100a; {remedy}"
    # nvcc may be a wrapper script far from its toolkit, so it is asked where that is.
    answer = subprocess.run(
        [path, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull], capture_output=True, text=True, check=False
    )
    top = re.search(r"^#\$ TOP=(.+)$", answer.stderr + answer.stdout, re.MULTILINE)
    root = Path(top.group(1).strip()).resolve() if top else Path(path).resolve().parent.parent
    target = f"targets/{machine.machine()}-linux"
    libraries = [root / target / "lib", root / "lib64", root / "lib"]
    headers = [root / target / "include", root / "include"]
    for library in libraries:
        for header in headers:
            if (library / "libcudart_static.a").exists() and (header / "cuda_runtime_api.h").exists():
                return Nvcc(path, version, library, header), ""
    return None, f"no libcudart_static.a or no headers under {root}; {remedy}"


def find_units(csrc: Path, *, cuda: bool) -> list[Unit]:
    """The sources to compile, sorted, each with its rule and its own flags (see the module's docstring)."""
    units = [Unit(csrc / "binding.cpp", "cxx")]
    for folder in sorted({path.parent for path in csrc.glob("*/binding*.cpp")}):
        for path in sorted([*folder.glob("binding*.cpp"), *folder.glob("cpu*.cpp"), *folder.glob("*.cu")]):
            extra = _directives(path)
            flags = tuple(extra.get("flags", "").split())
            if path.suffix == ".cu":
                if cuda:
                    units.append(Unit(path, "nvcc", (*_gencode(path, extra.get("arch")), *flags)))
            elif path.name.startswith("binding_cuda"):
                if cuda:
                    units.append(Unit(path, "cxx_cuda", flags))
            elif path.name.startswith("binding"):
                units.append(Unit(path, "cxx", flags))
            elif isa_of(path) == "plain" or machine.machine() in ("x86_64", "AMD64"):
                units.append(Unit(path, "kernel", (*ISA_FLAGS[isa_of(path)], *flags)))
    return units


def isa_of(path: Path) -> str:
    """The instruction-set level a CPU kernel file is compiled for: the longest that its name ends in."""
    levels = sorted(ISA_FLAGS, key=len, reverse=True)
    return next((level for level in levels if path.stem.endswith(f"_{level}")), "plain")


def _directives(path: Path) -> dict[str, str]:
    with path.open(encoding="utf-8") as lines:
        head = [line for line, _ in zip(lines, range(30), strict=False)]
    return {found.group(1): found.group(2) for found in map(_DIRECTIVE.match, head) if found}


def _gencode(path: Path, override: str | None) -> list[str]:
    architectures: Sequence[str] = DEFAULT_ARCHITECTURES
    if override:
        architectures = [part.strip() for part in override.split(",")]
    elif family := re.search(r"(?:^|_)sm(90|100)$", path.stem):
        architectures = (f"{family.group(1)}a",)
    return [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]


def write_ninja(toolchain: Toolchain, units: Sequence[Unit], csrc: Path, directory: Path) -> None:
    """Writes `directory`/build.ninja and the generated header build_info.h beside it."""
    torch, cxx, sources = _quote(toolchain.torch), _quote(toolchain.cxx), _quote(csrc)
    common = f"-O3 -std=c++20 -fPIC -fvisibility=hidden -Wall -Wextra -ffile-prefix-map={sources}=csrc -I{sources} -I."
    binding = f"-DTORCH_TARGET_VERSION={TORCH_TARGET} -isystem {torch}/include"
    libraries = f"-L{torch}/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -Wl,--as-needed -lpthread -ldl"
    ninja = NinjaFile()
    compile_cxx = f"{cxx} -MMD -MF $out.d {common}"
    ninja.rule("cxx", f"{compile_cxx} {binding} $flags -c $in -o $out", "c++ $in", depfile=True)
    # GCC warns about the deliberately undefined values inside its own AVX-512 header (GCC bug 105593).
    quiet = "" if "clang" in _compiler_version(toolchain.cxx) else "-Wno-maybe-uninitialized -Wno-uninitialized"
    ninja.rule("kernel", f"{compile_cxx} {quiet} $flags -c $in -o $out", "c++ $in", depfile=True)
    if toolchain.nvcc:
        nvcc, headers = _quote(toolchain.nvcc.path), _quote(toolchain.nvcc.headers)
        cuda = f"-isystem {headers} -DUSE_CUDA"
        ninja.rule("cxx_cuda", f"{compile_cxx} {binding} {cuda} $flags -c $in -o $out", "c++ $in", depfile=True)
        ninja.rule(
            "nvcc",
            f"{nvcc} -ccbin {cxx} -MMD -MF $out.d -O3 -std=c++20 "
            f"-Xcompiler=-fPIC,-fvisibility=hidden -I{sources} -I. $flags -c $in -o $out",
            "nvcc $in",
            depfile=True,
        )
        libraries += f" -L{_quote(toolchain.nvcc.libraries)} -lcudart_static -lrt"
    # Strip: the symbol table is two thirds of the file. Hide what comes from archives: another cudart may be loaded.
    ninja.rule("link", f"{cxx} -shared -o $out $in -Wl,--exclude-libs,ALL {libraries} -s", "link $out")
    objects = []
    for unit in units:
        objects.append(Path(str(unit.source.relative_to(csrc)).replace("/", "__") + ".o"))
        ninja.edge(objects[-1], unit.rule, [unit.source], flags=unit.flags)
    ninja.edge(LIBRARY_NAME, "link", objects)
    write_if_changed(directory / "build_info.h", _build_info(toolchain, units))
    ninja.save(directory)


def _build_info(toolchain: Toolchain, units: Sequence[Unit]) -> str:
    flags = " ".join(flag for unit in units for flag in unit.flags)
    info = {
        "cuda": toolchain.nvcc.version if toolchain.nvcc else None,
        "cuda_architectures": sorted(set(re.findall(r"code=(sm_\w+)", flags))),
        "lacks": toolchain.lacks,
        "compiler": _compiler_version(toolchain.cxx),
        "torch": toolchain.torch_version,
        "isa": [level for level in ISA_FLAGS if any(u.rule == "kernel" and isa_of(u.source) == level for u in units)],
    }
    return f'// Generated by tokenmill/native_build.py.\n#define TOKENMILL_BUILD_INFO R"json({json.dumps(info)})json"\n'


def _compiler_version(cxx: str) -> str:
    """The compiler's own name for itself, one line."""
    answer = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=False).stdout
    return answer.splitlines()[0] if answer else cxx


def run_ninja(ninja: str, directory: Path, *, verbose: bool = False) -> None:
    """Brings `directory` up to date; ConfigurationError with the compiler's own words when it fails."""
    command = [ninja, "-C", str(directory), f"-j{platform.physical_cores()}", *(["-v"] if verbose else [])]
    answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    sys.stdout.write(answer.stdout)
    sys.stdout.flush()
    if answer.returncode:
        raise ConfigurationError(
            f"the native build failed with status {answer.returncode} (the compiler's messages are above); "
            "TOKENMILL_BUILD=cpu leaves CUDA out"
        )


@contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """Two builds in one folder would write the same objects."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def work_directory() -> Path:
    """Where objects are kept between builds: build/native of a checkout, else the cache folder."""
    root = PACKAGE.parent
    return root / "build" / "native" if (root / "pyproject.toml").exists() else env.CACHE.get() / "native-build"


def build(output: Path, *, csrc: Path = CSRC, directory: Path | None = None, verbose: bool = False) -> Toolchain:
    """Builds what changed and puts the library at `output`; returns what it was built with.

    Args:
        output: The file to write; replaced in one step, so that a process that has it loaded is not disturbed.
        csrc: The sources.
        directory: Where objects are kept; default `work_directory()`.
        verbose: Print every command.

    Raises:
        UnsupportedError: A compiler, ninja or torch is absent.
        ConfigurationError: The compilation failed, or CUDA was demanded and cannot be had.
    """
    toolchain = find_toolchain()
    directory = (directory or work_directory()).resolve()
    with _only_one(directory):
        write_ninja(toolchain, find_units(csrc, cuda=toolchain.nvcc is not None), csrc, directory)
        run_ninja(toolchain.ninja, directory, verbose=verbose)
        fresh = directory / LIBRARY_NAME
        if not output.exists() or output.stat().st_mtime_ns != fresh.stat().st_mtime_ns:
            output.parent.mkdir(parents=True, exist_ok=True)
            temporary = output.with_suffix(f".{os.getpid()}")
            shutil.copy2(fresh, temporary)
            temporary.replace(output)
    return toolchain


def describe(toolchain: Toolchain) -> str:
    """One line for people: what the library holds and what it lacks."""
    cuda = f"CUDA {toolchain.nvcc.version}" if toolchain.nvcc else "; ".join(toolchain.lacks)
    return f"native library for torch >= 2.11 built with torch {toolchain.torch_version}, {toolchain.cxx}; {cuda}"


def main(argv: Sequence[str] | None = None) -> int:
    """`tokenmill build`: compiles the native library in place, only what changed."""
    parser = argparse.ArgumentParser(prog="tokenmill build", description=main.__doc__)
    parser.add_argument("-v", "--verbose", action="store_true", help="print every compiler command")
    options = parser.parse_args(argv)
    toolchain = build(PACKAGE / LIBRARY_NAME, verbose=options.verbose)
    print(describe(toolchain))
    return 0


if __name__ == "__main__":
    sys.exit(main())
