"""Pretends, in one process, that vLLM's GPU build runs on a Hopper GPU."""

import sys
import types
from typing import Any

CAPABILITY, NAME, MEMORY = (9, 0), "NVIDIA H100 80GB HBM3", 80 << 30


def pretend() -> None:
    """Makes the current platform a Hopper; stands in for the flash-attention libraries, which are left out."""
    for library in ("_vllm_fa2_C", "_vllm_fa3_C"):
        name = f"vllm.vllm_flash_attn.{library}"
        sys.modules[name] = types.ModuleType(name)

    from vllm import platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class Hopper(NonNvmlCudaPlatform):  # type: ignore[misc]  # vLLM has no types for mypy here
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return DeviceCapability(*CAPABILITY)

        @classmethod
        def has_device_capability(cls, capability: Any, device_id: int = 0) -> bool:
            wanted = capability if isinstance(capability, tuple) else divmod(capability, 10)
            return bool(wanted <= CAPABILITY)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return NAME

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return MEMORY

        @classmethod
        def device_count(cls) -> int:
            return 1

        @classmethod
        def is_fully_connected(cls, physical_device_ids: list[int]) -> bool:
            return False

    platforms._current_platform = Hopper()
