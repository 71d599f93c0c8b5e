"""One line of JSON per request on standard error, which the supervisor keeps in a file.

Never a header or a key, and no prompt unless the policy says so.
"""

import asyncio
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import orjson

from tokenmill.engine.gateway.observability.decisions import was_escalated
from tokenmill.engine.gateway.pipeline import MOST_LOGGED, Exchange, Handler, Reply

#: Lines wait this long to be written together.
FLUSH_S = 0.05
#: More lines than this wait for nobody: a reader that is stuck must not eat the memory.
MOST_WAITING = 10_000


class RequestLog:
    """A stage and a service.

    Args:
        bodies: Whether lines hold the requests' bodies.
        write: Where the lines go; it may block. None: standard error.
    """

    name = "request log"

    def __init__(self, bodies: bool, write: Callable[[bytes], object] | None = None) -> None:
        self._bodies = bodies
        self._write = write or _to_stderr
        self._waiting: list[dict[str, Any]] = []
        self._lost = 0
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to write."""
        self._task = asyncio.create_task(self._keep_writing())

    async def stop(self) -> None:
        """Writes what is left."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self.flush()

    async def handle(self, exchange: Exchange, proceed: Handler) -> Reply:
        """See `pipeline.Stage`."""
        exchange.on_end(self.note)
        return await proceed(exchange)

    def note(self, exchange: Exchange) -> None:
        """Takes down a request that has ended."""
        if len(self._waiting) >= MOST_WAITING:
            self._lost += 1
            return
        line = describe(exchange)
        if self._bodies:
            line["body"] = exchange.payload[:MOST_LOGGED].decode("utf-8", "replace")
        self._waiting.append(line)

    async def _keep_writing(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            if self._waiting:
                await asyncio.to_thread(self.flush)

    def flush(self) -> None:
        """Writes what has gathered; may block. What cannot be written, e.g. on a full disk, counts as lost."""
        lines, self._waiting = self._waiting, []
        lost, self._lost = self._lost, 0
        if lost:
            lines.append({"time": _now(), "event": "lost", "requests": lost})
        if lines:
            try:
                self._write(b"".join(orjson.dumps(line) + b"\n" for line in lines))
            except OSError:
                self._lost += lost + sum(line["event"] == "request" for line in lines)


def describe(exchange: Exchange) -> dict[str, Any]:
    """A request that has ended; holds nothing that its client wrote but the model's name and the request id."""
    principal, target, usage, decision = exchange.principal, exchange.target, exchange.usage, exchange.decision
    first = exchange.first_chunk_at
    return {
        "time": _now(),
        "event": "request",
        "request_id": exchange.request_id,
        "endpoint": exchange.endpoint,
        "status": exchange.status,
        "outcome": exchange.outcome,
        "seconds": round(exchange.seconds, 6),
        "first_token_seconds": round(first - exchange.started, 6) if first else None,
        "key": principal.key if principal else None,
        "organisation": principal.organisation if principal else None,
        "team": principal.team if principal else None,
        "app": principal.app if principal else None,
        "model": exchange.model,
        "tier": target.backend.tier if target else None,
        "backend": target.backend.name if target else None,
        "attempts": exchange.attempts,
        "prompt_tokens": usage.prompt,
        "cached_tokens": usage.cached,
        "written_tokens": usage.written,
        "completion_tokens": usage.completion,
        "exact": usage.exact,
        "reasons": [f"{reason.criterion}: {reason.verdict}" for reason in decision.reasons] if decision else [],
        "escalated": was_escalated(exchange),
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _to_stderr(text: bytes) -> None:
    descriptor = sys.stderr.fileno()
    while text:
        text = text[os.write(descriptor, text) :]
