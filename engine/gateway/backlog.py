"""What could not be written while the store could not be reached, and nobody waits for: it is tried again."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from tokenmill.engine.gateway.seldom import Seldom

log = logging.getLogger("tokenmill.gateway.store")

#: Seconds between two tries as long as they fail.
AGAIN_S = 1.0
#: Most that is kept of what may be dropped.
MOST_KEPT = 10_000


class Droppable(Protocol):
    """Something to write; `dispensable`: it may be dropped where too much is kept."""

    @property
    def dispensable(self) -> bool:
        """Whether it may be dropped."""
        ...


T = TypeVar("T", bound=Droppable)


class Backlog(Generic[T]):
    """What is kept, the oldest first. One is tried after a failure, and twice as many each time that it went well.

    So a server that is gone is asked for one thing, and what the store refuses for its own sake holds up nothing else.

    Args:
        most_at_once: Most that one `take` gives.
        most_kept: Most that is kept of what may be dropped.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, most_at_once: int, most_kept: int = MOST_KEPT, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most_at_once = most_at_once
        self._most_kept = most_kept
        self._clock = clock
        self._kept: deque[T] = deque()
        self._dispensable = 0
        self._at_once = 1
        self._again_at = float("-inf")
        self._dropped = Seldom()

    def __len__(self) -> int:
        """How many are kept."""
        return len(self._kept)

    def keep(self, job: T) -> None:
        """Keeps what has just failed; what may be dropped is dropped, with a line in the log, where too much is."""
        now = self._clock()
        if self._again_at <= now:
            self._again_at = now + AGAIN_S
        self._at_once = 1
        if job.dispensable:
            if self._dispensable >= self._most_kept:
                if count := self._dropped.due():
                    log.error(
                        "%d writes were dropped, none of them of a request that was served: %d wait for the store",
                        count,
                        len(self._kept),
                    )
                return
            self._dispensable += 1
        self._kept.append(job)

    def due_in_s(self) -> float | None:
        """Seconds until something is to be tried again; None: nothing is kept."""
        return max(self._again_at - self._clock(), 0.0) if self._kept else None

    def take(self) -> Sequence[T]:
        """What is to be tried now; none before the time has come. `keep` what fails again."""
        if self.due_in_s() != 0:
            return ()
        count, self._at_once = self._at_once, min(2 * self._at_once, self._most_at_once)
        return self._pop(count)

    def take_anyway(self) -> Sequence[T]:
        """As much as can be tried at once, whatever the time."""
        return self._pop(self._most_at_once)

    def _pop(self, count: int) -> list[T]:
        taken = [self._kept.popleft() for _ in range(min(count, len(self._kept)))]
        self._dispensable -= sum(job.dispensable for job in taken)
        return taken
