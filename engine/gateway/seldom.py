"""Lines for the log that a flood of requests must not become a flood of."""

import time
from collections.abc import Callable


class Seldom:
    """Lets the first of many through, and then one in a while that stands for those in between.

    Args:
        every_s: Seconds between two.
        clock: Seconds, monotonic.
    """

    def __init__(self, every_s: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_s = every_s
        self._clock = clock
        self._next_at = float("-inf")
        self._count = 0

    def due(self) -> int:
        """Counts one more; how many are to be spoken of now, 0: keep silent."""
        self._count += 1
        now = self._clock()
        if now < self._next_at:
            return 0
        self._next_at = now + self._every_s
        count, self._count = self._count, 0
        return count
