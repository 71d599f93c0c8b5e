"""What is to be written into the store, and how whoever waits for it gets the result."""

import asyncio
import logging
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


def wanted(job: Job) -> bool:
    """Whether it is still to be done; a program that waits for it cannot call it off any more."""
    if isinstance(job.waiter, Future):
        return job.waiter.set_running_or_notify_cancel()
    return job.waiter is None or not job.waiter.cancelled()


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
