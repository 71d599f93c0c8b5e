"""What several gateway processes must agree on, in one database: keys, budgets, ledger, audit trail.

All writes of a process go through one thread, in the order in which they were asked for; what has gathered by the time
the thread is free is committed in one transaction. The database itself is a `sqlite.Sqlite` file or, for gateways on
several machines, a `postgres.Postgres` server; statements keep to what both take, with `?` for parameters. Times are
UTC in milliseconds, money is in micro-cents (`money`).
"""

import asyncio
import contextlib
import functools
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tokenmill.errors import ConfigurationError

T = TypeVar("T")

log = logging.getLogger("tokenmill.gateway.store")

#: Most operations in one transaction: bounds how long the other processes wait.
MOST_IN_A_BATCH = 256
#: How long what nobody waits for may wait for company, in seconds: a transaction of its own costs ten times as much.
POSTED_WAIT_S = 0.005
#: Version of the tables; a database made by a newer Tokenmill is refused.
SCHEMA_VERSION = 1


def now_ms() -> int:
    """The time in milliseconds since 1970, UTC."""
    return time.time_ns() // 1_000_000


@functools.lru_cache(maxsize=MOST_IN_A_BATCH)
def placeholders(count: int) -> str:
    """`(?, ?, ...)` for so many values."""
    return "(" + ", ".join("?" * count) + ")"


class Cursor(Protocol):
    """What a statement answered."""

    def fetchone(self) -> Any:
        """The next row as a tuple; None at the end."""
        ...

    def fetchall(self) -> list[Any]:
        """All rows that are left."""
        ...

    def __iter__(self) -> Iterator[Any]: ...


class Connection(Protocol):
    """A connection to the database."""

    def execute(self, statement: str, parameters: Sequence[Any] = (), /) -> Cursor:
        """Runs one statement."""
        ...

    def executemany(self, statement: str, parameters: Sequence[Sequence[Any]], /) -> object:
        """Runs one statement for each of many sets of parameters."""
        ...

    def close(self) -> None:
        """Closes it."""
        ...


class Claim(Protocol):
    """A name that this process holds; whoever holds it is freed of it when his process dies."""

    def release(self) -> None:
        """Lets go of the name."""
        ...


class Database(Protocol):
    """A kind of database.

    Attributes:
        local: Reading takes microseconds: an event loop may do it for every request.
    """

    local: bool

    @property
    def shown(self) -> str:
        """Its place, for messages."""
        ...

    def connect(self) -> Connection:
        """A new connection; each statement outside of a transaction is one of its own.

        Raises:
            ConfigurationError: The database cannot be reached, or is none.
        """
        ...

    def transaction(self, connection: Connection) -> AbstractContextManager[None]:
        """All or nothing, and no other process writes meanwhile."""
        ...

    def claim(self, name: str) -> Claim | None:
        """Takes a name; None while another process holds it."""
        ...

    def close(self) -> None:
        """Frees what is not a connection."""
        ...


Operation = Callable[[Connection], T]
#: Does many things of one kind in one transaction; answers with a result for each, in their order.
Collector = Callable[[Connection, list[Any]], Sequence[Any]]


class _Job:
    """A thing for a collector to do, and who wants its result: nobody, a program that waits, or a coroutine."""

    __slots__ = ("collector", "item", "loop", "waiter")

    def __init__(
        self,
        collector: Collector,
        item: Any,
        waiter: "Future[Any] | asyncio.Future[Any] | None",
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self.collector = collector
        self.item = item
        self.waiter = waiter
        self.loop = loop


def _one_by_one(connection: Connection, operations: list[Operation[Any]]) -> list[Any]:
    return [operation(connection) for operation in operations]


class Store:
    """One process's hold on the database. Close it at the end.

    Args:
        place: Path of an SQLite file, made with its folder where it is missing, readable for its owner alone; or
            `postgresql://...`.
        schema: Statements that make the tables in an empty database.

    Attributes:
        local: Reading takes microseconds: an event loop may do it for every request.

    Raises:
        ConfigurationError: The database cannot be opened, is none, or was made by a newer version.
        MissingDependencyError: PostgreSQL is asked for and its client library is absent.
    """

    def __init__(self, place: Path | str, schema: Sequence[str]) -> None:
        self.place = place
        self._queue: queue.SimpleQueue[list[_Job] | None] = queue.SimpleQueue()
        #: What the event loop asked for since it last came round; one wake-up of the writer is enough for all of it.
        self._gathered: list[_Job] = []
        self._handing_over = False
        self._timer: asyncio.TimerHandle | None = None
        self._database = _database(place)
        self.local = self._database.local
        with contextlib.ExitStack() as undo:
            undo.callback(self._database.close)
            self._writer = self._database.connect()
            undo.callback(self._writer.close)
            with self._database.transaction(self._writer):
                _make_tables(self._writer, schema, self._database.shown)
            undo.pop_all()
        #: For reading, in the thread that made the store; sees everything that is committed.
        self.reader = self._database.connect()
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    def submit(self, operation: Operation[T]) -> "Future[T]":
        """Has `operation(connection)` run in the writer's next transaction; the result is there once it is committed.

        Operations run in the order of their submission. One that raises leaves no trace of itself.
        """
        future: Future[T] = Future()
        self._queue.put([_Job(_one_by_one, operation, future)])
        return future

    def post(self, operation: Operation[object]) -> None:
        """`submit` for who does not wait; a failure goes to the log."""
        self.post_item(_one_by_one, operation)

    async def write(self, operation: Operation[T]) -> T:
        """`submit` for a coroutine; cancelled before its turn, the operation does not run."""
        result: T = await self.write_item(_one_by_one, operation)
        return result

    def write_item(self, collector: Collector, item: Any) -> "asyncio.Future[Any]":
        """`write` for one of many things that are done at less cost together: `collector(connection, items)`.

        Items that stand next to each other in the order of submission, with the same collector, are done together.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._gathered.append(_Job(collector, item, future, loop))
        if not self._handing_over:
            self._handing_over = True
            loop.call_soon(self.hand_over)
        return future

    def post_item(self, collector: Collector, item: Any) -> None:
        """`post` for one of many things; see `write_item`."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._queue.put([_Job(collector, item, None)])
        else:
            self._gathered.append(_Job(collector, item, None))
            if self._timer is None:
                self._timer = loop.call_later(POSTED_WAIT_S, self.hand_over)

    def hand_over(self) -> None:
        """Gives the writer what the event loop has asked for; call it in the loop's thread, before it waits."""
        self._handing_over = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._gathered:
            gathered, self._gathered = self._gathered, []
            self._queue.put(gathered)

    def write_now(self, operation: Operation[T]) -> T:
        """`submit` for a program that may wait."""
        return self.submit(operation).result()

    def connect_reader(self) -> Connection:
        """One more connection for reading, e.g. for a long query in another thread; close it afterwards."""
        return self._database.connect()

    def claim(self, name: str) -> Claim | None:
        """Takes a name until it is released or this process dies; None while another process holds it."""
        return self._database.claim(name)

    def close(self) -> None:
        """Commits what was submitted and closes the database."""
        self.hand_over()
        self._queue.put(None)
        self._thread.join()
        self._writer.close()
        self.reader.close()
        self._database.close()

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            batch = list(first)
            last = False
            while len(batch) < MOST_IN_A_BATCH and not self._queue.empty():
                jobs = self._queue.get()
                if jobs is None:
                    last = True
                    break
                batch += jobs
            self._commit([job for job in batch if _wanted(job)])
            if last:
                return

    def _commit(self, batch: list[_Job]) -> None:
        """Runs a batch in one transaction; where one operation fails, each runs in a transaction of its own."""
        try:
            with self._database.transaction(self._writer):
                results: list[Any] = []
                for collector, jobs in itertools.groupby(batch, key=lambda job: job.collector):
                    results += collector(self._writer, [job.item for job in jobs])
        except Exception as error:  # noqa: BLE001 - it goes to whoever waits for the operation
            if len(batch) == 1:
                _deliver_failure(batch[0], error)
                return
            for job in batch:
                self._commit([job])
            return
        _deliver(batch, results)


def _wanted(job: _Job) -> bool:
    if isinstance(job.waiter, Future):
        return job.waiter.set_running_or_notify_cancel()
    return job.waiter is None or not job.waiter.cancelled()


def _deliver(batch: list[_Job], results: list[Any]) -> None:
    """Hands out results; waking an event loop costs as much as a statement, so it is woken once for all."""
    woken: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = {}
    for job, result in zip(batch, results, strict=True):
        if isinstance(job.waiter, Future):
            job.waiter.set_result(result)
        elif job.waiter is not None and job.loop is not None:
            woken.setdefault(job.loop, []).append((job.waiter, result))
    for loop, pairs in woken.items():
        _wake(loop, _set_results, pairs)


def _set_results(pairs: "list[tuple[asyncio.Future[Any], Any]]") -> None:
    for future, result in pairs:
        if not future.done():
            future.set_result(result)


def _deliver_failure(job: _Job, error: Exception) -> None:
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


def _database(place: Path | str) -> Database:
    if isinstance(place, str) and "://" in place:
        from tokenmill.engine.gateway.postgres import Postgres

        return Postgres(place)
    from tokenmill.engine.gateway.sqlite import Sqlite

    return Sqlite(Path(place))


def _make_tables(connection: Connection, schema: Sequence[str], shown: str) -> None:
    connection.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL)")
    row = connection.execute("SELECT version FROM schema_version").fetchone()
    if row is None:
        for statement in schema:
            connection.execute(statement)
        connection.execute("INSERT INTO schema_version (version) VALUES (?)", (SCHEMA_VERSION,))
    elif row[0] > SCHEMA_VERSION:
        raise ConfigurationError(
            f"{shown} has schema version {row[0]}, this Tokenmill knows {SCHEMA_VERSION}; upgrade Tokenmill"
        )
