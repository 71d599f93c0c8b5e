"""How near is near enough, derived from the dtype and the computation, and comparisons that name coordinates.

Error bounds follow Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed.: rounding once to a dtype
loses a relative `unit_roundoff`, and a sum of n products loses at most `gamma(n)` of the sum of their magnitudes.
"""

from dataclasses import dataclass

import torch

from tokenmill.errors import InputError

#: What `poisoned` fills floating tensors with; a kernel that reads or leaves it shows up as NaN.
_INTEGER_POISON = 0x5A


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding a real number to nearest in `dtype`: 2**-24 for float32."""
    return torch.finfo(dtype).eps / 2


def gamma(terms: int, dtype: torch.dtype) -> float:
    """Higham's gamma_n = n u / (1 - n u): the relative error bound of n accumulated roundings in `dtype`.

    Raises:
        InputError: n u reaches 1, so no bound exists.
    """
    product = terms * unit_roundoff(dtype)
    if product >= 1:
        raise InputError(f"a sum of {terms} terms has no error bound in {dtype}; accumulate in a wider dtype")
    return product / (1 - product)


def max_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest absolute difference, computed in float64; NaN where one side alone is NaN, 0 for empty tensors."""
    if actual.numel() == 0:
        return 0.0
    left, right = actual.double(), exact.double()
    difference = (left - right).abs()
    agree = (left == right) | (left.isnan() & right.isnan())
    return float(torch.where(agree, torch.zeros_like(difference), difference).max())


@dataclass(frozen=True)
class Tolerance:
    """How near the exact result an implementation must be.

    Attributes:
        exact: Bit equality with the reference: integers, copies, selections.
        factor: Otherwise: how many times the error of plain torch in the same dtype is allowed. 2 is the usual
            choice: another order of summation is as good as torch's, a missing term or a wrong rounding is not.
    """

    exact: bool = False
    factor: float = 2.0

    def bound(self, exact: torch.Tensor, same_dtype: torch.Tensor) -> float:
        """The allowed maximal absolute error.

        Args:
            exact: The result in a higher precision.
            same_dtype: Plain torch's result in the dtype under test. Its error is never taken as smaller than one
                rounding of the largest magnitude of the result: on tiny problems torch is exact by luck.
        """
        if self.exact or exact.numel() == 0:
            return 0.0
        one_rounding = unit_roundoff(same_dtype.dtype) * float(exact.double().abs().max())
        return self.factor * max(max_error(same_dtype, exact), one_rounding)


EXACT = Tolerance(exact=True)


def _coordinates(wrong: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(index) for index in wrong.nonzero()[0])


def _complain(what: str, actual: torch.Tensor, expected: torch.Tensor, wrong: torch.Tensor, limit: str) -> None:
    where = _coordinates(wrong)
    raise AssertionError(
        f"{what}: {int(wrong.sum())} of {wrong.numel()} values differ {limit}; the first at {list(where)}: "
        f"{actual[where].item()!r}, expected {expected[where].item()!r}"
    )


def _same_form(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}")


def assert_bit_equal(actual: torch.Tensor, expected: torch.Tensor, what: str = "result") -> None:
    """Every bit is the same, NaN payloads and the sign of zero included; AssertionError names the first coordinate."""
    _same_form(actual, expected, what)
    if actual.dtype != expected.dtype:
        raise AssertionError(f"{what}: dtype {actual.dtype}, expected {expected.dtype}")
    if actual.numel() == 0:
        return
    left, right = actual.detach().cpu().contiguous(), expected.detach().cpu().contiguous()
    size = left.element_size()
    wrong = (left.reshape(-1).view(torch.uint8) != right.reshape(-1).view(torch.uint8)).view(-1, size).any(dim=1)
    if wrong.any():
        _complain(what, left, right, wrong.view(left.shape), "in their bits")


def assert_within(actual: torch.Tensor, exact: torch.Tensor, bound: float | torch.Tensor, what: str = "result") -> None:
    """|actual - exact| <= bound everywhere; a NaN or an infinity must stand in both at the same place.

    Args:
        actual: The result under test, any dtype.
        exact: The result in a higher precision, same shape.
        bound: One number or a tensor that broadcasts, in the units of the result.
        what: Named in the AssertionError, with the first wrong coordinate and both values.
    """
    _same_form(actual, exact, what)
    if actual.numel() == 0:
        return
    left, right = actual.detach().cpu().double(), exact.detach().cpu().double()
    limit = torch.as_tensor(bound, dtype=torch.float64).cpu()
    agree = (left == right) | (left.isnan() & right.isnan()) | ((left - right).abs() <= limit)
    if not agree.all():
        _complain(
            what, left, right, ~agree, f"by more than {float(limit.max()):.3g} (max {max_error(left, right):.3g})"
        )


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: str | torch.device = "cpu") -> torch.Tensor:
    """An output buffer that no correct result resembles: NaN, or a bit pattern for integers."""
    if dtype.is_floating_point:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)
    size = torch.empty((), dtype=dtype).element_size()
    pattern = int.from_bytes(bytes([_INTEGER_POISON]) * size, "little")
    return torch.full(shape, pattern, dtype=dtype, device=device)


class Fenced:
    """A poisoned buffer between two fences of poison, to catch writes outside it.

    `tensor` is the buffer for the kernel; `check` raises AssertionError when a fence was written.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: str | torch.device = "cpu") -> None:
        size = int(torch.Size(shape).numel())
        # Whole cache lines, so that the buffer keeps the alignment torch gives every allocation.
        self._fence = 64 * max(1, -(-max(size, 1) // 64))
        self._whole = poisoned((size + 2 * self._fence,), dtype, device)
        self._before = self._whole.clone()
        self._size = size
        self.tensor = self._whole[self._fence : self._fence + size].view(shape)

    def check(self, what: str = "output") -> None:
        """The fences still hold what they held."""
        for side, part in (("below", slice(0, self._fence)), ("above", slice(self._fence + self._size, None))):
            assert_bit_equal(self._whole[part], self._before[part], f"{what}: memory {side} the buffer")
