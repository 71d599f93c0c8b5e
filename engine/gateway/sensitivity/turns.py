"""How long a search may compute: at one go, so that other requests get their turn, and in all."""

import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")

#: The search lets other requests run after this long.
TURN_S = 0.001


class DetectorError(Exception):
    """The search failed or took too long; the text says how, without any of the data."""


class Turns:
    """The time that one search computes, from the request's bytes to its placeholders.

    Whoever works through many things asks after each of them: `if turns.due(): await turns.give()`.

    Args:
        limit_s: Seconds of computing after which the search has failed.
    """

    __slots__ = ("_began", "_limit_s", "_spent_s")

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._spent_s = 0.0
        self._began = time.perf_counter()

    def due(self) -> bool:
        """Whether it is others' turn.

        Raises:
            DetectorError: The search has computed for longer than it may.
        """
        going = time.perf_counter() - self._began
        if self._spent_s + going > self._limit_s:
            raise DetectorError(f"it took more than {self._limit_s:g} s")
        return going > TURN_S

    async def give(self) -> None:
        """Lets others run; their time does not count."""
        await self.wait_for(asyncio.sleep(0))

    async def wait_for(self, work: Awaitable[T]) -> T:
        """What somebody else computes; that time does not count."""
        self._spent_s += time.perf_counter() - self._began
        try:
            return await work
        finally:
            self._began = time.perf_counter()
