"""What this machine can do: the only place that asks about processors and GPUs.

Kernels ask here and nowhere else, so that a test or `TOKENMILL_ISA` can narrow the answer in one place.
Torch is imported only by the functions that need it.
"""

import ctypes
import functools
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tokenmill import env

_AVX512_BF16 = frozenset(
    {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16"}
)
#: /proc/cpuinfo flags that each instruction-set level needs.
_ISA_FLAGS: dict[str, frozenset[str]] = {
    "plain": frozenset(),
    "avx2": frozenset({"avx2", "fma", "f16c"}),
    "avx_vnni": frozenset({"avx2", "fma", "f16c", "avx_vnni"}),
    "avx512": frozenset({"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"}),
    "avx512_vnni": frozenset({"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}),
    "avx512_bf16": _AVX512_BF16,
    "amx": _AVX512_BF16 | {"bmi2", "amx_tile", "amx_bf16", "amx_int8"},
}


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The processor's feature flags as Linux names them; empty where /proc/cpuinfo has none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


@functools.cache
def cpu_vendor() -> str:
    """Who made the processor, as Linux names it, e.g. `GenuineIntel`; empty where it does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r"^vendor_id\s*:\s*(\S+)", text, re.MULTILINE)
    return found[1] if found else ""


def cpu_model() -> str:
    """The processor's name, e.g. `AMD EPYC 9554`; `unknown` where Linux does not say.

    Virtual machines may leave the number out: then family and model tell generations apart, e.g. `AMD EPYC (family 25,
    model 17)`.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    fields: dict[str, str] = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+?)\s*$", text, re.MULTILINE))
    name = fields.get("model name", "unknown")
    if re.search(r"\d", name) or not {"cpu family", "model"} <= fields.keys():
        return name
    return f"{name} (family {fields['cpu family']}, model {fields['model']})"


@functools.cache
def _may_use_tiles() -> bool:
    """Asks Linux for AMX's tile registers, once for the whole process; it may refuse.

    Source: Linux, Documentation/arch/x86/xstate.rst, ARCH_REQ_XCOMP_PERM.
    """
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return int(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data)) == 0


def isa_levels() -> tuple[str, ...]:
    """The instruction-set levels usable now, narrow to wide, after `TOKENMILL_ISA`.

    A level is usable when the processor has its flags and, if `TOKENMILL_ISA` names a level,
    when that level contains it.
    """
    usable = [level for level in env.ISA_LEVELS if _ISA_FLAGS[level] <= cpu_flags()]
    if "amx" in usable and not _may_use_tiles():
        usable.remove("amx")
    limit = env.ISA.get()
    if limit:
        usable = [level for level in usable if _ISA_FLAGS[level] <= _ISA_FLAGS[limit]]
    return tuple(usable)


def isa() -> str:
    """The widest usable instruction-set level."""
    return isa_levels()[-1]


def available_memory() -> int:
    """Bytes that can be allocated without swapping, as Linux estimates them; 0 where it does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return 0
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def physical_cores() -> int:
    """Cores this process may run on (its affinity mask, not the machine's total)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


@dataclass(frozen=True)
class Gpu:
    """One CUDA device: its name, compute capability as (major, minor) and total memory in bytes."""

    index: int
    name: str
    capability: tuple[int, int]
    memory_bytes: int

    @property
    def family(self) -> str:
        """The kernel family that runs on it, e.g. `sm90`: exact, never "at least"."""
        return f"sm{self.capability[0]}{self.capability[1]}"


def gpus() -> tuple[Gpu, ...]:
    """The CUDA devices that torch sees; empty without a GPU or with a CPU-only torch."""
    import torch

    if not torch.cuda.is_available():
        return ()
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(Gpu(index, properties.name, (properties.major, properties.minor), properties.total_memory))
    return tuple(found)


def has_nvidia_driver() -> bool:
    """Whether an NVIDIA driver is loaded, asked without importing torch."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()


def nvcc() -> str | None:
    """Path of the CUDA compiler, from CUDA_HOME or PATH; None when there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def nvcc_version() -> str | None:
    """Release of the CUDA compiler, e.g. `13.0`; None when there is none or it does not answer."""
    compiler = nvcc()
    if compiler is None:
        return None
    try:
        answer = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    for word in answer.stdout.replace(",", " ").split():
        if word.startswith("V") and word[1:2].isdigit():
            return word[1:]
    return None
