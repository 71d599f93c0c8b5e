"""Keeps one process running: starts it, watches its health, starts it again after a growing pause."""

import asyncio
import re
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Literal

from tokenmill.engine.supervisor.backoff import Backoff
from tokenmill.engine.supervisor.child import Child
from tokenmill.errors import TokenmillError

#: Seconds between two health probes, before and after the process is ready.
PROBE_STARTING, PROBE_READY = 0.25, 2.0
#: A ready process that reports an error this often in a row, or is silent for so many seconds, is replaced.
ERRORS_IN_A_ROW, SILENT_SECONDS = 3, 120.0

Change = Literal["starting", "ready", "down"]


class StartError(TokenmillError):
    """A process could not be started, or ended before it was ever ready."""


class Keeper:
    """One process that should run.

    Attributes:
        child: Its latest run.
        ready: Set while it is ready.
        was_ready: Whether it ever was.
        restarts: How often it was started again.

    Args:
        name: For people.
        launch: Starts the process.
        health: HTTP status of its health page; None when it does not answer.
        notify: Told of each change, with a line for people.
        grace: Seconds between asking the process to end and killing its group.
        backoff: The pauses between deaths.
    """

    def __init__(
        self,
        name: str,
        launch: Callable[[], Awaitable[Child]],
        health: Callable[[], Awaitable[int | None]],
        notify: Callable[["Keeper", Change, str], None],
        grace: float,
        backoff: Backoff | None = None,
    ) -> None:
        self.name = name
        self.grace = grace
        self.child: Child | None = None
        self.ready = asyncio.Event()
        self.was_ready = False
        self.restarts = 0
        self._launch = launch
        self._health = health
        self._notify = notify
        self._backoff = backoff or Backoff()
        self._ready_at = 0.0
        self._retires = False

    async def run(self) -> None:
        """Runs until it is cancelled, which ends the process, or the process ends that was to retire.

        Raises:
            StartError: The process ended before it was ready for the first time.
        """
        while True:
            ready_seconds, reason = await self._one_run()
            if self._retires:
                return
            if not self.was_ready:
                raise StartError(reason)
            pause = self._backoff.after(ready_seconds)
            self._notify(self, "down", f"{reason}; starts again in {pause:g} s")
            await asyncio.sleep(pause)
            self.restarts += 1
            self._notify(self, "starting", "starting again")

    def retire(self) -> None:
        """Has the process end when all that it was asked for is done (SIGHUP); nothing takes its place here."""
        self._retires = True
        if self.child is not None:
            self.child.signal_group(signal.SIGHUP)

    def kill(self) -> None:
        """Kills the process and all of its group now."""
        if self.child is not None:
            self.child.signal_group(signal.SIGKILL)

    async def _one_run(self) -> tuple[float, str]:
        """One life of the process: (seconds it was ready, why it ended)."""
        if self._retires:
            return 0.0, "it was to retire"
        try:
            child = await self._launched()
        except OSError as error:
            return 0.0, f"cannot be started: {error}"
        try:
            reason = await self._watch(child)
            return (time.monotonic() - self._ready_at if self.ready.is_set() else 0.0), reason
        finally:
            self.ready.clear()
            await child.end(self.grace)

    async def _launched(self) -> Child:
        self.child = child = await self._launch()
        if self._retires:  # since it is being started, and it has heard nothing of that
            self.retire()
        return child

    async def _watch(self, child: Child) -> str:
        """Returns why the process has to be replaced."""
        ended = asyncio.create_task(child.wait())
        errors, answered = 0, time.monotonic()
        try:
            while True:
                with suppress(TimeoutError):
                    pause = PROBE_READY if self.ready.is_set() else PROBE_STARTING
                    await asyncio.wait_for(asyncio.shield(ended), pause)
                    await asyncio.sleep(0.1)  # its last words are still in the pipe
                    return why_ended(child)
                asking = asyncio.ensure_future(self._health())
                try:
                    # Nobody answers at the port of one that has just died: its end is not to wait for that.
                    await asyncio.wait((ended, asking), return_when=asyncio.FIRST_COMPLETED)
                    status = asking.result() if asking.done() else None
                finally:
                    asking.cancel()
                if status is not None:
                    answered = time.monotonic()
                    errors = errors + 1 if status >= 500 else 0
                    if status < 400 and not self.ready.is_set():
                        self.was_ready = True
                        self._ready_at = time.monotonic()  # a large model may load longer than a calm run is
                        self.ready.set()
                        self._notify(self, "ready", "ready")
                if self.ready.is_set() and errors >= ERRORS_IN_A_ROW:
                    return f"its health page answers {status}"
                if self.ready.is_set() and time.monotonic() - answered > SILENT_SECONDS:
                    return f"it has been silent for {SILENT_SECONDS:g} s"
        finally:
            ended.cancel()


def why_ended(child: Child) -> str:
    """One line: how a process ended and the line of its output that explains it best."""
    status = child.exit_status or 0
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    lines = list(child.last_lines)
    for pattern in (r"(?:^|: )(?:error|cannot start): (.+)", r"\b(\w*(?:Error|Exception): .+)"):
        for line in reversed(lines):
            if found := re.search(pattern, line):
                return f"{how}: {found[1]}"
    return how
