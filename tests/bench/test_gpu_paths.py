"""What can be shown of the GPU's code without one: the arithmetic of its timer, and the path of rows and refusals."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tokenmill.bench import cuda_timing, machines, rivals, rivals_gpu
from tokenmill.bench.roofline import GpuRoofs, Roofs
from tokenmill.bench.suite import speed


class Card:
    """Stands in for torch.cuda: a clock that calls advance, events that read it, graphs that record calls."""

    def __init__(self) -> None:
        self.now = 0.0
        self.recording: list[float] | None = None

    def work(self, seconds: float) -> Callable[[], None]:
        def call() -> None:
            if self.recording is not None:
                self.recording.append(seconds)
            else:
                self.now += seconds

        return call

    def install(self, monkeypatch: pytest.MonkeyPatch, *, capturable: bool = True) -> None:
        card = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                self.at = 0.0

            def record(self) -> None:
                self.at = card.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: "Event") -> float:
                return (end.at - self.at) * 1e3

        class Graph:
            def __init__(self) -> None:
                self.calls: list[float] = []

            def replay(self) -> None:
                card.now += sum(self.calls)

        @contextmanager
        def capture(graph: Graph) -> Iterator[None]:
            if not capturable:
                raise RuntimeError("operation not permitted when stream is capturing")
            card.recording = graph.calls = []
            yield
            card.recording = None

        for name, value in {"Event": Event, "CUDAGraph": Graph, "graph": capture, "synchronize": lambda: None}.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(cuda_timing, "_do_bench", lambda call: None)


@pytest.mark.parametrize("capturable", [True, False])
def test_a_sample_is_the_time_of_one_call(monkeypatch: pytest.MonkeyPatch, capturable: bool) -> None:
    card = Card()
    card.install(monkeypatch, capturable=capturable)
    rings = {"fast": [card.work(1e-6)] * 30, "slow": [card.work(5e-3), card.work(7e-3)]}
    timed = cuda_timing.take_turns(rings, rounds=4)
    assert timed["fast"].sample.p50 == pytest.approx(1e-6)
    assert timed["slow"].sample.p50 == pytest.approx(6e-3)
    assert timed["fast"].sample.count == 4
    assert {one.method for one in timed.values()} == {"graph" if capturable else "events"}


def test_the_roofs_of_a_gpu_give_the_floors() -> None:
    assert GpuRoofs(4e12, 4.3e12, 7.9e14, None, 2e-6).roofs() == Roofs(4e12, 7.9e14, "bfloat16")


def test_rows_of_the_gpus_contestants(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU tensors: the baseline computes, everyone else has a reason, and nobody ends the measurement."""
    found = machines.Cpu()
    monkeypatch.setattr(found, "roofs", lambda: Roofs(1e10, 1e11, "float32"))
    monkeypatch.setattr(found, "ring_bytes", lambda rings=1: 0)
    monkeypatch.setattr(speed, "machine", lambda cpu: found)
    monkeypatch.setattr(rivals_gpu, "find_spec", lambda name: None)
    outcome = speed.int4({"device": "here"}, 256, 64, 128, (1, 3), cpu=False, rounds=1, quick=False)
    rows: dict[tuple[int, str], dict[str, Any]] = {(row["M"], row["implementation"]): row for row in outcome.rows}
    assert rows[3, "cublas-bf16"]["p50"] > 0
    assert rows[3, "cublas-bf16"]["timing"] == "calls"
    assert rows[1, "marlin"]["skipped"] == "vLLM is not installed"
    assert rows[1, "aten-tinygemm"]["skipped"].startswith("it raised NotImplementedError")
    assert "sees no CUDA device" in rows[1, "tokenmill-cuda"]["skipped"]
    assert "p50" not in rows[1, "tokenmill-triton"]
    assert outcome.verdict == "measured"
    assert outcome.detail.startswith("none of ours can: tokenmill-cuda: ")


def test_one_of_ours_that_raises_fails_but_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    found = machines.Cpu()
    monkeypatch.setattr(found, "roofs", lambda: Roofs(1e10, 1e11, "float32"))
    monkeypatch.setattr(found, "ring_bytes", lambda rings=1: 0)
    monkeypatch.setattr(speed, "machine", lambda cpu: found)

    def explode(self: rivals.Ours, weight: Any) -> Any:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(rivals.Ours, "prepare", explode)
    outcome = speed.int4({"device": "here"}, 256, 64, 128, (1,), cpu=True, rounds=1, quick=True)
    assert outcome.verdict == "failed"
    assert outcome.detail == "tokenmill-a16: it raised RuntimeError: no kernel image is available"
    assert any("p50" in row for row in outcome.rows)
