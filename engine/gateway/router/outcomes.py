"""The log that the classifier and the thresholds are made from: one line of JSON for each routed request that ended.

A line holds the features, the tier that was chosen and how it ended, and nothing of the request's text:
{"id", "at", "tier", "features", "complexity", "confidence", "escalated", "status", "outcome"}. Whoever learns later
whether that tier's answer was good adds `"good": true` or `false` by the id. `tokenmill router train` and `tokenmill
calibrate` read the log.
"""

import asyncio
import contextlib
import errno
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from tokenmill.engine.gateway.pipeline import Exchange

log = logging.getLogger("tokenmill.gateway")

#: Lines are written this often.
EVERY_S = 1.0
#: Lines that wait to be written; more are dropped, so that a full disk does not fill the memory.
MOST_WAITING = 10_000


class OutcomeLog:
    """Writes the log; a service.

    Args:
        path: The file; several workers may append to the same one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[bytes] = []
        self._task: asyncio.Task[None] | None = None
        self._cut = False

    def add(self, exchange: Exchange, features: Mapping[str, float], complexity: float) -> None:
        """Takes in a request that has ended."""
        judged: dict[str, Any] = exchange.notes.get("escalation") or {}
        line = {
            "id": exchange.request_id,
            "at": round(time.time(), 3),
            "tier": exchange.decision.tier if exchange.decision else None,
            "features": {name: round(value, 4) for name, value in features.items()},
            "complexity": round(complexity, 4),
            "confidence": judged.get("confidence"),
            "escalated": bool(judged.get("escalated")),
            "status": exchange.status,
            "outcome": exchange.outcome,
        }
        if len(self._lines) < MOST_WAITING:
            self._lines.append(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))

    async def start(self) -> None:
        """Begins to write."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Writes what is left."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._write()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            await self._write()

    async def _write(self) -> None:
        lines, self._lines = self._lines, []
        if lines:
            try:
                await asyncio.get_running_loop().run_in_executor(None, self._append, b"".join(lines))
            except OSError as error:
                log.warning("routing log %s cannot be written: %s", self._path, error.strerror)

    def _append(self, data: bytes) -> None:
        with self._path.open("ab", buffering=0) as file:
            # A line that was cut, as by a full disk, is ended first: the next one would be spoilt, too.
            data = b"\n" + data if self._cut else data
            self._cut = (file.write(data) or 0) < len(data)
        if self._cut:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
