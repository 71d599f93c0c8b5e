"""What vLLM says about itself on its `/metrics`: queue, cache, acceptance of drafts. Asked when somebody looks."""

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from tokenmill.engine.gateway.connection import ConnectFailedError, CutError, NoAnswerError, SilenceError
from tokenmill.engine.gateway.portfolio import Portfolio, Target
from tokenmill.engine.gateway.upstream import Upstream

#: Answers younger than this are given again, in seconds.
KEPT_S = 3.0
#: Time for one engine to answer, in seconds.
TIMEOUT_S = 1.0
_SAMPLE = re.compile(rb"^vllm:(\w+)(?:\{[^}]*\})? (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Engine:
    """One vLLM server now; None for what it does not tell.

    Attributes:
        backend: The backend's name.
        running, waiting: Requests that it works on, and that queue.
        cache_used: Share of the KV cache in use, 0 to 1.
        cache_hits: Share of the prompt tokens asked of the prefix cache that were there, since its start.
        accepted: Share of the drafted tokens that were accepted, since its start.
    """

    backend: str
    running: int | None
    waiting: int | None
    cache_used: float | None
    cache_hits: float | None
    accepted: float | None


class Engines:
    """Asks the backends that stand on the premises.

    Args:
        portfolio: The backends.
        upstream: The HTTP client.
    """

    def __init__(self, portfolio: Portfolio, upstream: Callable[[], Upstream]) -> None:
        self.portfolio = portfolio
        self._upstream = upstream
        self._found: list[Engine] = []
        self._found_at = -KEPT_S
        self._asking = asyncio.Lock()

    async def now(self) -> list[Engine]:
        """Every vLLM server that answers."""
        async with self._asking:
            if time.monotonic() - self._found_at >= KEPT_S:
                targets = [
                    target
                    for target in self.portfolio.targets
                    if target.backend.zone != "cloud" and target.backend.protocol == "openai"
                ]
                answers = await asyncio.gather(*(self._ask(target) for target in targets))
                self._found = [engine for engine in answers if engine is not None]
                self._found_at = time.monotonic()
            return self._found

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
        return read(target.backend.name, text)


def read(backend: str, text: bytes) -> Engine | None:
    """What a page of metrics says; None where it is none of vLLM's. Values of several engines are added."""
    sums: dict[str, float] = {}
    for name, value in _SAMPLE.findall(text):
        try:
            sums[name.decode()] = sums.get(name.decode(), 0.0) + float(value)
        except ValueError:
            continue
    if not sums:
        return None

    def whole(name: str) -> int | None:
        return int(sums[name]) if name in sums else None

    def share(part: str, of: str) -> float | None:
        return sums.get(part, 0.0) / sums[of] if sums.get(of) else None

    return Engine(
        backend,
        whole("num_requests_running"),
        whole("num_requests_waiting"),
        sums.get("kv_cache_usage_perc"),
        share("prefix_cache_hits_total", "prefix_cache_queries_total"),
        share("spec_decode_num_accepted_tokens_total", "spec_decode_num_draft_tokens_total"),
    )
