"""What the NVIDIA driver says about a GPU: clocks, power and energy, by its own library (NVML), without a package.

Figures that the driver or the card does not give are absent, never zero.
"""

import contextlib
import ctypes
from typing import Any

_SM, _MEMORY = 1, 2  # nvmlClockType_t
_OK = 0


class Device:
    """One GPU.

    Args:
        index: As the driver counts them.
        library: Name or path of NVML.

    Raises:
        OSError: There is no NVML, or no such GPU.
    """

    def __init__(self, index: int = 0, library: str = "libnvidia-ml.so.1") -> None:
        self._nvml = ctypes.CDLL(library)
        if (status := self._nvml.nvmlInit_v2()) != _OK:
            raise OSError(f"nvmlInit_v2 returned {status}")
        self._handle = ctypes.c_void_p()
        if (status := self._nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(self._handle))) != _OK:
            raise OSError(f"NVML has no GPU {index} ({status})")

    def _integer(self, function: str, kind: Any, *arguments: Any) -> int | None:
        value = kind()
        with contextlib.suppress(AttributeError):
            if getattr(self._nvml, function)(self._handle, *arguments, ctypes.byref(value)) == _OK:
                return int(value.value)
        return None

    def joules(self) -> float | None:
        """Energy since the driver was loaded."""
        found = self._integer("nvmlDeviceGetTotalEnergyConsumption", ctypes.c_ulonglong)
        return None if found is None else found / 1e3

    def state(self) -> dict[str, int]:
        """Clocks in MHz, power in watts, temperature in degrees Celsius, as far as they can be had."""
        found = {
            "sm_mhz": self._integer("nvmlDeviceGetClockInfo", ctypes.c_uint, _SM),
            "memory_mhz": self._integer("nvmlDeviceGetClockInfo", ctypes.c_uint, _MEMORY),
            "celsius": self._integer("nvmlDeviceGetTemperature", ctypes.c_uint, 0),
        }
        milliwatts = self._integer("nvmlDeviceGetPowerUsage", ctypes.c_uint)
        found["watts"] = None if milliwatts is None else milliwatts // 1000
        return {name: value for name, value in found.items() if value is not None}

    def driver(self) -> str | None:
        """The driver's version."""
        text = ctypes.create_string_buffer(96)
        if self._nvml.nvmlSystemGetDriverVersion(text, len(text)) != _OK:
            return None
        return text.value.decode(errors="replace")


def device(index: int = 0) -> Device | None:
    """The GPU, or None where NVML or the GPU is missing."""
    try:
        return Device(index)
    except OSError:
        return None
