"""What the machine can do at most, measured in the same process as what is compared with it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from tokenmill.bench import cuda_timing, timing

#: Bytes that one measurement of the bandwidth reads; many times any cache.
_READ_BYTES = 512 << 20
#: Input features of the matrices that are read; rows are many.
_COLUMNS = 4096
#: Size of the square matrices whose product gives the arithmetic rate.
_MATRIX = 1536
#: The same on a GPU.
_GPU_READ_BYTES, _GPU_MATRIX = 2 << 30, 8192


@dataclass(frozen=True)
class Roofs:
    """Measured limits of a machine.

    Attributes:
        read_bytes_per_second: Streaming reads by all threads.
        flops_per_second: Of the best torch dtype on large square matrices; `raised` may make more of it.
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


@dataclass(frozen=True)
class GpuRoofs:
    """Measured limits of a GPU; a rate that it lacks is None.

    Attributes:
        read_bytes_per_second: Streaming reads.
        copy_bytes_per_second: Device to device, bytes read plus bytes written.
        bf16_flops_per_second: Of torch's product of random 8192 x 8192 matrices.
        fp8_flops_per_second: The same in e4m3.
        launch_seconds: Between the starts of dependent small kernels of one CUDA graph.
    """

    read_bytes_per_second: float
    copy_bytes_per_second: float
    bf16_flops_per_second: float
    fp8_flops_per_second: float | None
    launch_seconds: float

    def roofs(self) -> Roofs:
        """Those that floors are computed from."""
        return Roofs(self.read_bytes_per_second, self.bf16_flops_per_second, "bfloat16")


def measure_gpu(device: torch.device) -> GpuRoofs:
    """The roofs of a GPU: the least time seen of several samples, on random data."""
    generator = torch.Generator(device).manual_seed(0)
    halves = torch.randn(_GPU_READ_BYTES // 2 // _COLUMNS, _COLUMNS, device=device, generator=generator).bfloat16()
    other, one = torch.empty_like(halves), torch.ones(_COLUMNS, dtype=torch.bfloat16, device=device)
    square = torch.randn(_GPU_MATRIX, _GPU_MATRIX, device=device, generator=generator).bfloat16()
    small = torch.zeros(1, device=device)
    calls: dict[str, list[Callable[[], object]]] = {
        "max": [halves.max],
        "matrix times vector": [lambda: torch.mv(halves, one)],
        "sum": [lambda: halves.view(torch.int32).sum(dtype=torch.int32)],
        "copy": [lambda: other.copy_(halves)],
        "bf16": [lambda: torch.mm(square, square)],
        "launch": [lambda: small.add_(1)] * 1000,
    }
    if torch.cuda.get_device_capability(device) >= (8, 9):
        eighth, scale = square.to(torch.float8_e4m3fn), torch.ones((), device=device)
        calls["fp8"] = [lambda: torch._scaled_mm(eighth, eighth.t(), scale, scale, out_dtype=torch.bfloat16)]
    least = {name: timed.sample.least for name, timed in cuda_timing.take_turns(calls, rounds=15).items()}
    fastest_read = min(least[name] for name in ("max", "matrix times vector", "sum"))
    flops = 2 * _GPU_MATRIX**3
    return GpuRoofs(
        read_bytes_per_second=halves.nbytes / fastest_read,
        copy_bytes_per_second=2 * halves.nbytes / least["copy"],
        bf16_flops_per_second=flops / least["bf16"],
        fp8_flops_per_second=flops / least["fp8"] if "fp8" in least else None,
        launch_seconds=least["launch"],
    )


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
