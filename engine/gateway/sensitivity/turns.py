"""How long a search may compute: at one go, so that other requests get their turn, and in all."""

import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")

#: The search lets other requests run after this long.
TURN_S = 0.001
#: How many times its limit a search may last, with all that others do in between.
_PATIENCE = 10


class DetectorError(Exception):
    """The search failed or took too long; the text says how, without any of the data."""


class Turns:
    """The time that one search computes, from the request's bytes to its placeholders.

    Whoever works through many things asks after each of them: `if turns.due(): await turns.give()`. Turns go by the
    clock, which is cheap to read; the limit, looked at when a turn ends, by the processor's time: on a busy machine a
    search waits without computing.

    Args:
        limit_s: Seconds of computing after which the search has failed.
    """

    __slots__ = ("_began", "_computed_s", "_ends_at", "_limit_s", "_spent_s", "_turn_s")

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._turn_s = min(TURN_S, limit_s)
        self._spent_s = 0.0
        self._begin()
        self._ends_at = time.monotonic() + _PATIENCE * limit_s

    def _begin(self) -> None:
        self._began, self._computed_s = time.perf_counter(), time.thread_time()

    def due(self) -> bool:
        """Whether it is others' turn."""
        return time.perf_counter() - self._began > self._turn_s

    async def give(self) -> None:
        """Lets others run; their time does not count.

        Raises:
            DetectorError: The search has computed for longer than it may, or lasts ten times as long.
        """
        await self.wait_for(asyncio.sleep(0))

    async def wait_for(self, work: Awaitable[T]) -> T:
        """What somebody else computes; that time does not count.

        Raises:
            DetectorError: The search has computed for longer than it may, or lasts ten times as long.
        """
        self._spent_s += time.thread_time() - self._computed_s
        try:
            result = await work
        finally:
            self._begin()
        if self._spent_s > self._limit_s:
            raise DetectorError(f"it took more than {self._limit_s:g} s")
        if time.monotonic() > self._ends_at:
            raise DetectorError("it took too long")
        return result
