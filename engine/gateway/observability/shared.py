"""What the workers of one gateway tell each other: each leaves its figures in a file, once a second.

Prometheus scrapes one worker, whichever the kernel chooses; the answer has the sums of all. Files of workers that have
ended stay until the gateway starts anew: counters must not go down because a process was restarted.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from tokenmill.engine.gateway.observability.snapshot import Family
from tokenmill.engine.gateway.seldom import Seldom

log = logging.getLogger("tokenmill.gateway")

INTERVAL_S = 1.0


class Report(msgspec.Struct):
    """What one worker tells.

    Attributes:
        pid: The process.
        families: Its metrics.
        decisions: Its last routing decisions, the latest last.
        backends: The backends as it sees them.
    """

    pid: int
    families: list[Family]
    decisions: list[dict[str, Any]] = []
    backends: list[dict[str, Any]] = []


@dataclass(frozen=True)
class Seen:
    """A report and whether its worker still runs."""

    report: Report
    lives: bool


class Board:
    """The folder of reports; a service that keeps this worker's own fresh.

    Args:
        folder: Where; None: this worker is the only one and writes nothing.
        report: Makes this worker's report; called in a thread.
    """

    def __init__(self, folder: Path | None, report: Callable[[], Report]) -> None:
        self._folder = folder
        self._report = report
        self._name = f"{os.getpid()}-{os.urandom(4).hex()}"
        self._lock = -1
        self._writing = threading.Lock()
        self._unwritten = Seldom()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to write."""
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Held while this process lives; the kernel frees it when it dies.
        self._lock = os.open(self._folder / f"{self._name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._task = asyncio.create_task(self._keep_writing(self._folder))

    async def stop(self) -> None:
        """Writes once more, then ends."""
        if self._task is None or self._folder is None:
            return
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await self._try_to_write(self._folder)
        os.close(self._lock)

    async def _keep_writing(self, folder: Path) -> None:
        while True:
            await self._try_to_write(folder)
            await asyncio.sleep(INTERVAL_S)

    async def _try_to_write(self, folder: Path) -> None:
        try:
            await asyncio.to_thread(self._write, folder)
        except OSError as error:
            if count := self._unwritten.due():
                log.warning("figures for the other workers could not be written %d times: %s", count, error)

    def _write(self, folder: Path) -> None:
        made = folder / f"{self._name}.new"
        with self._writing:  # the last report is not to meet, nor be followed by, one that a thread is still at
            made.write_bytes(msgspec.msgpack.encode(self._report()))
            made.replace(folder / f"{self._name}.report")

    def everybody(self) -> list[Seen]:
        """This worker's report, fresh, and the others' last ones. Reads files: call it in a thread."""
        seen = [Seen(self._report(), True)]
        if self._folder is None:
            return seen
        for path in sorted(self._folder.glob("*.report")):
            if path.stem != self._name:
                with contextlib.suppress(OSError, msgspec.MsgspecError):
                    seen.append(Seen(_DECODER.decode(path.read_bytes()), _is_locked(path.with_suffix(".lock"))))
        return seen


_DECODER = msgspec.msgpack.Decoder(Report)


def _is_locked(path: Path) -> bool:
    """Whether the worker that holds this lock still runs."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
