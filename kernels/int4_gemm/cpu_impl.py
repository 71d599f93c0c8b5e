"""INT4 GEMM by csrc/int4_gemm on the CPU; the kernel is chosen by instruction set."""

import torch

from tokenmill import platform
from tokenmill.env import ISA_LEVELS
from tokenmill.kernels import extension
from tokenmill.kernels.int4_gemm import cpu_layout
from tokenmill.kernels.int4_gemm.prepared import Multiply, from_canonical
from tokenmill.kernels.int4_gemm.weight import Int4Weight
from tokenmill.kernels.registry import Implementation
from tokenmill.kernels.spec import Problem

_NATIVE = "int4_gemm_cpu"
#: Instruction-set levels that csrc/int4_gemm has kernels for, by bits of the activations.
LEVELS: dict[int, tuple[str, ...]] = {
    16: ("plain", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx"),
    8: ("plain", "avx2", "avx_vnni", "avx512_vnni", "amx"),
}
#: Those of 16 bits that multiply float32 activations as they are.
_FLOAT32_LEVELS = ("plain", "avx2", "avx512")


def level(activation_bits: int, dtype: torch.dtype) -> str:
    """The instruction-set level whose kernel would run now.

    Float32 activations do not take a kernel in bf16 or int16: it would keep 16 bits of them. On Intel's processors
    AVX512_BF16's products take longer than those of int16, so they do without.
    """
    levels = LEVELS[activation_bits]
    if activation_bits == 16 and dtype == torch.float32:
        levels = _FLOAT32_LEVELS
    elif activation_bits == 16 and platform.cpu_vendor() == "GenuineIntel":
        levels = tuple(level for level in levels if level != "avx512_bf16")
    return ISA_LEVELS[extension.isa_index(levels)]


def _why_not(problem: Problem) -> str | None:
    if problem.options["activation_bits"] == 8 and level(8, problem.dtype) == "plain":
        return "8-bit activations need AVX2, which this processor (or TOKENMILL_ISA) lacks; use activation_bits=16"
    return extension.why_not_cpu(_NATIVE, problem)


def prepare(weight: Int4Weight, dtype: torch.dtype, activation_bits: int) -> Multiply:
    """Packs a weight once; the result multiplies by it."""
    packed = cpu_layout.pack(weight).buffer
    native = extension.native(_NATIVE)
    isa = ISA_LEVELS.index(level(activation_bits, dtype))

    def multiply(x: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None) -> None:
        native(out, x, packed, bias, activation_bits, isa)

    return multiply


CPU = Implementation("cpu", from_canonical(prepare), _why_not)

if extension.why_not(_NATIVE) is None:
    # What torch.compile needs to know: it writes `out` and returns nothing.
    torch.library.register_fake(f"tokenmill_native::{_NATIVE}", lambda *arguments: None)
