"""Every wrong argument is answered with its value, the limit and the remedy, in one line."""

from typing import Any

import pytest
import torch

from tokenmill.errors import InputError
from tokenmill.kernels import checks
from tokenmill.kernels.numerics import EXACT
from tokenmill.kernels.spec import OpSpec, TensorSpec

FLOATS = (torch.float32, torch.bfloat16)
#: An op with every kind of axis: plain, constant, derived, and bound by an integer argument.
SPEC = OpSpec(
    name="sample",
    doc="For these tests only.",
    axes={"M": "rows", "K": "columns", "extra": "more rows of the result"},
    inputs=(
        TensorSpec("x", ("M", "K"), FLOATS, layout="rows"),
        TensorSpec("packed", ("K // 8", 2), (torch.int32,)),
        TensorSpec("scale", ("K",), FLOATS, same_dtype_as="x", optional=True),
    ),
    outputs=(TensorSpec("out", ("extra + 1", "M"), FLOATS, same_dtype_as="x"),),
    scalars=("extra",),
    dtype_of="x",
    reference=lambda **arguments: arguments["x"],
    make_inputs=lambda problem, generator: {},
    flops=lambda problem: 0,
    bytes_moved=lambda problem: 0,
    tolerance=EXACT,
    implementations={},
    examples=({"M": 3, "K": 16, "extra": 1},),
    options={"mode": "plain"},
)


def arguments(**changes: Any) -> dict[str, Any]:
    given = {"x": torch.ones(3, 16), "packed": torch.ones(2, 2, dtype=torch.int32), "scale": torch.ones(16), "extra": 1}
    return {**given, **changes}


def test_binds_every_axis_the_dtype_the_device_and_the_options() -> None:
    problem = checks.bind(SPEC, arguments(), mode="fast")
    assert dict(problem.axes) == {"M": 3, "K": 16, "extra": 1}
    assert (problem.dtype, problem.device, problem.options) == (torch.float32, torch.device("cpu"), {"mode": "fast"})
    assert str(problem) == "sample(M=3, K=16, extra=1, mode=fast, float32) on cpu"


def test_optional_tensor_may_be_none_and_empty_axes_bind() -> None:
    problem = checks.bind(SPEC, arguments(x=torch.ones(0, 16), scale=None))
    assert problem["M"] == 0
    assert problem.options == {"mode": "plain"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(3)}, r"x has shape \[3\]; sample takes \[M, K\]; reshape it"),
        ({"x": torch.ones(3, 16).double()}, r"x has dtype float64; sample takes float32 or bfloat16; convert"),
        ({"x": torch.ones(16, 3).t()}, r"x has stride 3 along its last axis; it must be 1; pass x\.contiguous\(\)"),
        ({"packed": torch.ones(2, 4, dtype=torch.int32)[:, ::2]}, r"packed has strides \(4, 2\); pass packed\.contig"),
        ({"packed": torch.ones(3, 2, dtype=torch.int32)}, r"packed has 3 along axis 0, where K // 8 = 2 by x; pass"),
        ({"packed": torch.ones(2, 3, dtype=torch.int32)}, r"packed has 3 along axis 1; it must be 2; pass shape"),
        ({"scale": torch.ones(15)}, r"scale has 15 along axis 0, where K = 16 by x; pass tensors of one problem"),
        ({"scale": torch.ones(16).bfloat16()}, r"scale has dtype bfloat16 but x has float32; convert it"),
        ({"scale": torch.ones(16, device="meta")}, r"scale is on meta but x is on cpu; move it with \.to\('cpu'\)"),
        ({"x": [[1.0]]}, r"x of sample is list; pass a torch\.Tensor"),
        ({"x": None}, r"x of sample is NoneType; pass a torch\.Tensor"),
        ({"extra": -1}, r"extra=-1 of sample is not a non-negative integer"),
        ({"extra": True}, r"extra=True of sample is not a non-negative integer"),
        ({"extra": 1.5}, r"extra=1\.5 of sample is not a non-negative integer"),
    ],
)
def test_refuses_with_value_limit_and_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        checks.bind(SPEC, arguments(**changes))
    assert "\n" not in str(caught.value)


def test_strided_rows_are_accepted_where_the_spec_says_rows() -> None:
    assert checks.bind(SPEC, arguments(x=torch.ones(3, 32)[:, :16]))["K"] == 16


@pytest.mark.parametrize(
    "buffer",
    [
        torch.empty(2, 4),
        torch.empty(2, 3, dtype=torch.float64),
        torch.empty(2, 3, dtype=torch.bfloat16),
        torch.empty(2, 3, device="meta"),
        torch.empty(3, 2).t(),
    ],
    ids=["shape", "dtype", "dtype of another x", "device", "strides"],
)
def test_an_output_buffer_must_fit(buffer: torch.Tensor) -> None:
    problem = checks.bind(SPEC, arguments())
    checks.check_output(SPEC.outputs[0], torch.empty(2, 3), problem)
    with pytest.raises(InputError, match=r"out .*buffer or None"):
        checks.check_output(SPEC.outputs[0], buffer, problem)
