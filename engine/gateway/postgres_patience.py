"""How long a statement waits for PostgreSQL: on an event loop a moment, elsewhere while the server is at work on it.

A proxy or balancer between may keep a connection and forward nothing any more, and the kernel does not notice: packets
are acknowledged. So where a statement takes long, the server is asked on another connection whether it is at work on
it. If not, the connection is shut: to whoever waits, as if the server had gone away.
"""

import contextlib
import os
import socket
import threading
import time
import weakref
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

import psycopg
from psycopg import waiting

T = TypeVar("T")

#: Seconds that an event loop waits for a statement's answer.
PATIENCE_S = 2.0
_LOOK_EVERY_S = 0.1
#: Seconds without an answer after which the server is asked, and for which it must have been idle: what is on its way
#: is not lost.
SILENT_S, IDLE_S = 10.0, 5.0
_AT_WORK = (
    "SELECT state IS NULL OR state = 'active' OR state_change > clock_timestamp() - make_interval(secs => %s) "
    "FROM pg_stat_activity WHERE pid = %s"
)


class Hurried(psycopg.Connection[Any]):
    """A connection that is closed when a statement waits longer for the server than an event loop may."""

    def wait(self, gen: "Generator[Any, Any, T]", *_: Any, **__: Any) -> T:
        """See psycopg; of its ways to wait, the one that looks after the statement in every version."""
        return waiting.wait_poll(self._in_time(gen), self.pgconn.socket, _LOOK_EVERY_S)

    def _in_time(self, statement: "Generator[Any, Any, T]") -> "Generator[Any, Any, T]":
        """The same statement, given up in time."""
        end = time.monotonic() + PATIENCE_S
        try:
            state = next(statement)
            while True:
                ready = yield state
                if not ready and time.monotonic() > end:
                    self.pgconn.finish()
                    raise psycopg.OperationalError(f"no answer within {PATIENCE_S:g} s")
                state = statement.send(ready)
        except StopIteration as ended:
            result: T = ended.value
            return result


class Waiting:
    """One connection whose statements may take long.

    Args:
        raw: It.
        place: libpq's connection string, to ask the server on another.

    Raises:
        psycopg.Error: It is lost already.
    """

    __slots__ = ("__weakref__", "_guard", "_place", "_process", "_raw", "_since")

    def __init__(self, raw: "psycopg.Connection[Any]", place: str) -> None:
        self._raw = raw
        self._place = place
        row = raw.execute("SELECT pg_backend_pid()").fetchone()
        self._process = 0 if row is None else int(row[0])
        self._since: float | None = None
        self._guard = threading.Lock()
        _WATCH.add(self)

    @contextlib.contextmanager
    def awaited(self, server: bool = True) -> Iterator[None]:
        """Meanwhile the server is waited for, or is not; afterwards it is as before, but since then."""
        before = self._since is not None
        self._set(server)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, waits: bool) -> None:
        with self._guard:
            self._since = time.monotonic() if waits else None

    def look(self) -> None:
        """Shuts the connection if it waits for what will not come."""
        since = self._since
        if since is None or time.monotonic() - since < SILENT_S or self._is_served():
            return
        with self._guard, contextlib.suppress(OSError, psycopg.Error):
            if self._since == since:  # while it waits, its socket is no other's
                with socket.socket(fileno=os.dup(self._raw.pgconn.socket)) as line:
                    line.shutdown(socket.SHUT_RDWR)

    def _is_served(self) -> bool:
        """Whether the server is at work for it, or cannot be asked."""
        try:
            with Hurried.connect(self._place, autocommit=True) as other:
                row = other.execute(_AT_WORK, (IDLE_S, self._process)).fetchone()
        except psycopg.Error:
            return True
        return row is not None and bool(row[0])


class _Watch:
    """Looks after all connections of the process."""

    def __init__(self) -> None:
        self._all: weakref.WeakSet[Waiting] = weakref.WeakSet()
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, one: Waiting) -> None:
        """Looks after this one, too."""
        with self._guard:
            self._all.add(one)
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, name="store-watch", daemon=True)
                self._thread.start()

    def _look(self) -> None:
        while True:
            time.sleep(SILENT_S / 2)
            with self._guard:
                every = list(self._all)
            while every:
                every.pop().look()


_WATCH = _Watch()
