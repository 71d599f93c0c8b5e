"""What is measured on: this CPU or a GPU, behind one face, so that a benchmark is written once."""

import functools
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from tokenmill import platform
from tokenmill.bench import cuda_timing, nvml, roofline, timing
from tokenmill.bench.cuda_timing import Call, Timed
from tokenmill.bench.roofline import Roofs
from tokenmill.bench.rows import Row, cpu_device

#: A ring of copies is so many times the largest cache.
_CPU_RING, _GPU_RING = 3, 4
#: All rings together take this part of the free memory, as they count their bytes: a rival may keep several copies.
_SHARE = 4


class Machine(Protocol):
    """A device with its timer and its roofs.

    Attributes:
        name: In the rows.
        kind: The instruction set or the GPU's family.
        device: Where tensors go.
        threads: Of the CPU; None on a GPU.
    """

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def threads(self) -> int | None: ...

    def ring_bytes(self, rings: int = 1) -> int:
        """Bytes that no cache holds, when so many rings of them have to be in memory together."""
        ...

    def take_turns(self, rings: Mapping[str, Sequence[Call]], rounds: int) -> dict[str, Timed]:
        """Times contestants in turns; each call of a ring uses another copy."""
        ...

    def roofs(self) -> Roofs:
        """Measured once."""
        ...

    def state(self) -> Row:
        """What disturbs figures now: load, clocks."""
        ...


class Cpu:
    """This processor, with the threads that torch has."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.name, self.kind, self.threads = cpu_device(), platform.isa(), torch.get_num_threads()

    def ring_bytes(self, rings: int = 1) -> int:
        """Several times its caches; where a server's cache is large and the memory free now is small, less."""
        wanted = _CPU_RING * timing.last_level_cache_bytes()
        return min(wanted, platform.available_memory() // (_SHARE * rings) or wanted)

    def take_turns(self, rings: Mapping[str, Sequence[Call]], rounds: int) -> dict[str, Timed]:
        """One sample a call."""
        samples = timing.take_turns({name: _in_turn(calls) for name, calls in rings.items()}, rounds)
        return {name: Timed(sample, "calls") for name, sample in samples.items()}

    @functools.cached_property
    def _roofs(self) -> Roofs:
        return roofline.measure_cpu()

    def roofs(self) -> Roofs:
        """By torch's readers and products."""
        return self._roofs

    def state(self) -> Row:
        """The load average of the last minute."""
        return {"load_average": round(os.getloadavg()[0], 2)}


class Gpu:
    """One CUDA device."""

    threads = None

    def __init__(self, gpu: platform.Gpu) -> None:
        self.name, self.kind, self.device = gpu.name, gpu.family, torch.device("cuda", gpu.index)
        self._cache = torch.cuda.get_device_properties(gpu.index).L2_cache_size
        self._nvml = nvml.device(gpu.index)

    def ring_bytes(self, rings: int = 1) -> int:
        """Several times its L2 cache; all rings together are small beside its memory."""
        return _GPU_RING * self._cache

    def take_turns(self, rings: Mapping[str, Sequence[Call]], rounds: int) -> dict[str, Timed]:
        """One sample a replay of a ring's graph."""
        return cuda_timing.take_turns(rings, max(rounds, 15))

    @functools.cached_property
    def _roofs(self) -> Roofs:
        return roofline.measure_gpu(self.device).roofs()

    def roofs(self) -> Roofs:
        """By torch's readers and its bfloat16 product."""
        return self._roofs

    def state(self) -> Row:
        """Clocks, power and temperature where the driver says them, and its version."""
        return {} if self._nvml is None else {**self._nvml.state(), "driver": self._nvml.driver()}


@functools.cache
def machine(*, cpu: bool) -> Machine:
    """The first GPU, or this CPU where that is asked for or there is no GPU; one object a process."""
    gpu = None if cpu else next(iter(platform.gpus()), None)
    return Cpu() if gpu is None else Gpu(gpu)


def _in_turn(calls: Sequence[Call]) -> Call:
    turn = itertools.cycle(calls)

    def call_next() -> object:
        return next(turn)()

    return call_next
