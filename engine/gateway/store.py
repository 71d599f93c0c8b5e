"""What several gateway processes must agree on, in one SQLite file: keys, budgets, ledger, audit trail.

All writes of a process go through one thread, in the order in which they were asked for; what has gathered by the time
the thread is free is committed in one transaction. Between processes a file lock orders the transactions: it wakes the
next one at once, where SQLite's own waiting would sleep for milliseconds, and the kernel frees it when a process dies.

The file is in WAL mode with `synchronous=NORMAL`: a process killed at any point loses nothing that was committed and
leaves nothing half written; a power failure may lose the last moments, but never consistency. Statements keep to what
PostgreSQL takes, too. Times are UTC in milliseconds, money is in micro-cents (`money`).
"""

import asyncio
import fcntl
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from tokenmill.errors import ConfigurationError

T = TypeVar("T")
Operation = Callable[[sqlite3.Connection], T]

#: Most operations in one transaction: bounds how long the other processes wait.
MOST_IN_A_BATCH = 256
#: Version of the schema in `PRAGMA user_version`.
SCHEMA_VERSION = 1


def now_ms() -> int:
    """The time in milliseconds since 1970, UTC."""
    return time.time_ns() // 1_000_000


class Store:
    """One process's hold on the file. Close it at the end.

    Args:
        path: The file; it and its folder are made where they are missing, readable for their owner alone.
        schema: Statements that make the tables in an empty file.

    Raises:
        ConfigurationError: The file cannot be opened, is no database, or was made by a newer version.
    """

    def __init__(self, path: Path, schema: Sequence[str]) -> None:
        self.path = path
        self._queue: queue.SimpleQueue[tuple[Operation[Any], Future[Any]] | None] = queue.SimpleQueue()
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._writer = self._connect()
            self._transact(lambda connection: _make_tables(connection, schema, path))
            #: For reading, in the thread that made the store; sees everything that is committed.
            self.reader = self._connect()
        except OSError as error:
            raise ConfigurationError(
                f"{path} cannot be opened: {(error.strerror or str(error)).lower()}; name another file"
            ) from None
        except sqlite3.Error as error:
            raise ConfigurationError(f"{path} cannot be used: {error}; name another file") from None
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=30.0)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("PRAGMA foreign_keys=ON")
        return connection

    def submit(self, operation: Operation[T]) -> "Future[T]":
        """Has `operation(connection)` run in the writer's next transaction; the result is there once it is committed.

        Operations run in the order of their submission. One that raises leaves no trace of itself.
        """
        future: Future[T] = Future()
        self._queue.put((operation, future))
        return future

    async def write(self, operation: Operation[T]) -> T:
        """`submit` for a coroutine."""
        return await asyncio.wrap_future(self.submit(operation))

    def write_now(self, operation: Operation[T]) -> T:
        """`submit` for a program that may wait."""
        return self.submit(operation).result()

    def close(self) -> None:
        """Commits what was submitted and closes the file."""
        self._queue.put(None)
        self._thread.join()
        self._writer.close()
        self.reader.close()
        os.close(self._lock)

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            batch = [first]
            last = False
            while len(batch) < MOST_IN_A_BATCH and not self._queue.empty():
                item = self._queue.get()
                if item is None:
                    last = True
                    break
                batch.append(item)
            self._commit([(run, future) for run, future in batch if future.set_running_or_notify_cancel()])
            if last:
                return

    def _commit(self, batch: list[tuple[Operation[Any], Future[Any]]]) -> None:
        """Runs a batch in one transaction; where one operation fails, each runs in a transaction of its own."""
        try:
            results = self._transact(lambda connection: [run(connection) for run, _ in batch])
        except Exception as error:  # noqa: BLE001 - it goes to whoever waits for the operation
            if len(batch) == 1:
                batch[0][1].set_exception(error)
                return
            for item in batch:
                self._commit([item])
            return
        for (_, future), result in zip(batch, results, strict=True):
            future.set_result(result)

    def _transact(self, operation: Operation[T]) -> T:
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                result = operation(self._writer)
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise
            return result
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)


def _make_tables(connection: sqlite3.Connection, schema: Sequence[str], path: Path) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise ConfigurationError(
            f"{path} has schema version {version}, this Tokenmill knows {SCHEMA_VERSION}; upgrade Tokenmill"
        )
    if version == 0:
        for statement in schema:
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
