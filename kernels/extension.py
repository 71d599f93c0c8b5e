"""Loads the native library (`tokenmill/_C.abi3.so`) and says in one line what of it is missing, and why.

Its ops are `torch.ops.tokenmill_native.<op>_cpu` and `<op>_cuda`; they write into buffers that the caller allocates.
Nothing is loaded at import. The library is linked against torch's stable ABI, so one file serves torch 2.11 to 2.14.
"""

import functools
import json
from pathlib import Path
from typing import Any, cast

import torch

import tokenmill
from tokenmill import env, platform
from tokenmill.errors import UnsupportedError
from tokenmill.kernels.spec import Problem

LIBRARY = Path(tokenmill.__file__).parent / "_C.abi3.so"
REBUILD = "run `tokenmill build`"


@functools.cache
def why_not_loaded() -> str | None:
    """Loads the library on the first call; None, or why it cannot be used."""
    if not LIBRARY.exists():
        return f"the native library is not built; install a C++ compiler and ninja, then {REBUILD}"
    try:
        torch.ops.load_library(str(LIBRARY))  # type: ignore[no-untyped-call]
    except OSError as error:
        first_line = str(error).splitlines()[0]
        return f"the native library does not load with torch {torch.__version__} ({first_line}); {REBUILD}"
    return None


@functools.cache
def build_info() -> dict[str, Any]:
    """What the library was built from and with, as it says itself; empty when it is not loaded.

    Keys: `cuda` (the compiler's release, or null), `cuda_architectures` (list), `lacks` (list of sentences),
    `compiler`, `torch`, `isa` (list of instruction-set levels with kernels of their own).
    """
    if why_not_loaded() is not None:
        return {}
    return cast("dict[str, Any]", json.loads(torch.ops.tokenmill_native.build_info()))


@functools.cache
def why_not(op: str) -> str | None:
    """None when the library holds the native op, else why not."""
    reason = why_not_loaded()
    if reason is not None or hasattr(torch.ops.tokenmill_native, op):
        return reason
    lacks = build_info()["lacks"] if op.endswith("_cuda") else []
    return f"the native library has {'; '.join(lacks)}" if lacks else f"the native library lacks {op}; {REBUILD}"


@functools.cache
def native(op: str) -> Any:
    """The callable of one native op; UnsupportedError when the library lacks it."""
    reason = why_not(op)
    if reason is not None:
        raise UnsupportedError(f"native op {op}", {"native library": reason})
    return getattr(torch.ops.tokenmill_native, op).default


@functools.cache
def _widest_isa(levels: tuple[str, ...], limit: str) -> int:
    usable = platform.isa_levels()
    return max(env.ISA_LEVELS.index(level) for level in levels if level in usable)


def isa_index(levels: tuple[str, ...]) -> int:
    """The widest usable instruction set of those an op has kernels for, as native ops take it (csrc/isa.h).

    Args:
        levels: Names of `env.ISA_LEVELS`; must include `plain`.
    """
    return _widest_isa(levels, env.ISA.get())


@functools.cache
def _gpu_family(index: int) -> str | None:
    return next((gpu.family for gpu in platform.gpus() if gpu.index == index), None)


def why_not_cpu(op: str, problem: Problem) -> str | None:
    """Why a native CPU op cannot do the problem; for use in a `cpu_impl.why_not`."""
    if problem.device.type != "cpu":
        return f"the tensors are on {problem.device}, not on the CPU"
    return why_not(op)


@functools.cache
def _why_not_on_gpu(device: torch.device) -> str:
    seen = "" if platform.has_nvidia_driver() else " (this machine has no NVIDIA driver)"
    return f"the tensors are on {device}, not on a CUDA device{seen}"


def why_not_gpu(problem: Problem, families: tuple[str, ...]) -> str | None:
    """Why no kernel for these GPUs can do the problem, whatever it is written in.

    Args:
        problem: What is to be computed.
        families: The GPU families it is compiled for, e.g. `("sm90", "sm100")`; exact, never "at least".
    """
    if problem.device.type != "cuda":
        return _why_not_on_gpu(problem.device)
    index = problem.device.index if problem.device.index is not None else 0
    family = _gpu_family(index)
    if family is None:
        return f"torch {torch.__version__} sees no CUDA device {index}"
    if family not in families:
        return f"GPU {index} is {family}; the kernel is compiled for {', '.join(families)}"
    return None


def why_not_cuda(op: str, problem: Problem, families: tuple[str, ...]) -> str | None:
    """Why a native CUDA op cannot do the problem; for use in a `cuda_impl.why_not`.

    Args:
        op: The native op's name.
        problem: What is to be computed.
        families: As for `why_not_gpu`.
    """
    return why_not_gpu(problem, families) or why_not(op)
