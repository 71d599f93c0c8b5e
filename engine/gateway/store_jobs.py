"""What is to be written into the store, and how whoever waits for it gets the result."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenmill.engine.gateway.store import Collector

log = logging.getLogger("tokenmill.gateway.store")


class Job:
    """A thing for a collector to do, and who wants its result: nobody, a program that waits, or a coroutine."""

    __slots__ = ("collector", "dispensable", "item", "loop", "waiter")

    def __init__(
        self,
        collector: "Collector",
        item: Any,
        waiter: "Future[Any] | asyncio.Future[Any] | None",
        loop: asyncio.AbstractEventLoop | None = None,
        dispensable: bool = False,
    ) -> None:
        self.collector = collector
        self.item = item
        self.waiter = waiter
        self.loop = loop
        self.dispensable = dispensable


class Unanswered:
    """What coroutines wait for, and for how long they do.

    Args:
        patience_s: How long, a second more or less.
        silence: What they are told then.
    """

    def __init__(self, patience_s: float, silence: Callable[[], Exception]) -> None:
        self._patience_s = patience_s
        self._silence = silence
        #: Until when; the earliest first.
        self._waiting: deque[tuple[float, asyncio.Future[Any]]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None

    def add(self, loop: asyncio.AbstractEventLoop, future: "asyncio.Future[Any]") -> None:
        """Looks after one more; call it in its loop."""
        self._waiting.append((loop.time() + self._patience_s, future))
        if self._loop is not loop:
            self._loop = loop
            loop.call_later(1.0, self._look)

    def _look(self) -> None:
        assert self._loop is not None
        waiting, now = self._waiting, self._loop.time()
        while waiting and (waiting[0][1].done() or waiting[0][0] <= now):
            _, future = waiting.popleft()
            if not future.done():
                future.set_exception(self._silence())
        if waiting:
            self._loop.call_later(1.0, self._look)
        else:
            self._loop = None


def wanted(job: Job) -> bool:
    """Whether it is still to be done; a program that waits for it cannot call it off any more."""
    if isinstance(job.waiter, Future):
        return job.waiter.set_running_or_notify_cancel()
    return job.waiter is None or not job.waiter.done()


def deliver(batch: Sequence[Job], results: list[Any]) -> None:
    """Hands out results; waking an event loop costs as much as a statement, so it is woken once for all."""
    woken: dict[asyncio.AbstractEventLoop, list[tuple[Future[Any] | asyncio.Future[Any], Any]]] = {}
    for job, result in zip(batch, results, strict=True):
        if isinstance(job.waiter, Future):
            job.waiter.set_result(result)
        elif job.waiter is not None and job.loop is not None:
            woken.setdefault(job.loop, []).append((job.waiter, result))
    for loop, pairs in woken.items():
        _wake(loop, set_results, pairs)


def set_results(pairs: "Sequence[tuple[Future[Any] | asyncio.Future[Any], Any]]") -> None:
    """Gives their results to all that still wait. Call it in the thread of their loop."""
    for future, result in pairs:
        if not future.done():
            future.set_result(result)


def deliver_failure(job: Job, error: Exception) -> None:
    """Tells whoever waits, or the log."""
    if isinstance(job.waiter, Future):
        job.waiter.set_exception(error)
    elif job.waiter is None or job.loop is None:
        log.error("a write failed: %s", error, exc_info=error)
    else:
        waiter = job.waiter
        _wake(job.loop, lambda failure: None if waiter.done() else waiter.set_exception(failure), error)


def _wake(loop: asyncio.AbstractEventLoop, action: Callable[[Any], object], argument: Any) -> None:
    try:
        loop.call_soon_threadsafe(action, argument)
    except RuntimeError:  # the loop has ended, and its coroutines with it
        log.debug("nobody waits any more for a write")
