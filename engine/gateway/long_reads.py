"""Reading that takes seconds, as sums over millions of rows do: a few at a time, and as long as somebody waits for it.

In threads of its own: those of the event loop do what requests, metrics and the heirs of dead workers wait for.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

from tokenmill.engine.gateway.database import Connection, Cursor
from tokenmill.engine.gateway.store import Store

T = TypeVar("T")

#: Each keeps a core of the machine busy; more wait for their turn.
AT_ONCE = 2


class LongReads:
    """Does them for one process. Close it before the store.

    Args:
        store: What is read.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._threads = ThreadPoolExecutor(AT_ONCE, "long-reader")
        self._under_way: set[_Read] = set()

    async def run(self, read: Callable[[Connection], T]) -> T:
        """The result of `read(connection)`; cancelled, the database stops working on it, too."""
        one = _Read(self._store, read)
        loop = asyncio.get_running_loop()
        self._under_way.add(one)
        try:
            return cast("T", await loop.run_in_executor(self._threads, one.run))
        except asyncio.CancelledError:
            loop.run_in_executor(None, one.give_up)  # asking a server to stop takes a while
            raise
        finally:
            self._under_way.discard(one)

    def close(self) -> None:
        """Ends those under way; blocks."""
        for one in list(self._under_way):
            one.give_up()
        self._threads.shutdown(cancel_futures=True)


class _GivenUpError(Exception):
    """Nobody waits for the result any more."""


class _Read:
    """One of them; as a connection, it stops between two statements, too."""

    def __init__(self, store: Store, read: Callable[[Connection], Any]) -> None:
        self._store = store
        self._read = read
        self._guard = threading.Lock()
        self._connection: Connection | None = None
        self._given_up = False

    def run(self) -> Any:
        with contextlib.closing(self._store.connect_reader()) as connection:
            self._connection = connection
            try:
                return self._read(cast("Connection", self))
            finally:
                with self._guard:
                    self._connection = None

    def execute(self, statement: str, parameters: Sequence[Any] = (), /) -> Cursor:
        """See `database.Connection`."""
        if self._given_up or self._connection is None:
            raise _GivenUpError
        return self._connection.execute(statement, parameters)

    def give_up(self) -> None:
        """Has it end."""
        with self._guard:
            self._given_up = True
            if self._connection is not None:
                self._connection.interrupt()
