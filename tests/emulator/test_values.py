"""The primitives' results against what torch and plain Python compute."""

import itertools
from collections.abc import Callable

import pytest
import torch

from tokenmill.kernels.emulator import EmulatedLibrary

pytestmark = pytest.mark.emulator

Kernels = Callable[[str], EmulatedLibrary]
TYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8)


def operand(rows: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, 32 bytes] random operand, and its values in float64."""
    generator = torch.Generator().manual_seed(seed)
    columns = 32 // dtype.itemsize
    values = torch.randint(-127, 128, (rows, columns), generator=generator).to(torch.float64)
    tensor = values.to(dtype) if dtype is torch.int8 else (values / 32).to(torch.float32).to(dtype)
    return tensor, tensor.to(torch.float64)


@pytest.mark.parametrize("kind", range(4), ids=["bf16", "f16", "e4m3", "s8"])
def test_wgmma_of_every_n(kernels: Kernels, kind: int) -> None:
    library = kernels("values")
    sizes = [n for n in range(8, 257, 8) if kind < 3 or n <= 24 or n % 16 == 0]
    for n, shared in itertools.product(sizes, (0, 1)):
        a, exact_a = operand(64, TYPES[kind], n)
        b, exact_b = operand(n, TYPES[kind], n + 1)
        d = torch.full((64, n), -1, dtype=torch.int32)
        library.configure(seed=n)
        library.run("wgmma", kind, n, shared, a, b, d)
        found = d.to(torch.float64) if kind == 3 else d.view(torch.float32).to(torch.float64)
        exact = exact_a @ exact_b.T
        bound = 32 * 2.0**-24 * (exact_a.abs() @ exact_b.abs().T)
        assert bool(((found - exact).abs() <= bound).all()), (n, shared)


@pytest.mark.parametrize("kind", range(4), ids=["bf16", "f16", "e4m3", "s8"])
def test_mma_with_ldmatrix(kernels: Kernels, kind: int) -> None:
    a, exact_a = operand(16, TYPES[kind], 1)
    b, exact_b = operand(8, TYPES[kind], 2)
    start = torch.arange(128, dtype=torch.int32).view(16, 8)
    d = start.clone() if kind == 3 else start.to(torch.float32)
    kernels("values").run("one_mma", kind, a, b, d)
    exact = start.to(torch.float64) + exact_a @ exact_b.T
    bound = 33 * 2.0**-24 * (start + exact_a.abs() @ exact_b.abs().T)
    assert bool(((d.to(torch.float64) - exact).abs() <= bound).all())


def swizzle(address: int, mode: int) -> int:
    """PTX ISA: the 16-byte chunk's number is XORed with the number of the 128-byte row, as far as the mode reaches."""
    chunks = {0: 1, 1: 2, 2: 4, 3: 8}[mode]
    return address ^ (address // 128 % chunks * 16)


@pytest.mark.parametrize(
    ("size", "box", "origin", "mode"),
    [
        ((40,), (24,), (24,), 0),
        ((40,), (24,), (-8,), 0),
        ((100, 40), (64, 24), (90, 33), 3),
        ((100, 40), (64, 24), (-8, -5), 3),
        ((100, 40), (32, 9), (16, 3), 2),
        ((100, 40), (16, 17), (0, 30), 1),
        ((72, 6, 5), (64, 3, 2), (16, 4, -1), 3),
        ((24, 5, 4, 3), (16, 2, 3, 2), (16, -1, 2, 1), 0),
        ((24, 5, 4, 3, 2), (8, 2, 3, 2, 2), (20, 4, 2, -1, 1), 0),
    ],
)
def test_tma_box(
    kernels: Kernels, size: tuple[int, ...], box: tuple[int, ...], origin: tuple[int, ...], mode: int
) -> None:
    rank = len(size)
    pitch = [(size[0] + 7) // 8 * 8 + 8, *size[1:]]  # rows are padded
    source = torch.arange(1, 1 + torch.Size(pitch).numel(), dtype=torch.int16).view(*reversed(pitch))
    strides = [source.stride(rank - 1 - i) * 2 for i in range(rank)]
    target = torch.full_like(source, -7)
    elements = torch.Size(box).numel()
    raw = torch.full((elements,), -1, dtype=torch.int16)

    def padded(values: tuple[int, ...] | list[int]) -> list[int]:
        return [*values, *[0] * (5 - rank)]

    shape = torch.tensor([*padded(size), *padded(strides), *padded(box), *padded(origin)])
    library = kernels("values")
    library.reset()
    library.configure(mode="late")
    device = library.upload(source), library.upload(target), library.upload(raw)
    # the launcher reads the shape on the host
    status = library.call("box", *device, shape.data_ptr(), rank, mode, None)
    assert status == 0, library.reports()
    expected_raw, expected_target = [0] * elements, target.clone()
    for linear, index in enumerate(itertools.product(*(range(extent) for extent in reversed(box)))):
        at = [o + i for o, i in zip(reversed(origin), index, strict=True)]
        if all(0 <= c < extent for c, extent in zip(at, reversed(size), strict=True)):
            value = int(source[tuple(at)])
            expected_raw[swizzle(2 * linear, mode) // 2] = value
            expected_target[tuple(at)] = value
    assert library.download(device[2], (elements,), torch.int16).tolist() == expected_raw
    assert torch.equal(library.download(device[1], source.shape, torch.int16), expected_target)


@pytest.mark.parametrize(("amount", "width"), [(0, 32), (1, 32), (5, 8), (9, 16), (31, 32), (3, 2)])
def test_warp_operations(kernels: Kernels, amount: int, width: int) -> None:
    values = torch.randint(-(2**31), 2**31, (32,), generator=torch.Generator().manual_seed(amount)).to(torch.int32)
    out = torch.full((288,), -1, dtype=torch.int32)
    kernels("values").run("warp", values, out, amount, width)
    v, got = values.tolist(), out.view(9, 32).tolist()
    segment = [lane // width * width for lane in range(32)]
    assert got[0] == [v[s + amount % width] for s in segment]
    assert got[1] == [v[lane ^ amount] if lane ^ amount < s + width else v[lane] for lane, s in enumerate(segment)]
    assert got[2] == [v[lane - amount] if lane - amount >= s else v[lane] for lane, s in enumerate(segment)]
    assert got[3] == [v[lane + amount] if lane + amount < s + width else v[lane] for lane, s in enumerate(segment)]
    assert {x % 2**32 for x in got[4]} == {sum(v) % 2**32}
    assert set(got[5]) == {min(v)}
    assert {x % 2**32 for x in got[6]} == {max(x % 2**32 for x in v)}
    assert {x % 2**32 for x in got[7]} == {sum((x & 1) << lane for lane, x in enumerate(v))}
    assert set(got[8]) == {1}


def bits_to_float(words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return words.view(dtype).to(torch.float64)


def equal_or_both_nan(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool(((found == expected) | (found.isnan() & expected.isnan())).all())


def test_packed_arithmetic_rounds_once(kernels: Kernels) -> None:
    n = 4000
    generator = torch.Generator().manual_seed(3)
    a, b, c = (torch.randint(-(2**31), 2**31, (n,), generator=generator).to(torch.int32) for _ in range(3))
    # half of the words: near cancellation, where rounding twice would show
    c[::2] = (c[::2] & 0x00FF00FF) | 0x3F003F00
    out = torch.full((8, n), -1, dtype=torch.int32)
    kernels("values").run("packed", a, b, c, out, n)
    for row, dtype, expected in (
        (2, torch.bfloat16, lambda x, y: x + y),
        (3, torch.float16, lambda x, y: x * y),
    ):
        x, y = bits_to_float(a, dtype), bits_to_float(b, dtype)
        exact = expected(x, y).to(torch.float32).to(dtype).to(torch.float64)
        assert equal_or_both_nan(bits_to_float(out[row], dtype), exact), row
    for row, dtype in ((0, torch.bfloat16), (1, torch.float16)):
        x, y, z = (bits_to_float(t, dtype) for t in (a, b, c))
        found, exact = bits_to_float(out[row], dtype), x * y + z
        neighbours = found.to(dtype)
        away = torch.nextafter(neighbours, torch.full_like(neighbours, float("inf"))).to(torch.float64)
        below = torch.nextafter(neighbours, torch.full_like(neighbours, float("-inf"))).to(torch.float64)
        finite = found.isfinite() & away.isfinite() & below.isfinite()
        nearest = (found - exact).abs() <= torch.minimum((away - exact).abs(), (below - exact).abs())
        assert bool(nearest[finite].all()), row
        assert int(finite.sum()) > n // 4
    x, y = a.view(torch.float32), b.view(torch.float32)
    for row, dtype in ((4, torch.bfloat16), (5, torch.float16)):
        pair = torch.stack((x, y), 1).to(dtype).to(torch.float64)
        assert equal_or_both_nan(bits_to_float(out[row], dtype).view(n, 2), pair), row
    clamped = torch.stack((x, y), 1).clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.float64)
    found = out[6].contiguous().view(torch.float8_e4m3fn).to(torch.float64).view(n, 4)
    assert equal_or_both_nan(found[:, :2], clamped)
    low = a.contiguous().view(torch.float8_e4m3fn).to(torch.float64).view(n, 4)[:, :2]
    assert equal_or_both_nan(bits_to_float(out[7], torch.float16).view(n, 2), low)
