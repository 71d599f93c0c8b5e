"""What the machine can do at most, measured in the same process as what is compared with it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from tokenmill.bench import timing

#: Bytes that one measurement of the bandwidth reads; many times any cache.
_READ_BYTES = 512 << 20
#: Input features of the matrices that are read; rows are many.
_COLUMNS = 4096
#: Size of the square matrices whose product gives the arithmetic rate.
_MATRIX = 1536


@dataclass(frozen=True)
class Roofs:
    """Measured limits of a machine.

    Attributes:
        read_bytes_per_second: Streaming reads by all threads.
        flops_per_second: Of the best torch dtype on large square matrices.
        flops_dtype: That dtype.
    """

    read_bytes_per_second: float
    flops_per_second: float
    flops_dtype: str

    def raised(self, reads: Iterable[float], rates: Iterable[float]) -> "Roofs":
        """The same, no lower than what was seen: torch's readers are not always the fastest stream.

        Args:
            reads: Bytes per second that kernels moved.
            rates: FLOP per second that kernels of 16-bit or wider arithmetic computed.
        """
        return Roofs(max([self.read_bytes_per_second, *reads]), max([self.flops_per_second, *rates]), self.flops_dtype)

    def floor_seconds(self, nbytes: int, flops: int) -> float:
        """The time below which no kernel of that arithmetic can be: the longer of reading and computing.

        Int8 arithmetic is not in `flops_per_second`, so a kernel with quantised activations may be faster than the
        arithmetic part of its floor.
        """
        return max(nbytes / self.read_bytes_per_second, flops / self.flops_per_second)


def measure_cpu() -> Roofs:
    """The roofs of this CPU with torch's threads: the best of several ways to read, and of torch's dtypes.

    A roof is the least time seen: disturbance only ever adds to it.
    """
    numbers = torch.ones(_READ_BYTES // 4)
    halves = torch.ones(_READ_BYTES // 2 // _COLUMNS, _COLUMNS, dtype=torch.float16)
    vector, half_vector = torch.ones(_COLUMNS), torch.ones(1, _COLUMNS, dtype=torch.float16)
    readers: dict[str, Callable[[], object]] = {
        "sum": numbers.sum,
        "max": numbers.max,
        "matrix times vector": lambda: torch.mv(numbers.view(-1, _COLUMNS), vector),
        "half-precision matrix times vector": lambda: torch.nn.functional.linear(half_vector, halves),
    }
    reads = timing.take_turns(readers, rounds=7, burst_seconds=0.05)
    fastest_read = min(sample.least for sample in reads.values())
    products: dict[str, Callable[[], object]] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        square = torch.randn(_MATRIX, _MATRIX, generator=torch.Generator().manual_seed(0)).to(dtype)
        name = str(dtype).removeprefix("torch.")
        products[name] = lambda square=square: torch.nn.functional.linear(square, square)  # type: ignore[misc]
    rates = timing.take_turns(products, rounds=5, burst_seconds=0.02)
    best = min(rates, key=lambda name: rates[name].least)
    return Roofs(_READ_BYTES / fastest_read, 2 * _MATRIX**3 / rates[best].least, best)
