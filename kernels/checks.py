"""The boundary of every op: shapes, dtypes, devices and layouts against the `OpSpec`, before any kernel runs.

Each failure is one line with the value, the limit and the remedy (`errors.InputError`).
"""

from collections.abc import Hashable, Mapping
from typing import Any

import torch

from tokenmill.errors import InputError
from tokenmill.kernels.spec import OpSpec, Problem, TensorSpec, axis_size, short_dtype


def bind(spec: OpSpec, arguments: Mapping[str, Any], **options: Hashable) -> Problem:
    """Checks the arguments of one call and returns the problem they form.

    Args:
        spec: The op.
        arguments: Keyword arguments of the public function: every tensor of `spec.inputs` and every integer of
            `spec.scalars`.
        options: What else selects code; overrides `spec.options`.

    Raises:
        InputError: A shape, dtype, device, layout or integer is not what the spec says.
    """
    axes: dict[str | int, int] = {name: _integer(spec, name, arguments[name]) for name in spec.scalars}
    bound_by: dict[str | int, str] = dict.fromkeys(axes, "the argument of that name")
    derived: list[tuple[TensorSpec, torch.Tensor, int]] = []
    first: TensorSpec | None = None
    device = torch.device("cpu")
    for tensor in spec.inputs:
        value = arguments.get(tensor.name)
        if value is None and tensor.optional:
            continue
        if not isinstance(value, torch.Tensor):
            raise InputError(f"{tensor.name} of {spec.name} is {type(value).__name__}; pass a torch.Tensor")
        _check_form(spec, tensor, value, arguments)
        if first is None:
            first, device = tensor, value.device
        elif value.device != device:
            raise InputError(
                f"{tensor.name} is on {value.device} but {first.name} is on {device}; move it with .to({str(device)!r})"
            )
        for position, (axis, size) in enumerate(zip(tensor.shape, value.shape, strict=True)):
            if axis in axes:
                if size != axes[axis]:
                    raise InputError(_size_message(tensor, size, position, axes[axis], bound_by))
            elif axis in spec.axes:
                axes[axis] = size
                bound_by[axis] = tensor.name
            else:
                derived.append((tensor, value, position))
    names = {name: axes[name] for name in spec.axes}
    for tensor, value, position in derived:
        expected = axis_size(tensor.shape[position], names)
        if value.shape[position] != expected:
            raise InputError(_size_message(tensor, value.shape[position], position, expected, bound_by))
    merged = {**spec.options, **options} if options else spec.options
    return Problem(spec.name, names, arguments[spec.dtype_of].dtype, device, merged)


def check_output(tensor: TensorSpec, value: torch.Tensor, problem: Problem) -> None:
    """A caller's output buffer has the shape, dtype and device of the result and is contiguous.

    Raises:
        InputError: It has not.
    """
    sizes = tensor.sizes(problem.axes)
    # A result shares its dtype with no other argument than the one that gives the problem its own.
    dtypes = tensor.dtypes if tensor.same_dtype_as is None else (problem.dtype,)
    if tuple(value.shape) != sizes or value.dtype not in dtypes or value.device != problem.device:
        raise InputError(
            f"{tensor.name} is {short_dtype(value.dtype)} {list(value.shape)} on {value.device}; the result is "
            f"{short_dtype(dtypes[0])} {list(sizes)} on {problem.device}; pass such a buffer or None"
        )
    if not value.is_contiguous():
        raise InputError(f"{tensor.name} has strides {value.stride()}; pass a contiguous buffer or None")


def _integer(spec: OpSpec, name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InputError(f"{name}={value!r} of {spec.name} is not a non-negative integer; pass an int >= 0")
    return value


def _check_form(spec: OpSpec, tensor: TensorSpec, value: torch.Tensor, arguments: Mapping[str, Any]) -> None:
    if value.dim() != len(tensor.shape):
        shape = ", ".join(str(axis) for axis in tensor.shape)
        raise InputError(f"{tensor.name} has shape {list(value.shape)}; {spec.name} takes [{shape}]; reshape it")
    if value.dtype not in tensor.dtypes:
        accepted = " or ".join(short_dtype(dtype) for dtype in tensor.dtypes)
        raise InputError(
            f"{tensor.name} has dtype {short_dtype(value.dtype)}; {spec.name} takes {accepted}; "
            f"convert it with .to({tensor.dtypes[0]})"
        )
    if tensor.same_dtype_as is not None:
        other = arguments[tensor.same_dtype_as].dtype
        if value.dtype != other:
            raise InputError(
                f"{tensor.name} has dtype {short_dtype(value.dtype)} but {tensor.same_dtype_as} has "
                f"{short_dtype(other)}; convert it with .to({other})"
            )
    if tensor.layout == "contiguous" and not value.is_contiguous():
        raise InputError(f"{tensor.name} has strides {value.stride()}; pass {tensor.name}.contiguous()")
    if tensor.layout == "rows" and value.shape[-1] > 1 and value.stride(-1) != 1:
        raise InputError(
            f"{tensor.name} has stride {value.stride(-1)} along its last axis; it must be 1; "
            f"pass {tensor.name}.contiguous()"
        )


def _size_message(
    tensor: TensorSpec, size: int, position: int, expected: int, bound_by: Mapping[str | int, str]
) -> str:
    axis = tensor.shape[position]
    found = f"{tensor.name} has {size} along axis {position}"
    if isinstance(axis, int):
        return f"{found}; it must be {axis}; pass shape [{', '.join(map(str, tensor.shape))}]"
    source = bound_by.get(axis.split(" ")[0], "the spec")
    return f"{found}, where {axis} = {expected} by {source}; pass tensors of one problem"
