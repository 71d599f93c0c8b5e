"""What vLLM says about itself on its `/metrics`: queue, cache, acceptance of drafts. Asked when somebody looks."""

import asyncio
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from tokenmill.engine.gateway.connection import ConnectFailedError, CutError, NoAnswerError, SilenceError
from tokenmill.engine.gateway.observability.snapshot import Family
from tokenmill.engine.gateway.portfolio import Portfolio, Target
from tokenmill.engine.gateway.upstream import Upstream

#: Answers younger than this are given again, in seconds.
KEPT_S = 3.0
#: Time for one engine to answer, in seconds.
TIMEOUT_S = 1.0
#: What is read of vLLM's metrics (vllm/v1/metrics/loggers.py, vllm/v1/spec_decode/metrics.py).
_NAMES = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
)
#: Nothing that is counted there is more; what says so counts nothing.
_MOST = 2.0**53
#: Begins with text that is in it as it stands: Python finds that ten times as fast as the beginnings of lines.
_SAMPLE = re.compile(rf"\nvllm:({'|'.join(_NAMES)})(?:\{{.*\}})? (\S+)".encode())


@dataclass(frozen=True)
class Engine:
    """One vLLM server now; None for what it does not tell.

    Attributes:
        backend, tier: The backend.
        running, waiting: Requests that it works on, and that queue.
        cache_used: Share of the KV cache in use, 0 to 1; of several engines their mean.
        queried, found: Prompt tokens looked up in the prefix cache since its start, and those that were there.
        drafted, taken: Tokens drafted since its start, and those of them that were accepted.
    """

    backend: str
    tier: str
    running: int | None = None
    waiting: int | None = None
    cache_used: float | None = None
    queried: int | None = None
    found: int | None = None
    drafted: int | None = None
    taken: int | None = None

    @property
    def cache_hits(self) -> float | None:
        """Share of the prompt tokens looked up that were there."""
        return self.found / self.queried if self.queried and self.found is not None else None

    @property
    def accepted(self) -> float | None:
        """Share of the drafted tokens that were accepted."""
        return self.taken / self.drafted if self.drafted and self.taken is not None else None


@dataclass(frozen=True)
class Answers:
    """What all of them said, and when, by the machine's monotonic clock."""

    engines: list[Engine] = field(default_factory=list)
    at: float = -KEPT_S


_KINDS: tuple[tuple[str, str, str, Literal["counter", "gauge"]], ...] = (
    ("running", "running_requests", "Requests that a vLLM server works on.", "gauge"),
    ("waiting", "waiting_requests", "Requests that queue in a vLLM server.", "gauge"),
    ("cache_used", "kv_cache_usage_ratio", "Share of a vLLM server's KV cache in use, 0 to 1.", "gauge"),
    ("queried", "prefix_cache_query_tokens", "Prompt tokens looked up in a vLLM server's prefix cache.", "counter"),
    ("found", "prefix_cache_hit_tokens", "Prompt tokens that a vLLM server's prefix cache had.", "counter"),
    ("drafted", "draft_tokens", "Tokens drafted by speculation in a vLLM server.", "counter"),
    ("taken", "accepted_tokens", "Drafted tokens that a vLLM server accepted.", "counter"),
)


def families(engines: Iterable[Engine]) -> list[Family]:
    """Metrics of the servers, as they count themselves, by tier and backend; what one does not tell has no series."""
    seen = list(engines)
    return [
        Family(
            f"tokenmill_engine_{name}",
            text,
            kind,
            ("tier", "backend"),
            [
                ((engine.tier, engine.backend), [float(value)])
                for engine in seen
                if (value := getattr(engine, attribute)) is not None
            ],
        )
        for attribute, name, text, kind in _KINDS
    ]


class Engines:
    """Asks the backends that stand on the premises and are up.

    Args:
        portfolio: The backends.
        upstream: The HTTP client.
    """

    def __init__(self, portfolio: Portfolio, upstream: Callable[[], Upstream]) -> None:
        self.portfolio = portfolio
        self._upstream = upstream
        self._answers = Answers()
        self._asking = asyncio.Lock()

    async def now(self, known: Answers | None = None) -> Answers:
        """Every vLLM server that answers.

        Args:
            known: What another worker was answered; given again where it is younger.
        """
        async with self._asking:
            if known is not None and known.at > self._answers.at:
                self._answers = known
            if time.monotonic() - self._answers.at >= KEPT_S:
                targets = [
                    target
                    for target in self.portfolio.targets
                    if target.ready and target.backend.zone != "cloud" and target.backend.protocol == "openai"
                ]
                answers = await asyncio.gather(*(self._ask(target) for target in targets))
                found = [engine for engine in answers if engine is not None]
                self._answers = Answers(found, time.monotonic())
            return self._answers

    async def _ask(self, target: Target) -> Engine | None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                answer = await self._upstream().send(b"GET", target.origin, b"/metrics", [])
                try:
                    text = await answer.read() if answer.status == 200 else b""
                finally:
                    answer.close()
        except (ConnectFailedError, NoAnswerError, SilenceError, CutError, TimeoutError):
            return None
        return read(target.backend.name, target.backend.tier, text)


def read(backend: str, tier: str, text: bytes) -> Engine | None:
    """What a page of metrics says; None where it is none of vLLM's. Values of several engines are added."""
    found: dict[bytes, list[float]] = {}
    for name, value in _SAMPLE.findall(b"\n" + text):
        try:
            number = float(value)
        except ValueError:
            continue
        if 0 <= number <= _MOST:
            found.setdefault(name, []).append(number)
    if not found:
        return None
    running, waiting, used, *counts = (found.get(name.encode()) for name in _NAMES)

    def whole(values: list[float] | None) -> int | None:
        return None if values is None else int(sum(values))

    mean = None if used is None else sum(used) / len(used)
    return Engine(backend, tier, whole(running), whole(waiting), mean, *map(whole, counts))
