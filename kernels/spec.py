"""One object per op: what its arguments are, what it computes, what it costs and how exact it must be.

Checks at the boundary, tests, benchmarks, `tokenmill doctor` and the documentation all read the same `OpSpec`,
so a shape or a dtype is written down once.

Shapes are tuples of *axis symbols*: a name (`"M"`), a number (`1`), or a name with one operation and a number
(`"K // 8"`, `"max_spec_len + 1"`). A name is bound by the first tensor that carries it alone, or by the integer
argument of that name; every other occurrence must agree.
"""

import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from tokenmill.errors import InputError
from tokenmill.kernels.numerics import Tolerance

Layout = Literal["contiguous", "rows", "any"]

_DERIVED = re.compile(r"^(\w+) (//|\*|\+|-) (\d+)$")
_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "//": lambda left, right: left // right,
    "*": lambda left, right: left * right,
    "+": lambda left, right: left + right,
    "-": lambda left, right: left - right,
}


def axis_size(axis: str | int, axes: Mapping[str, int]) -> int:
    """The size of one axis symbol under a binding of names; KeyError when a name is unbound."""
    if isinstance(axis, int):
        return axis
    derived = _DERIVED.match(axis)
    if derived is None:
        return axes[axis]
    name, operation, number = derived.groups()
    return _OPERATIONS[operation](axes[name], int(number))


@dataclass(frozen=True)
class TensorSpec:
    """One tensor argument or result.

    Attributes:
        name: The argument's name in the public function.
        shape: Axis symbols, outermost first.
        dtypes: The dtypes it may have.
        doc: One sentence: what it holds, in which units.
        optional: Whether None is accepted.
        layout: `contiguous`; `rows`: the last axis has stride 1, outer strides are free; `any`.
        same_dtype_as: The argument whose dtype this one must share.
    """

    name: str
    shape: tuple[str | int, ...]
    dtypes: tuple[torch.dtype, ...]
    doc: str = ""
    optional: bool = False
    layout: Layout = "contiguous"
    same_dtype_as: str | None = None

    def sizes(self, axes: Mapping[str, int]) -> tuple[int, ...]:
        """The concrete shape under a binding of the axis names."""
        return tuple(axis_size(axis, axes) for axis in self.shape)


@dataclass(frozen=True)
class Problem:
    """One concrete size of an op: all that an implementation needs to say whether it can do it.

    Attributes:
        op: The op's name.
        axes: Axis name to size.
        dtype: The dtype of the op's defining argument (`OpSpec.dtype_of`).
        device: Where the tensors are.
        options: Whatever else selects code: group size, activation bits, symmetric or not.
    """

    op: str
    axes: Mapping[str, int]
    dtype: torch.dtype
    device: torch.device
    options: Mapping[str, Hashable] = field(default_factory=dict)

    def __getitem__(self, axis: str) -> int:
        return self.axes[axis]

    def __str__(self) -> str:
        parts = [f"{name}={size}" for name, size in self.axes.items()]
        parts += [f"{name}={value}" for name, value in self.options.items()]
        return f"{self.op}({', '.join(parts)}, {short_dtype(self.dtype)}) on {self.device}"


@dataclass(frozen=True)
class OpSpec:
    """Everything about an op that does not depend on how it is implemented.

    Attributes:
        name: The public function's name and that of `torch.ops.tokenmill.<name>`.
        doc: One sentence.
        axes: Axis symbol to its meaning.
        inputs: Tensor arguments in the public function's order.
        outputs: The results.
        scalars: Names of integer arguments; they bind axes of the same name.
        dtype_of: The input whose dtype is the problem's.
        reference: The specification: the plainest torch, same keyword arguments as the public function.
        make_inputs: (problem, CPU generator) to keyword arguments of the public function, on the CPU.
        flops: Arithmetic operations of a problem.
        bytes_moved: Bytes that must cross the memory bus at least once.
        tolerance: How near the reference an implementation must be.
        implementations: Implementation name to `module:attribute` of its `registry.Implementation`; `reference`
            is added by the registry.
        examples: Axis sizes that tests, doctor and benchmarks use; the first is the typical one.
        options: The defaults of `Problem.options`.
    """

    name: str
    doc: str
    axes: Mapping[str, str]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dtype_of: str
    reference: Callable[..., Any]
    make_inputs: Callable[[Problem, torch.Generator], dict[str, Any]]
    flops: Callable[[Problem], int]
    bytes_moved: Callable[[Problem], int]
    tolerance: Tolerance
    implementations: Mapping[str, str]
    examples: tuple[Mapping[str, int], ...]
    scalars: tuple[str, ...] = ()
    options: Mapping[str, Hashable] = field(default_factory=dict)

    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes of the defining argument."""
        return next(tensor.dtypes for tensor in self.inputs if tensor.name == self.dtype_of)

    def problem(
        self,
        axes: Mapping[str, int] | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        **options: Hashable,
    ) -> Problem:
        """A problem by its sizes; without arguments the typical one. InputError names an unknown or missing axis."""
        sizes = dict(self.examples[0] if axes is None else axes)
        if sizes.keys() != self.axes.keys():
            raise InputError(f"{self.name} got sizes for {sorted(sizes)}; give exactly {sorted(self.axes)}")
        merged = {**self.options, **options}
        return Problem(self.name, sizes, dtype or self.dtypes()[0], torch.device(device), merged)

    def inputs_for(self, problem: Problem, seed: int = 0) -> dict[str, Any]:
        """Seeded keyword arguments of the public function; the same numbers on every device."""
        generator = torch.Generator().manual_seed(seed)
        made = self.make_inputs(problem, generator)
        return {
            name: value.to(problem.device) if isinstance(value, torch.Tensor) else value for name, value in made.items()
        }


def short_dtype(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")
