"""INT4 GEMM: activations times a weight of four-bit codes with group scales.

    y [M, N] = x [M, K] @ W [K, N] + bias [N],   W[k, n] = scales[g(k), n] * (code[k, n] - zero[g(k), n])

Codes, scales, zero points and group indices are those of `weight.Int4Weight`, the form that GPTQ (Frantar et al.,
2022), AWQ (Lin et al., 2023) and compressed-tensors checkpoints are read into. A layer that is used more than once is
packed once: `prepare(weight, ...)` returns a `PreparedInt4` that multiplies.

Implementations: `cuda` (csrc/int4_gemm) and `triton` read one packed layout (layout.py), split K over programs and sum
the splits in a fixed order; `cpu` has its own layout (cpu_layout.py). Each gives the same bits from run to run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch

from tokenmill.errors import InputError
from tokenmill.kernels import checks, library, registry
from tokenmill.kernels.int4_gemm import reference
from tokenmill.kernels.int4_gemm.prepared import Multiply, Prepare, as_weight
from tokenmill.kernels.int4_gemm.weight import CODES_PER_WORD, Int4Weight
from tokenmill.kernels.numerics import Tolerance
from tokenmill.kernels.spec import OpSpec, Problem, TensorSpec

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
#: Implementation name to the module whose `prepare` packs for it.
_PREPARE = {
    "cuda": "tokenmill.kernels.int4_gemm.cuda_impl",
    "triton": "tokenmill.kernels.int4_gemm.triton_impl",
    "cpu": "tokenmill.kernels.int4_gemm.cpu_impl",
    "cuda-emulated": "tokenmill.kernels.int4_gemm.cuda_emulated_impl",
}


def _make_inputs(problem: Problem, generator: torch.Generator) -> dict[str, Any]:
    M, K, N, G = (problem[axis] for axis in ("M", "K", "N", "G"))
    size = int(problem.options["group_size"])  # type: ignore[call-overload]
    words = torch.randint(-(2**31), 2**31, (problem["R"], N), generator=generator, dtype=torch.int64).int()
    rest = K % CODES_PER_WORD
    if rest:
        words[-1] &= (1 << (4 * rest)) - 1  # the canonical form has zero bits beyond K
    zeros = None
    if not problem.options["symmetric"]:
        zeros = torch.randint(16, (G, N), generator=generator, dtype=torch.uint8)
    return {
        "x": torch.randn(M, K, generator=generator).to(problem.dtype),
        "codes": words,
        "scales": (torch.rand(G, N, generator=generator) * 0.02 + 0.001).to(
            torch.float16 if problem.dtype == torch.float32 else problem.dtype
        ),
        "zeros": zeros,
        "g_idx": None,
        "bias": torch.randn(N, generator=generator).to(problem.dtype),
        "group_size": size,
    }


def _bytes_moved(problem: Problem) -> int:
    """Every code, scale and zero point once, x once, y once."""
    M, K, N, G = (problem[axis] for axis in ("M", "K", "N", "G"))
    zeros = 0 if problem.options["symmetric"] else G * N
    return K * N // 2 + 2 * G * N + zeros + problem.dtype.itemsize * (M * K + M * N)


def _reference(x: torch.Tensor, out: torch.Tensor, activation_bits: int, **canonical: Any) -> torch.Tensor:
    return reference.int4_gemm(x, as_weight(x, **canonical), out)


INT4_GEMM = OpSpec(
    name="int4_gemm",
    doc="Activations times a weight of four-bit codes with group scales.",
    axes={
        "M": "rows of activations (tokens)",
        "K": "input features",
        "N": "output features",
        "G": "groups of input features that share a scale",
        "R": "words of eight codes along K: ceil(K / 8)",
    },
    inputs=(
        TensorSpec("x", ("M", "K"), _FLOATS, "activations", layout="rows"),
        TensorSpec("codes", ("R", "N"), (torch.int32,), "eight codes a word, the first in the low bits"),
        TensorSpec("scales", ("G", "N"), _FLOATS, "one scale a group and output feature"),
        TensorSpec("zeros", ("G", "N"), (torch.uint8,), "zero points 0..15; None: 8", optional=True),
        TensorSpec(
            "g_idx", ("K",), (torch.int32,), "group of each input feature; None: k // group_size", optional=True
        ),
        TensorSpec("bias", ("N",), _FLOATS, "added to every row", optional=True),
    ),
    outputs=(TensorSpec("out", ("M", "N"), _FLOATS, "the product", same_dtype_as="x"),),
    scalars=(),
    dtype_of="x",
    reference=_reference,
    make_inputs=_make_inputs,
    flops=lambda problem: 2 * problem["M"] * problem["N"] * problem["K"],
    bytes_moved=_bytes_moved,
    tolerance=Tolerance(factor=2.0),
    implementations={
        "cuda": "tokenmill.kernels.int4_gemm.cuda_impl:CUDA",
        "triton": "tokenmill.kernels.int4_gemm.triton_impl:TRITON",
        "cpu": "tokenmill.kernels.int4_gemm.cpu_impl:CPU",
        "cuda-emulated": "tokenmill.kernels.int4_gemm.cuda_emulated_impl:EMULATED",
    },
    examples=(
        {"M": 1, "K": 4096, "N": 4096, "G": 32, "R": 512},
        {"M": 0, "K": 256, "N": 96, "G": 2, "R": 32},
        {"M": 1, "K": 256, "N": 1, "G": 2, "R": 32},
        {"M": 5, "K": 384, "N": 130, "G": 3, "R": 48},
        {"M": 37, "K": 1024, "N": 272, "G": 8, "R": 128},
    ),
    options={"group_size": 128, "symmetric": True, "activation_bits": 16},
)


@dataclass(frozen=True, eq=False, slots=True)
class PreparedInt4:
    """One layer, packed for one implementation.

    Attributes:
        implementation: Its name: `cuda`, `triton`, `cpu`, ...
        K: Input features.
        N: Output features.
        dtype: The dtype of the activations it takes.
        bias: [N] of that dtype on the same device, or None; added where a call brings no other.
        multiply: (x [M, K], out [M, N], bias) writes the product.
    """

    implementation: str
    K: int
    N: int
    dtype: torch.dtype
    bias: torch.Tensor | None
    multiply: Multiply

    def __call__(
        self, x: torch.Tensor, out: torch.Tensor | None = None, *, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [..., K] @ W + bias as [..., N].

        Args:
            x: Activations of `dtype`; leading dimensions are rows.
            bias: [N] of the same dtype on the same device, instead of the layer's own.
            out: Contiguous buffer [..., N] of the same dtype; None allocates one.

        Raises:
            InputError: x has another dtype or size or asks for a gradient, or bias or out does not fit.
        """
        # A layer's call comes after megabytes of another layer's weight: whatever it touches has left the caches, and
        # every operation on a tensor costs microseconds. The usual call, rows and no buffer, makes as few as can be.
        shape = x.shape
        if not shape or shape[-1] != self.K or x.dtype != self.dtype:
            raise InputError(
                f"x is {x.dtype} {list(shape)}; this layer takes {self.dtype} [..., {self.K}]; convert or reshape it"
            )
        if x.requires_grad:
            _check_no_gradient()
        flat = len(shape) == 2
        rows = x if flat else x.reshape(-1, self.K)
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        if out is None:
            out = x.new_empty((shape[0], self.N) if flat else (*shape[:-1], self.N))
        elif out.shape != (*shape[:-1], self.N) or out.dtype != x.dtype or not out.is_contiguous():
            raise InputError(
                f"out is {out.dtype} {list(out.shape)} with strides {out.stride()}; pass a contiguous "
                f"{x.dtype} {[*shape[:-1], self.N]} or None"
            )
        if bias is None:
            bias = self.bias
        elif (
            bias.shape != (self.N,) or bias.dtype != x.dtype or bias.device != x.device or not bias.is_contiguous()
        ):  # kernels read N elements of x's dtype, one after the other
            raise InputError(
                f"bias is {bias.dtype} {list(bias.shape)} with strides {bias.stride()} on {bias.device}; pass a "
                f"contiguous {x.dtype} [{self.N}] on {x.device} or None"
            )
        if rows.shape[0]:
            self.multiply(rows, out if flat else out.view(-1, self.N), bias)
        return out


def prepare(
    weight: Int4Weight,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    activation_bits: int = 16,
    implementation: str | None = None,
) -> PreparedInt4:
    """Packs a layer for the implementation that will run it.

    Args:
        weight: The canonical weight, on any device; its values are checked, which reads all but the codes.
        dtype: Of the activations: bfloat16, float16 or float32.
        device: Where it will run.
        activation_bits: 16 multiplies the activations as they are; 8 quantises them to int8 with one scale per row
            and group (faster, less exact).
        implementation: Its name, or None to choose.

    Raises:
        InputError: dtype or activation_bits is not one of those above; a scale or bias is not finite, a zero point or
            group index out of range.
        UnsupportedError: The implementation asked for, or every one, refuses; says why.
    """
    if dtype not in _FLOATS:
        raise InputError(f"dtype={dtype} is not bfloat16, float16 or float32; convert the activations")
    if activation_bits not in (8, 16):
        raise InputError(f"activation_bits={activation_bits} is not 8 or 16")
    weight.check_values()
    problem = problem_of(weight, dtype, torch.device(device), activation_bits)
    chosen = registry.choose(INT4_GEMM, problem, implementation)
    multiply = _prepare_of(chosen.name)(weight, dtype, activation_bits)
    bias = None if weight.bias is None else weight.bias.to(device, dtype).contiguous()
    return PreparedInt4(chosen.name, weight.K, weight.N, dtype, bias, multiply)


def problem_of(
    weight: Int4Weight, dtype: torch.dtype, device: torch.device, activation_bits: int, M: int = 1
) -> Problem:
    """The problem that a weight poses: what implementations are asked about."""
    axes = {"M": M, "K": weight.K, "N": weight.N, "G": weight.num_groups, "R": weight.codes.shape[0]}
    return INT4_GEMM.problem(axes, dtype, device, **_options(weight, activation_bits))


def _check_no_gradient() -> None:
    """Refuses what kernels would answer with a result that lacks its share of the gradient, without a word."""
    if torch.is_grad_enabled():
        raise InputError("x asks for a gradient, and int4_gemm has none; call it under torch.no_grad() or detach x")


def _options(weight: Int4Weight, activation_bits: int) -> Mapping[str, Any]:
    return {
        "group_size": weight.group_size,
        "symmetric": weight.zeros is None,
        "activation_bits": activation_bits,
    }


def _prepare_of(implementation: str) -> Prepare:
    if implementation == "reference":
        return _prepare_reference
    found: Prepare = import_module(_PREPARE[implementation]).prepare
    return found


def _prepare_reference(weight: Int4Weight, dtype: torch.dtype, activation_bits: int) -> Multiply:
    def multiply(x: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None) -> None:
        reference.int4_gemm(x, replace(weight, bias=bias), out)

    return multiply


def int4_gemm(
    x: torch.Tensor,
    weight: Int4Weight,
    *,
    activation_bits: int = 16,
    out: torch.Tensor | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """One product with a canonical weight; packs it for this call alone, so use `prepare` for more than one.

    Args:
        x: [M, K] bfloat16, float16 or float32; rows may be strided.
        weight: The canonical weight on the same device.
        activation_bits: As for `prepare`.
        out: [M, N] buffer of x's dtype; None allocates one.
        implementation: `cuda`, `triton`, `cpu` or `reference`; None chooses.

    Raises:
        InputError: A shape, dtype or device is not what is said above, a value is not what `prepare` takes, or x asks
            for a gradient.
        UnsupportedError: No implementation, or not the one asked for, can do this.
    """
    canonical = {name: getattr(weight, name) for name in ("codes", "scales", "zeros", "g_idx", "bias")}
    problem = checks.bind(INT4_GEMM, {"x": x, **canonical}, **_options(weight, activation_bits))
    if activation_bits not in (8, 16):
        raise InputError(f"activation_bits={activation_bits} is not 8 or 16")
    if x.requires_grad:
        _check_no_gradient()
    if problem["K"] != weight.K:
        raise InputError(f"x has {problem['K']} columns but the weight has K={weight.K} rows; they must agree")
    if out is None:
        out = x.new_empty((x.shape[0], weight.N))
    else:
        checks.check_output(INT4_GEMM.outputs[0], out, problem)
    chosen = registry.choose(INT4_GEMM, problem, implementation)
    weight.check_values()
    if x.shape[0]:
        chosen.run(x=x, out=out, activation_bits=activation_bits, group_size=weight.group_size, **canonical)
    return out


def _op(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    *canonical, activation_bits = arguments
    return int4_gemm(x, as_weight(x, *canonical), activation_bits=activation_bits)


def _fake(x: torch.Tensor, codes: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty((x.shape[0], codes.shape[1]))


library.define(
    "int4_gemm(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? g_idx, Tensor? bias, int group_size, "
    "int activation_bits) -> Tensor",
    _op,
    _fake,
)
