"""GPU utilisation through NVML, the NVIDIA driver's own library; nothing where there is no driver.

Functions and structures are those of NVML's reference (`nvmlDeviceGetUtilizationRates`, `nvmlDeviceGetMemoryInfo`).
"""

import ctypes
import functools
from collections.abc import Iterable
from dataclasses import dataclass

from tokenmill.engine.gateway.observability.snapshot import Family

_OK = 0


class _Utilisation(ctypes.Structure):
    _fields_ = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]


class _Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


@dataclass(frozen=True)
class Gpu:
    """One GPU now.

    Attributes:
        index: As the driver counts them.
        name: Its product name.
        busy: Share of the last sample period in which a kernel ran, 0 to 1.
        used, total: Memory in bytes.
    """

    index: int
    name: str
    busy: float
    used: int
    total: int


def families(cards: Iterable[Gpu] | None) -> list[Family]:
    """Metrics of the GPUs by index and name; no series where there is no driver."""
    seen = list(cards or ())
    return [
        Family(
            f"tokenmill_gpu_{name}",
            text,
            "gauge",
            ("gpu", "name"),
            [((str(card.index), card.name), [float(getattr(card, attribute))]) for card in seen],
        )
        for attribute, name, text in (
            ("busy", "utilization_ratio", "Share of the driver's last sample period in which a GPU worked, 0 to 1."),
            ("used", "memory_used_bytes", "A GPU's memory in use."),
            ("total", "memory_bytes", "A GPU's memory."),
        )
    ]


@functools.cache
def _library(path: str) -> ctypes.CDLL | None:
    """NVML, ready for use; None where there is none."""
    try:
        found = ctypes.CDLL(path)
    except OSError:
        return None
    return found if found.nvmlInit_v2() == _OK else None


def gpus(path: str = "libnvidia-ml.so.1") -> list[Gpu] | None:
    """Every GPU of this machine; None where the driver is absent. Takes milliseconds: call it in a thread.

    Args:
        path: The library.
    """
    nvml = _library(path)
    count = ctypes.c_uint()
    if nvml is None or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != _OK:
        return None
    return [gpu for index in range(count.value) if (gpu := _gpu(nvml, index)) is not None]


def _gpu(nvml: ctypes.CDLL, index: int) -> Gpu | None:
    handle, name = ctypes.c_void_p(), ctypes.create_string_buffer(96)
    rates, memory = _Utilisation(), _Memory()
    answers = (
        nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)),
        nvml.nvmlDeviceGetName(handle, name, len(name)),
        nvml.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(rates)),
        nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)),
    )
    if any(answer != _OK for answer in answers):
        return None
    return Gpu(index, name.value.decode("utf-8", "replace"), rates.gpu / 100, memory.used, memory.total)
