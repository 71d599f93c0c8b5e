"""What the workers of one gateway tell each other: each leaves its figures in a file, once a second.

Prometheus scrapes one worker, whichever the kernel chooses; the answer has the sums of all. It takes a counter that is
lower than before for one that began anew, and adds all of it once more. So counters never go down, whoever answers:
files of workers that have ended stay until the gateway starts anew, many of them as one; what a worker tells of itself
is in its file before; sums are exact, for their last digit would depend on the order (`snapshot.summable`); and one
worker answers after the other (`Board.turn`).
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from tokenmill.engine.gateway.observability.engines import Answers
from tokenmill.engine.gateway.observability.snapshot import Family, total
from tokenmill.engine.gateway.seldom import Seldom

log = logging.getLogger("tokenmill.gateway")

INTERVAL_S = 1.0
#: Seconds to wait for one's turn; somebody who has stopped in his is not waited for.
TURN_S = 3.0
#: So many reports of workers that have ended are put together: every new configuration ends some.
MOST_ENDED = 16
_ENDED = "ended"


class Report(msgspec.Struct):
    """What one worker tells.

    Attributes:
        pid: The process.
        families: Its metrics.
        decisions: Its last routing decisions, the latest last.
        backends: The backends as it sees them.
        of: Of several that have ended: their names. Their own files count no more.
    """

    pid: int
    families: list[Family]
    decisions: list[dict[str, Any]] = []
    backends: list[dict[str, Any]] = []
    of: list[str] = []


class Scrape(msgspec.Struct):
    """What somebody was told who asked for the metrics.

    Attributes:
        at: When, by the machine's monotonic clock.
        text: The answer.
        engines: What vLLM's servers said, which is in it.
    """

    at: float
    text: bytes
    engines: Answers


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
        self._told: Scrape | None = None
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
            self._not_written(error)

    def _not_written(self, error: OSError) -> None:
        if count := self._unwritten.due():
            log.warning("figures for the other workers could not be written %d times: %s", count, error)

    def _write(self, folder: Path) -> Report:
        made = folder / f"{self._name}.new"
        with self._writing:  # the last report is not to meet, nor be followed by, one that a thread is still at
            report = self._report()
            made.write_bytes(msgspec.msgpack.encode(report))
            made.replace(folder / f"{self._name}.report")
            return report

    def everybody(self) -> list[Seen]:
        """This worker's report, fresh, and the others' last ones, in one order for all. Call it in a thread."""
        if self._folder is None:
            return [Seen(self._report(), True)]
        try:
            own = self._write(self._folder)
        except OSError as error:
            self._not_written(error)
            own = self._report()
        seen = {self._name: Seen(own, True), **self._others(self._folder)}
        return [seen[name] for name in sorted(seen)]

    def _others(self, folder: Path) -> dict[str, Seen]:
        seen: dict[str, Seen] = {}
        for path in folder.glob("*.report"):
            if path.stem != self._name:
                with contextlib.suppress(OSError, msgspec.MsgspecError):
                    seen[path.stem] = Seen(_DECODER.decode(path.read_bytes()), _is_locked(path.with_suffix(".lock")))
        gone = seen[_ENDED].report.of if _ENDED in seen else ()
        return {name: one for name, one in seen.items() if name not in gone}

    def fold(self) -> None:
        """Puts together what those told that have ended, where they are many. Call it in a `turn`, in a thread."""
        if self._folder is None:
            return
        seen = self._others(self._folder)
        names = sorted(name for name, one in seen.items() if not one.lives)
        if len(names) <= MOST_ENDED:
            return
        try:
            self._remove(self._folder, seen[_ENDED].report.of if _ENDED in seen else [])
            families = total([seen[name].report.families for name in names], [False] * len(names))
            of = [name for name in names if name != _ENDED]
            made = self._folder / f"{_ENDED}.new"
            made.write_bytes(msgspec.msgpack.encode(Report(0, families, of=of)))
            made.replace(self._folder / f"{_ENDED}.report")
            self._remove(self._folder, of)
        except OSError as error:
            self._not_written(error)

    @staticmethod
    def _remove(folder: Path, names: Sequence[str]) -> None:
        for name in names:
            for kind in ("report", "lock"):
                (folder / f"{name}.{kind}").unlink(missing_ok=True)

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """What is done in it, one worker does after the other."""
        if self._folder is None:
            yield
            return
        try:
            descriptor = os.open(self._folder / "turn", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            self._not_written(error)
            yield
            return
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TURN_S):
                    while not _takes(descriptor):
                        await asyncio.sleep(0.005)
            yield
        finally:
            os.close(descriptor)  # frees it

    def published(self) -> Scrape | None:
        """What was told last, by whichever worker. Call it in a `turn`."""
        if self._folder is None:
            return self._told
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            return _SCRAPES.decode((self._folder / "scrape").read_bytes())
        return None

    def publish(self, scrape: Scrape) -> None:
        """Leaves what is about to be told. Call it in a `turn`, in a thread."""
        if self._folder is None:
            self._told = scrape
            return
        try:
            made = self._folder / "scrape.new"
            made.write_bytes(msgspec.msgpack.encode(scrape))
            made.replace(self._folder / "scrape")
        except OSError as error:
            self._not_written(error)


_DECODER = msgspec.msgpack.Decoder(Report)
_SCRAPES = msgspec.msgpack.Decoder(Scrape)


def _is_locked(path: Path) -> bool:
    """Whether the worker that holds this lock still runs."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _takes(descriptor)
    finally:
        os.close(descriptor)


def _takes(descriptor: int) -> bool:
    """Takes a lock that is freed with its descriptor; False while somebody else has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
