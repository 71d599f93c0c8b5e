"""Runs CUDA kernels on the CPU: builds csrc sources against the emulator and drives the result from Python.

    library = EmulatedLibrary(build(Path("scale.cu")))
    library.configure(seed=7, mode="late")
    y = torch.full_like(x, float("nan"))
    library.run("my_scale", x, y, x.numel())          # launcher, tensors, numbers; raises with the emulator's reports

A source includes `ptx.cuh` and `launch.cuh` and has `extern "C" int my_scale(const float*, float*, int, Stream)`.
docs/emulator.md explains what is modelled and how to read reports. Timings here say nothing about a GPU.
"""

import ctypes
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenmill
from tokenmill import env, platform
from tokenmill.errors import ConfigurationError, InputError, TokenmillError, UnsupportedError

logger = logging.getLogger(__name__)

CSRC = (Path(tokenmill.__file__).parent / "csrc").resolve()
#: When an asynchronous operation moves its data: at its issue, at the wait for it, or at a random moment between.
ASYNC_MODES = ("early", "late", "random")

# The emulator computes what the device would; it must not depend on what this processor could do beyond that.
_COMMON = (
    *("-O2", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    *("-mavx2", "-mfma", "-mf16c", "-DTOKENMILL_EMULATED"),
)
_RUNTIME = (*_COMMON, "-std=c++17", "-ffp-contract=off")
# -fsanitize=thread makes every load and store a call, which the emulator answers. Nothing may move or share the
# variables that stand for registers, accesses must stay one per element, and a call must return to its source line.
_KERNEL = (
    *_COMMON,
    "-std=c++20",
    "-g",
    "-gdwarf-4",
    "-fsanitize=thread",
    "-fno-tree-vectorize",
    "-fno-optimize-sibling-calls",
)
# Copies that the compiler expands itself would go unseen.
_MEMORY_CALLS = ("-fno-builtin-memcpy", "-fno-builtin-memmove", "-fno-builtin-memset")
_KERNEL_GCC = (
    "-Wno-psabi",
    "-fstack-reuse=none",
    *("--param", "tsan-instrument-func-entry-exit=0", "--param", "tsan-distinguish-volatile=1"),
)
_KERNEL_CLANG = (
    "-fno-slp-vectorize",
    *("-mllvm", "-no-stack-coloring", "-mllvm", "-tsan-instrument-func-entry-exit=0"),
    *("-mllvm", "-tsan-distinguish-volatile=1"),
)
_STATISTICS = ("switches", "collectives", "accesses", "cells", "async_operations", "warp_wgmmas", "barriers")


class EmulatorError(TokenmillError):
    """A kernel broke a rule of the hardware, or its launcher refused; the text is the emulator's reports."""


# ---- building --------------------------------------------------------------------------------------------------------


@functools.cache
def compiler() -> str:
    """Path of the C++ compiler: CXX, else g++, else clang++.

    Raises:
        UnsupportedError: There is none, or this is no x86-64 machine with AVX2.
    """
    if "avx2" not in platform.cpu_flags():
        raise UnsupportedError("emulating CUDA kernels", {"processor": "it needs x86-64 with AVX2, FMA and F16C"})
    for name in (os.environ.get("CXX", ""), "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise UnsupportedError("emulating CUDA kernels", {"C++ compiler": "none found; apt install g++, or set CXX"})


@functools.cache
def _is_clang(cxx: str) -> bool:
    answer = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=False)
    return "clang" in answer.stdout


def _digest(*parts: bytes) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little") + part)
    return state.hexdigest()[:20]


@functools.cache
def _compiler_identity(cxx: str) -> bytes:
    return subprocess.run([cxx, "-v"], capture_output=True, check=False).stderr


def _compile(command: Sequence[str], what: str) -> None:
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        head = "\n".join(answer.stderr.strip().splitlines()[:30])
        raise InputError(f"{what} does not compile for the emulator:\n{head}")


@contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """Several processes may want the same build at the same time: the others wait for the first."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = (directory / ".lock").open("w")
    except OSError as error:
        raise ConfigurationError(f"{directory} cannot be written ({error}); set TOKENMILL_CACHE") from None
    with handle as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build_runtime() -> Path:
    """The emulator itself as an object file in the cache; compiled when its sources or the compiler have changed.

    Raises:
        UnsupportedError: No C++ compiler.
        ConfigurationError: The cache cannot be written.
    """
    cxx = compiler()
    files = sorted([*(CSRC / "emulator").glob("*.cpp"), *(CSRC / "emulator").glob("*.h"), CSRC / "descriptors.cuh"])
    flags = (*_RUNTIME, *(() if _is_clang(cxx) else ("-Wno-psabi",)))
    key = _digest(_compiler_identity(cxx), " ".join(flags).encode(), *(path.read_bytes() for path in files))
    cache = env.CACHE.get() / "emulator"
    runtime = cache / f"runtime-{key}.o"
    if runtime.exists():
        return runtime
    with _only_one(cache), tempfile.TemporaryDirectory(dir=cache) as work:
        if not runtime.exists():
            logger.info("compiling the CUDA emulator (once, some seconds)")
            # as one translation unit: the standard library's headers cost more than the code
            everything = Path(work) / "runtime.cpp"
            everything.write_text("".join(f'#include "{path}"\n' for path in files if path.suffix == ".cpp"))
            fresh = Path(work) / runtime.name
            _compile([cxx, *flags, "-c", str(everything), "-o", str(fresh)], "the emulator")
            fresh.replace(runtime)
    return runtime


def build(source: Path, include: Sequence[Path] = (), defines: Sequence[str] = (), output: Path | None = None) -> Path:
    """Compiles a CUDA source against the emulator into a shared library.

    Args:
        source: The translation unit with the `extern "C"` launchers.
        include: Folders for its includes, before Tokenmill's csrc, which is always searched.
        defines: Preprocessor symbols, `NAME` or `NAME=VALUE`.
        output: Where to put the library; default: the cache, reused until the source, anything that it includes,
            the defines or the compiler change.

    Raises:
        InputError: The source is absent or does not compile; with the compiler's first messages.
        UnsupportedError: No C++ compiler.
        ConfigurationError: The cache cannot be written.
    """
    if not source.is_file():
        raise InputError(f"{source} is not a file")
    cxx, runtime = compiler(), build_runtime()
    flags = (*_KERNEL, *_MEMORY_CALLS, *(_KERNEL_CLANG if _is_clang(cxx) else _KERNEL_GCC))
    paths = [f"-I{path.resolve()}" for path in (*include, source.parent, CSRC)]
    command = [cxx, *flags, *paths, *(f"-D{define}" for define in defines), "-x", "c++", str(source.resolve())]
    if output is not None:
        with tempfile.TemporaryDirectory() as work:
            _link(command, runtime, Path(work), output, source.name)
        return output
    cache = env.CACHE.get() / "emulator"
    name = _digest(_compiler_identity(cxx), runtime.name.encode(), "\0".join(command).encode())
    manifest = cache / f"{source.stem}-{name}.json"
    if (known := _reusable(manifest)) is not None:
        return known
    with _only_one(cache), tempfile.TemporaryDirectory(dir=cache) as work:
        if (known := _reusable(manifest)) is not None:
            return known
        fresh = Path(work) / "fresh.so"
        included = _link(command, runtime, Path(work), fresh, source.name)
        library = cache / f"{source.stem}-{_digest(name.encode(), *(path.read_bytes() for path in included))}.so"
        fresh.replace(library)
        draft = Path(work) / "manifest.json"
        draft.write_text(json.dumps({"name": name, "stem": source.stem, "files": [str(path) for path in included]}))
        draft.replace(manifest)
    return library


def _link(command: Sequence[str], runtime: Path, work: Path, output: Path, what: str) -> list[Path]:
    """Compiles and links; the source and everything outside the system that it includes, sorted."""
    target, depends = work / "kernel.o", work / "kernel.d"
    _compile([*command, "-MMD", "-MF", str(depends), "-c", "-o", str(target)], what)
    # symbolic: each library has an emulated device of its own; no-undefined: what the emulator lacks fails here
    flags = ["-shared", "-Wl,-Bsymbolic", "-Wl,--no-undefined"]
    _compile([command[0], *flags, str(target), str(runtime), "-ldl", "-o", str(output)], what)
    text = depends.read_text(encoding="utf-8").partition(":")[2].replace("\\\n", " ")
    return sorted(Path(part) for part in text.split())


def _reusable(manifest: Path) -> Path | None:
    """The library that was built from exactly the files that are there now."""
    try:
        record = json.loads(manifest.read_text(encoding="utf-8"))
        contents = [Path(path).read_bytes() for path in record["files"]]
    except (OSError, ValueError, KeyError):
        return None
    library = manifest.parent / f"{record['stem']}-{_digest(record['name'].encode(), *contents)}.so"
    return library if library.exists() else None


# ---- running ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistics:
    """What the last launch did: counts of fiber switches, warp collectives, checked accesses and their 4-byte cells,
    completed asynchronous operations, wgmmas (by warp) and barrier arrivals (by warp)."""

    switches: int
    collectives: int
    accesses: int
    cells: int
    async_operations: int
    warp_wgmmas: int
    barriers: int


class EmulatedLibrary:
    """A built library and its emulated device: device memory, settings, launches, reports.

    One launch at a time: calls from several threads wait for each other. Load a path once per process; each loaded
    library has a device and memory of its own.

    Args:
        path: From `build`.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        self._library = ctypes.CDLL(str(path), mode=os.RTLD_LOCAL | os.RTLD_NOW)
        functions = {
            "malloc": (ctypes.c_void_p, [ctypes.c_size_t]),
            "free_all": (None, []),
            "predecessor_writes": (None, [ctypes.c_void_p, ctypes.c_size_t]),
            "reports": (ctypes.c_char_p, []),
            "configure": (None, [ctypes.c_uint64, ctypes.c_int, ctypes.c_int, ctypes.c_int]),
            "statistics": (None, [ctypes.POINTER(ctypes.c_uint64)]),
        }
        for name, (result, arguments) in functions.items():
            function = self._function(f"tokenmill_emulator_{name}")
            function.restype, function.argtypes = result, arguments
        self.configure()

    def _function(self, name: str) -> Any:
        try:
            return getattr(self._library, name)
        except AttributeError:
            raise InputError(f'the library has no launcher {name}; declare it extern "C"') from None

    def configure(self, seed: int = 1, mode: str = "random", resident_ctas: int = 4, sm_count: int = 132) -> None:
        """Settings of the launches to come.

        Args:
            seed: Of every scheduling decision: a launch is a function of the seed and its inputs.
            mode: One of `ASYNC_MODES`.
            resident_ctas: CTAs in flight at once; a cooperative launch has all of them.
            sm_count: What `device_sm_count()` answers, and the limit of cooperative launches.
        """
        if mode not in ASYNC_MODES:
            raise InputError(f"async mode {mode!r} is unknown; use one of {', '.join(ASYNC_MODES)}")
        if resident_ctas < 1 or sm_count < 1:
            raise InputError(f"resident_ctas={resident_ctas} and sm_count={sm_count} must be at least 1")
        with self._lock:
            self._library.tokenmill_emulator_configure(seed, ASYNC_MODES.index(mode), resident_ctas, sm_count)

    def reset(self) -> None:
        """Frees all device memory."""
        with self._lock:
            self._library.tokenmill_emulator_free_all()

    def allocate(self, nbytes: int) -> int:
        """Address of fresh device memory, filled with 0xff, with a red zone behind it."""
        with self._lock:
            address = self._library.tokenmill_emulator_malloc(nbytes)
        if address is None:
            raise EmulatorError(f"the emulated device has no room for {nbytes} bytes; it has 1 GiB, reset() frees it")
        return int(address)

    def upload(self, tensor: Any) -> int:
        """Address of a copy of a CPU tensor (its elements in order of its shape) in device memory."""
        dense = tensor.contiguous()
        address = self.allocate(dense.nbytes)
        ctypes.memmove(address, dense.data_ptr(), dense.nbytes)
        return address

    def download(self, address: int, shape: Sequence[int], dtype: Any) -> Any:
        """A CPU tensor with the device memory's content."""
        import torch

        tensor = torch.empty(tuple(shape), dtype=dtype)
        ctypes.memmove(tensor.data_ptr(), address, tensor.nbytes)
        return tensor

    def predecessor_writes(self, address: int, nbytes: int) -> None:
        """Says that the grid before the next dependent launch writes these bytes (see docs/emulator.md)."""
        with self._lock:
            self._library.tokenmill_emulator_predecessor_writes(address, nbytes)

    def call(self, launcher: str, *arguments: Any) -> int:
        """Calls a launcher; 0, the number of reports, or its negative error.

        Args:
            launcher: Its `extern "C"` name.
            arguments: int (of any width; device addresses), float (as C float), None (a null pointer, the stream)
                or ctypes objects.
        """
        function = self._function(launcher)
        with self._lock:
            return int(function(*[_c_argument(argument) for argument in arguments]))

    def reports(self) -> str:
        """The reports of the last launch, at most a screenful; empty: it was clean."""
        with self._lock:
            return str(self._library.tokenmill_emulator_reports().decode(errors="replace"))

    def statistics(self) -> Statistics:
        """Counts of the last launch."""
        values = (ctypes.c_uint64 * len(_STATISTICS))()
        with self._lock:
            self._library.tokenmill_emulator_statistics(values)
        return Statistics(**dict(zip(_STATISTICS, values, strict=True)))

    def run(self, launcher: str, *arguments: Any) -> None:
        """Calls a launcher on CPU tensors, as a CUDA op would: each storage is copied to the device and back.

        Args:
            launcher: Its `extern "C"` name; its last parameter is the stream, which is added here.
            arguments: As for `call`, and tensors: the launcher gets their device addresses. Views of one storage stay
                views of one storage.

        Raises:
            EmulatorError: The emulator has something to report, or the launcher returned a negative error.
        """
        with self._lock:
            self.reset()
            storages = {
                a.untyped_storage().data_ptr(): a.untyped_storage() for a in arguments if hasattr(a, "data_ptr")
            }
            devices = {host: self.allocate(storage.nbytes()) for host, storage in storages.items()}
            for host, storage in storages.items():
                ctypes.memmove(devices[host], host, storage.nbytes())
            converted = [
                a.data_ptr() - a.untyped_storage().data_ptr() + devices[a.untyped_storage().data_ptr()]
                if hasattr(a, "data_ptr")
                else a
                for a in arguments
            ]
            status = self.call(launcher, *converted, None)
            if status:
                raise EmulatorError(f"{launcher} returned {status}\n{self.reports()}".rstrip())
            for host, storage in storages.items():
                ctypes.memmove(host, devices[host], storage.nbytes())


def _c_argument(argument: Any) -> Any:
    if isinstance(argument, bool | int):
        return ctypes.c_int64(argument)  # a narrower parameter takes the low part of the register
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    if argument is None:
        return ctypes.c_void_p(None)
    return argument


@functools.cache
def load(source: Path, include: tuple[Path, ...] = (), defines: tuple[str, ...] = ()) -> EmulatedLibrary:
    """`build` and load, once per process: what an op's `cuda-emulated` implementation calls."""
    return EmulatedLibrary(build(source, include, defines))
