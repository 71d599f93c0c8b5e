"""Bounds are the textbook's, and comparisons find what they must find and name the place."""

import pytest
import torch

from tokenmill.errors import InputError
from tokenmill.kernels import numerics
from tokenmill.kernels.numerics import Fenced, Tolerance, assert_bit_equal, assert_within, poisoned


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.float32, 24), (torch.bfloat16, 8), (torch.float16, 11), (torch.float64, 53)]
)
def test_unit_roundoff(dtype: torch.dtype, bits: int) -> None:
    assert numerics.unit_roundoff(dtype) == 2.0**-bits


def test_gamma_bounds_the_error_of_a_sum() -> None:
    values = torch.rand(1000, generator=torch.Generator().manual_seed(3)).bfloat16()
    total = torch.zeros((), dtype=torch.bfloat16)
    for value in values:
        total = total + value
    error = abs(float(total) - float(values.double().sum()))
    with pytest.raises(InputError, match=r"1000 terms has no error bound in torch\.bfloat16"):
        numerics.gamma(1000, torch.bfloat16)
    assert error > numerics.gamma(999, torch.float32) * float(values.double().sum())
    assert abs(float(values.float().sum()) - float(values.double().sum())) <= (
        numerics.gamma(999, torch.float32) * float(values.double().sum())
    )


def test_tolerance_is_a_multiple_of_the_same_dtype_error_and_at_least_one_rounding() -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    torch_result = torch.tensor([1.0, 2.0 + 2**-4], dtype=torch.bfloat16)
    assert Tolerance().bound(exact, torch_result) == 2 * 2**-4
    assert Tolerance().bound(exact, exact.bfloat16()) == 2 * 2.0 * 2**-8
    assert Tolerance(exact=True).bound(exact, torch_result) == 0.0
    assert Tolerance().bound(exact[:0], torch_result[:0]) == 0.0


def test_bit_equality_names_the_first_coordinate() -> None:
    left = torch.zeros(3, 4)
    right = left.clone()
    assert_bit_equal(left, right)
    right[1, 2] = 1.0
    right[2, 0] = 2.0
    with pytest.raises(AssertionError, match=r"y: 2 of 12 values differ in their bits; the first at \[1, 2\]: 0\.0"):
        assert_bit_equal(left, right, "y")


def test_bit_equality_sees_the_sign_of_zero_and_accepts_equal_nans() -> None:
    assert_bit_equal(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    with pytest.raises(AssertionError, match="in their bits"):
        assert_bit_equal(torch.tensor(0.0), torch.tensor(-0.0))
    with pytest.raises(AssertionError, match="dtype"):
        assert_bit_equal(torch.zeros(1), torch.zeros(1).bfloat16())
    with pytest.raises(AssertionError, match="shape"):
        assert_bit_equal(torch.zeros(1), torch.zeros(2))


def test_within_a_bound() -> None:
    exact = torch.tensor([[1.0, float("inf")], [float("nan"), 4.0]], dtype=torch.float64)
    near = exact.float()
    near[1, 1] += 0.25
    assert_within(near, exact, 0.25)
    with pytest.raises(AssertionError, match=r"1 of 4 values differ by more than 0\.2 .* the first at \[1, 1\]: 4\.25"):
        assert_within(near, exact, 0.2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_nan_or_infinity_on_one_side_is_never_within(bad: float) -> None:
    with pytest.raises(AssertionError):
        assert_within(torch.tensor([bad]), torch.tensor([1.0]), 1e30)
    with pytest.raises(AssertionError):
        assert_within(torch.tensor([1.0]), torch.tensor([bad]), 1e30)


def test_a_bound_may_differ_by_place() -> None:
    exact = torch.tensor([1.0, 100.0])
    assert_within(exact + torch.tensor([0.0, 1.0]), exact, torch.tensor([0.01, 2.0]))
    with pytest.raises(AssertionError, match=r"at \[0\]"):
        assert_within(exact + 1, exact, torch.tensor([0.01, 2.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.uint8, torch.int64])
def test_poison_is_unlike_a_result(dtype: torch.dtype) -> None:
    buffer = poisoned((2, 3), dtype)
    assert bool(buffer.isnan().all()) if dtype.is_floating_point else bool((buffer != 0).all())


@pytest.mark.parametrize(("dtype", "offset"), [(torch.float32, -1), (torch.int32, 6), (torch.bfloat16, 6)])
def test_a_fence_sees_a_write_outside(dtype: torch.dtype, offset: int) -> None:
    fenced = Fenced((2, 3), dtype)
    assert fenced.tensor.data_ptr() % 64 == 0
    fenced.tensor.fill_(0)
    fenced.check()
    fenced.tensor.as_strided((1,), (1,), fenced.tensor.storage_offset() + offset).fill_(0)
    with pytest.raises(AssertionError, match="below" if offset < 0 else "above"):
        fenced.check()
