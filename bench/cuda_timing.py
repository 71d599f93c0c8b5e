"""GPU timing: a CUDA graph over a ring of copies, contestants in turns.

A graph calls each copy of a contestant once, so that every call finds its data in the GPU's memory and no call waits
for the host; the time of a replay over the calls in it is one sample. A contestant that cannot be captured is timed
as a plain loop between two events, which its row says.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from tokenmill.bench.timing import Sample, quantiles

#: A sample lasts about so long: far above the resolution of events.
_SAMPLE_SECONDS = 2e-3
_WARM_UP_CALLS = 2
#: What `triton.testing.do_bench` gets, in milliseconds.
_DO_BENCH = {"warmup": 5, "rep": 20}

Call = Callable[[], object]


@dataclass(frozen=True)
class Timed:
    """The quantiles of a contestant, and how they were taken: `graph`, `events` or `calls`."""

    sample: Sample
    method: str
    do_bench_seconds: float | None = None


def take_turns(rings: Mapping[str, Sequence[Call]], rounds: int) -> dict[str, Timed]:
    """Times every contestant in every round.

    Args:
        rings: Name to calls that each use another copy of the data.
        rounds: Samples of each.
    """
    prepared = {name: _prepared(calls) for name, calls in rings.items()}
    repeats = {name: _repeats(replay, len(rings[name])) for name, (replay, _) in prepared.items()}
    seconds: dict[str, list[float]] = {name: [] for name in rings}
    for _ in range(rounds):
        for name, (replay, _) in prepared.items():
            seconds[name].append(_elapsed(replay, repeats[name]) / (repeats[name] * len(rings[name])))
    return {
        name: Timed(quantiles(seconds[name]), method, _do_bench(rings[name][0]))
        for name, (_, method) in prepared.items()
    }


def _prepared(calls: Sequence[Call]) -> tuple[Call, str]:
    """One replay of the whole ring, after everything that is compiled at the first call is compiled."""
    for _ in range(_WARM_UP_CALLS):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with suppress(RuntimeError):
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay, "graph"
    torch.cuda.synchronize()

    def loop() -> None:
        for call in calls:
            call()

    return loop, "events"


def _elapsed(replay: Call, repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(repeats):
        replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _repeats(replay: Call, calls: int) -> int:
    once = max(_elapsed(replay, 1), 1e-7)
    return max(1, min(round(_SAMPLE_SECONDS / once), 10_000 // calls + 1))


def _do_bench(call: Call) -> float | None:
    """The median by Triton's own timer, which clears the L2 cache between calls; None without Triton."""
    try:
        testing: Any = __import__("triton.testing", fromlist=["do_bench"])
    except ImportError:
        return None
    return float(testing.do_bench(call, return_mode="median", **_DO_BENCH)) / 1e3
