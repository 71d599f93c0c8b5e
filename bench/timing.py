"""CPU timing: pinned threads, cold weights, contestants in turns.

One sample is one call. Contestants take turns in short bursts, so that a change of clock or a neighbour's load meets
all of them; what is compared is the ratio of medians. A burst starts after a pause, in which spinning worker threads
of the contestant before it go to sleep, and with a call that is not counted, which wakes its own.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenmill import platform
from tokenmill.errors import ConfigurationError

#: ONNX Runtime's workers spin for tens of milliseconds after their last task, OpenMP's for a few.
_PAUSE_SECONDS = 0.06
#: Rings of tiny buffers end here, though a cache may hold them: more copies cost more than they tell.
_MOST_COPIES = 512


def pinned(threads: int, arguments: Sequence[str]) -> None:
    """Binds OpenMP's threads to cores: runs `tokenmill ARGUMENTS` in this process's place unless they are bound.

    OpenMP reads its environment when torch is loaded, so this has to come before torch is imported.

    Args:
        threads: OpenMP threads.
        arguments: The command line after `tokenmill`.

    Raises:
        ConfigurationError: The process may not run on so many cores.
    """
    cores = platform.physical_cores()
    if not 1 <= threads <= cores:
        raise ConfigurationError(f"--threads {threads} is not in 1..{cores}, the cores this process may run on")
    bound = binding(threads)
    if any(os.environ.get(name) != value for name, value in bound.items()):
        os.execve(sys.executable, [sys.executable, "-m", "tokenmill", *arguments], {**os.environ, **bound})  # noqa: S606


def binding(threads: int) -> dict[str, str]:
    """The environment in which OpenMP binds so many threads to cores; unbound, pools of contestants fight for them."""
    return {"OMP_NUM_THREADS": str(threads), "OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}


@dataclass(frozen=True)
class Sample:
    """Quantiles of the seconds that one call took.

    Attributes:
        least: The shortest, in seconds.
        p20, p50, p80: Quantiles in seconds.
        count: Calls timed.
    """

    least: float
    p20: float
    p50: float
    p80: float
    count: int


def quantiles(seconds: Sequence[float]) -> Sample:
    """Quantiles by nearest rank of at least one duration."""
    ordered = sorted(seconds)

    def at(share: float) -> float:
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]

    return Sample(ordered[0], at(0.2), at(0.5), at(0.8), len(ordered))


def take_turns(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int = 7,
    burst_seconds: float = 0.03,
    pause_seconds: float = _PAUSE_SECONDS,
) -> dict[str, Sample]:
    """Times every contestant in every round.

    Args:
        contestants: Name to a call that does the work once, on weights that are not in the cache.
        rounds: Turns of each.
        burst_seconds: How long a turn lasts; at least one call.
        pause_seconds: Before each turn.

    Returns:
        Name to the quantiles of all its calls.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            time.sleep(pause_seconds)
            call()
            end = time.perf_counter() + burst_seconds
            while True:
                start = time.perf_counter()
                call()
                now = time.perf_counter()
                seconds[name].append(now - start)
                if now >= end:
                    break
    return {name: quantiles(times) for name, times in seconds.items()}


def last_level_cache_bytes() -> int:
    """The size of the largest cache that Linux names for the first core; 32 MiB where it names none."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        if text[-1:] in "KM" and text[:-1].isdigit():
            sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(sizes, default=32 << 20)


def copies(nbytes: int, cache_bytes: int) -> int:
    """How many copies of a buffer fill so many bytes of cache; two at least, 512 at most."""
    return max(2, min(-(-cache_bytes // max(nbytes, 1)), _MOST_COPIES))
