"""What the suite has to know about an op beyond its `OpSpec`: shapes at random, and how near is near enough.

An op that is not listed here is checked on its spec's examples with its spec's tolerance; that is all a new op needs.
"""

import random
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, cast

import torch

from tokenmill.errors import UnsupportedError
from tokenmill.kernels import registry
from tokenmill.kernels.int4_gemm.layout import pack
from tokenmill.kernels.int4_gemm.prepared import Multiply, as_weight, from_canonical
from tokenmill.kernels.int4_gemm.weight import Int4Weight, dequantize
from tokenmill.kernels.numerics import gamma, unit_roundoff
from tokenmill.kernels.registry import Implementation
from tokenmill.kernels.spec import OpSpec, Problem

#: The GPU that Triton's interpreter plays: streaming multiprocessors and family of an H100.
_PLAYED = (132, "sm90")

Draw = Callable[[random.Random, bool], tuple[dict[str, int], dict[str, Hashable]]]
Limit = Callable[[Problem, Mapping[str, Any], torch.Tensor], float | torch.Tensor]


@dataclass(frozen=True)
class Subject:
    """One op.

    Attributes:
        spec: Its specification.
        draw: (random, small) to axis sizes and options; None: only the examples are run.
        limit: (problem, inputs, exact result) to the allowed error.
    """

    spec: OpSpec
    draw: Draw | None
    limit: Limit


def subject(name: str) -> Subject:
    """The op of that name; InputError when it is not registered."""
    spec = registry.op_spec(name)

    def by_spec(problem: Problem, inputs: Mapping[str, Any], exact: torch.Tensor) -> float:
        return spec.tolerance.bound(exact, exact.to(problem.dtype))

    draw, limit = _SPECIAL.get(name, (None, None))
    return Subject(spec, draw, limit or by_spec)


def implementation(spec: OpSpec, problem: Problem, name: str) -> Implementation:
    """The implementation of that name; `triton` on CPU tensors is what Triton's interpreter runs.

    Raises:
        UnsupportedError: It cannot do the problem; carries the reason.
    """
    if name != "triton" or problem.device.type != "cpu":
        return registry.choose(spec, problem, name)
    if spec.name not in _INTERPRETED:
        raise UnsupportedError(str(problem), {name: "the suite does not know how to run it in Triton's interpreter"})
    if missing := _missing_for_interpreter():
        raise UnsupportedError(str(problem), {name: missing})
    found = _INTERPRETED[spec.name]()
    refusal = found.why_not(problem)
    if refusal is not None:
        raise UnsupportedError(str(problem), {name: refusal})
    return found


def _missing_for_interpreter() -> str | None:
    """What Triton's interpreter lacks here."""
    if find_spec("numpy") is None:
        return "Triton's interpreter needs numpy, which is not installed"
    triton, numpy = version("triton") if find_spec("triton") else "", version("numpy")
    if triton.startswith("3.6.") and tuple(map(int, numpy.split(".")[:2])) >= (2, 4):
        return f"the interpreter of Triton {triton} needs numpy before 2.4, and this is {numpy}"
    return None


def _interpreted_int4() -> Implementation:
    from tokenmill.kernels.int4_gemm import triton_impl

    def prepare(weight: Int4Weight, dtype: torch.dtype, activation_bits: int) -> Multiply:
        return triton_impl.multiplier(pack(weight, dtype), *_PLAYED)

    return Implementation("triton", from_canonical(prepare), triton_impl.refusal)


#: Op to its Triton implementation without the question for a GPU.
_INTERPRETED: dict[str, Callable[[], Implementation]] = {"int4_gemm": _interpreted_int4}


def _draw_int4(rng: random.Random, small: bool) -> tuple[dict[str, int], dict[str, Hashable]]:
    """Sizes that are no multiple of anything, and that wrap every pipeline when they are not small."""
    M = rng.choice((1, 2, 3, 5, 8, 13) if small else (1, 2, 3, 5, 8, 16, 17, 31, 33, 64, 70, 129, 257))
    K, N = rng.randint(1, 300 if small else 2300), rng.randint(1, 100 if small else 400)
    group_size = min(rng.choice((16, 32, 64, 96, 128, K)), K)
    axes = {"M": M, "K": K, "N": N, "G": -(-K // group_size), "R": -(-K // 8)}
    return axes, {"group_size": group_size, "symmetric": rng.random() < 0.5}


def _limit_int4(problem: Problem, inputs: Mapping[str, Any], exact: torch.Tensor) -> torch.Tensor:
    """Float32 sums in any order, one rounding of the result, and weights that were rounded to the activations' dtype.

    Terms of the sum are bounded with the zero point left in, 0x80 + code at most, as kernels that subtract
    zero * sum(x) have them (Higham's gamma). Rounding the weights is bounded by seven standard deviations.
    """
    canonical = {name: inputs[name] for name in ("codes", "scales", "zeros", "g_idx", "bias", "group_size")}
    weight, x = as_weight(inputs["x"], **canonical), inputs["x"].double()
    scales = weight.scales.double()[weight.groups()].abs()
    sums = x.abs() @ (scales * 144) * gamma(problem["K"] + 8, torch.float32)
    rounded = (x.square() @ dequantize(weight, torch.float64).square()).sqrt() * 4 * unit_roundoff(problem.dtype)
    bias = 0.0 if weight.bias is None else weight.bias.double().abs() * unit_roundoff(problem.dtype)
    # The product may be rounded before the bias is added.
    result = exact.abs() * 2.02 * unit_roundoff(problem.dtype)
    return cast("torch.Tensor", sums + rounded + 2 * bias + result)


def _draw_greedy(rng: random.Random, small: bool) -> tuple[dict[str, int], dict[str, Hashable]]:
    B, longest = rng.randint(1, 6 if small else 70), rng.randint(1, 7)
    V = rng.randint(1, 2000 if small else 130_000)
    return {"T": rng.randint(0, B * longest), "B": B, "V": V, "max_spec_len": longest}, {}


_SPECIAL: dict[str, tuple[Draw, Limit | None]] = {
    "int4_gemm": (_draw_int4, _limit_int4),
    "spec_verify_greedy": (_draw_greedy, None),
}
