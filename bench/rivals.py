"""Who multiplies by an INT4 weight: our kernels, torch, and every rival that is installed.

A contestant is asked `why_not()` first; what it answers is written where its figures would stand. Each prepares the
same canonical weight in its own format and takes activations in the dtype that suits it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Literal, Protocol

import torch

import tokenmill
from tokenmill import env
from tokenmill.kernels import registry
from tokenmill.kernels.int4_gemm import op
from tokenmill.kernels.int4_gemm.cpu_impl import level
from tokenmill.kernels.int4_gemm.weight import Int4Weight, dequantize, unpack_codes

#: x [M, K] to y [M, N].
Call = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """One prepared copy of a weight.

    Attributes:
        call: Multiplies by it.
        nbytes: Bytes of the weight in the contestant's format; what has to leave the memory in every call.
    """

    call: Call
    nbytes: int


class Contestant(Protocol):
    """One way to compute x @ W.

    Attributes:
        name: As in the rows.
        role: `ours`; `baseline`: torch on the dequantised weight; `rival`: another INT4 kernel.
        dtype: Of the activations it takes.
        activation_bits: 16: it multiplies by the activations as they are; 8: it quantises them.
    """

    @property
    def name(self) -> str: ...
    @property
    def role(self) -> Literal["ours", "baseline", "rival"]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def activation_bits(self) -> int: ...

    def version(self) -> str:
        """Its package and version; what ran."""
        ...

    def why_not(self, K: int, N: int, group_size: int) -> str | None:
        """None when it can, else why it is not measured."""
        ...

    def prepare(self, weight: Int4Weight) -> Layer:
        """Packs one copy."""
        ...


@dataclass(frozen=True)
class Ours:
    """One of our implementations, with 16- or 8-bit activations."""

    activation_bits: int
    implementation: str = "cpu"
    role: Literal["ours"] = "ours"
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        if self.implementation == "cpu":
            return f"tokenmill-a{self.activation_bits}"
        return f"tokenmill-{self.implementation}"

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu" if self.implementation == "cpu" else "cuda")

    def version(self) -> str:
        """On the CPU with the instruction set of the kernel that runs."""
        kind = f" ({level(self.activation_bits, self.dtype)})" if self.implementation == "cpu" else ""
        return f"tokenmill {tokenmill.__version__}{kind}"

    def why_not(self, K: int, N: int, group_size: int) -> str | None:
        """Whatever the registry says."""
        axes = {"M": 1, "K": K, "N": N, "G": -(-K // group_size), "R": -(-K // 8)}
        options = {"group_size": group_size, "activation_bits": self.activation_bits}
        problem = op.INT4_GEMM.problem(axes, self.dtype, self._device, **options)
        return registry.explain(op.INT4_GEMM, problem).refusals.get(self.implementation)

    def prepare(self, weight: Int4Weight) -> Layer:
        """One packed copy."""
        layer = op.prepare(
            weight,
            self.dtype,
            device=weight.device,
            activation_bits=self.activation_bits,
            implementation=self.implementation,
        )
        return Layer(layer, int4_bytes(weight))


@dataclass(frozen=True)
class TorchLinear:
    """F.linear on the dequantised weight: the baseline is the best of its dtypes."""

    dtype: torch.dtype
    library: str = "torch"
    role: Literal["baseline"] = "baseline"
    activation_bits: int = 16

    @property
    def name(self) -> str:
        short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[self.dtype]
        return f"{self.library}-{short}"

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def why_not(self, K: int, N: int, group_size: int) -> str | None:
        """It always can."""
        return None

    def prepare(self, weight: Int4Weight) -> Layer:
        """The weight as F.linear stores it: [N, K]."""
        dense = dequantize(weight, self.dtype).t().contiguous()
        return Layer(lambda x: torch.nn.functional.linear(x, dense), dense.nbytes)


@dataclass(frozen=True)
class AtenInt4:
    """torch's own `_weight_int4pack_mm_for_cpu`, as torchao uses it."""

    name: str = "aten-int4"
    role: Literal["rival"] = "rival"
    dtype: torch.dtype = torch.bfloat16
    activation_bits: int = 16

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def why_not(self, K: int, N: int, group_size: int) -> str | None:
        """Group sizes and blocks that its checks demand."""
        if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
            return f"torch {torch.__version__} has no _weight_int4pack_mm_for_cpu"
        if group_size not in (32, 64, 128, 256) or K % group_size or N % 64:
            return "it takes groups of 32 to 256 that divide K, and N a multiple of 64"
        return None

    def prepare(self, weight: Int4Weight) -> Layer:
        """Codes [N, K] into its blocks; scale and zero of (code - 8) * scale + zero."""
        codes = unpack_codes(weight.codes, weight.K).t().contiguous().int()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
        both = aten_scales(weight)
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        return Layer(lambda x: multiply(x, packed, weight.group_size, both), packed.nbytes + both.nbytes)


def aten_scales(weight: Int4Weight) -> torch.Tensor:
    """[G, N, 2] bfloat16: scale and zero of aten's INT4 kernels, which compute (code - 8) * scale + zero."""
    scales = weight.scales.to(torch.bfloat16)
    zeros = torch.zeros_like(scales)
    if weight.zeros is not None:
        zeros = ((8 - weight.zeros.float()) * scales.float()).to(torch.bfloat16)
    return torch.stack((scales, zeros), dim=2).contiguous()


def int4_bytes(weight: Int4Weight) -> int:
    """Bytes of codes, scales and zero points: the least that has to be read."""
    return sum(tensor.nbytes for tensor in (weight.codes, weight.scales, weight.zeros) if tensor is not None)


def package_version(package: str) -> str:
    """`onnxruntime 1.22.0`, or the bare name where it is not installed."""
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return package


#: How the reasons begin that are no refusals: an error, and a wrong result.
RAISED, WRONG = "it raised", "wrong:"


def broken(error: Exception) -> str:
    """What stands in the row of one that raised: it must not end the measurement of the others."""
    words = " ".join(str(error).split())
    return f"{RAISED} {type(error).__name__}: {words[:200]}"


def narrowed() -> str | None:
    """Why a rival that asks the processor itself cannot take part, when `TOKENMILL_ISA` allows less than that."""
    limit = env.ISA.get()
    return f"it chooses its instruction set itself and cannot be held to {limit}" if limit else None


def all_contestants(*, cpu: bool) -> tuple[Contestant, ...]:
    """Everyone who may take part on a CPU or on a GPU, in the order of the tables."""
    return _on_cpu() if cpu else _on_gpu()


def _on_cpu() -> tuple[Contestant, ...]:
    from tokenmill.bench.rivals_ggml import GgmlQ40
    from tokenmill.bench.rivals_onnxruntime import OnnxRuntimeInt4
    from tokenmill.bench.rivals_vllm import VllmInt4, VllmInt4A8

    return (
        Ours(16),
        Ours(8),
        TorchLinear(torch.bfloat16),
        TorchLinear(torch.float16),
        TorchLinear(torch.float32),
        AtenInt4(),
        VllmInt4(),
        VllmInt4A8(),
        OnnxRuntimeInt4(),
        GgmlQ40(),
    )


def _on_gpu() -> tuple[Contestant, ...]:
    from tokenmill.bench.rivals_gpu import VLLM_LINEARS, AtenTinygemm

    others = ("cpu", "reference", *registry.BY_NAME_ONLY)
    return (
        *(Ours(16, name) for name in registry.names(op.INT4_GEMM) if name not in others),
        TorchLinear(torch.bfloat16, "cublas"),
        *VLLM_LINEARS,
        AtenTinygemm(),
    )
