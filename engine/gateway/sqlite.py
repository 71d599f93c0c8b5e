"""The store in an SQLite file.

Between processes a file lock orders the transactions: it wakes the next one at once, where SQLite's own waiting would
sleep for milliseconds, and the kernel frees it when a process dies. The file is in WAL mode with `synchronous=NORMAL`:
a process killed at any point loses nothing that was committed and leaves nothing half written; a power failure may
lose the last moments, but never consistency.
"""

import contextlib
import fcntl
import itertools
import os
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tokenmill.engine.gateway.database import Claim, Connection, StoreUnavailableError
from tokenmill.errors import ConfigurationError

#: Pages in the write-ahead log before they are copied into the file, which waits for the disk: 16 MiB. A connection
#: that may not wait leaves it to `tidy`.
_CHECKPOINT_PAGES = 4096
#: Bytes of the log that stay on the disk once it begins anew: whoever reads for long has it grow by all that is written
#: meanwhile.
_LOG_BYTES = 64 << 20
#: How long a connection that may wait does so for a program that holds the file without our lock, in seconds.
_PATIENCE_S = 30.0
#: What may pass: somebody holds the file, the disk is full, fails or was made read-only, too many files are open.
_PASSING = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_CANTOPEN,
    }
)
#: Size of the number that counts what was announced.
_NEWS_BYTES = 8
#: What stands in a table's statement where its rows are to lie in the order of its primary key (`governance.schema`).
_CLUSTERED = "/* clustered */"


class SqliteConnection(sqlite3.Connection):
    """A connection; `Sqlite` makes it.

    Attributes:
        order: The file whose lock orders the writers, opened for this connection alone; -1: it only reads.
        rollbacks: Transactions that were undone.
        announces: The transaction under way is announced.
        beside_count: Rows that were changed `beside`.
    """

    _serials = itertools.count()

    def prepare(self, order: int) -> None:
        """Call it once, first."""
        self.order = order
        self.rollbacks = 0
        self.announces = False
        self.beside_count = 0
        self._serial = next(self._serials)

    def make(self, statement: str) -> None:
        """See `database.Connection`."""
        self.execute(statement.replace(_CLUSTERED, "WITHOUT ROWID"))

    def has(self, table: str) -> bool:
        """See `database.Connection`."""
        query = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
        return self.execute(query, (table,)).fetchone() is not None

    def announce(self) -> None:
        """See `database.Connection`."""
        self.announces = True

    def version(self) -> object:
        """See `database.Connection`."""
        (changed,) = self.execute("PRAGMA data_version").fetchone()
        return self._serial, changed, self.total_changes - self.beside_count, self.rollbacks

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """See `database.Connection`."""
        before = self.total_changes
        yield
        self.beside_count += self.total_changes - before

    def close(self) -> None:
        """See `database.Connection`."""
        super().close()
        order, self.order = self.order, -1
        if order >= 0:
            os.close(order)


class Sqlite:
    """One file and what stands beside it: `FILE.lock` for the order of writers and for news, `FILE.claims/` for names.

    Args:
        path: The file, or a symbolic link to it.

    Raises:
        ConfigurationError: The file or its folder cannot be made or opened.
    """

    local = True
    error = sqlite3.Error

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # By whichever links it is named: what stands beside it is the same for all.
            real = Path(os.path.realpath(path))
            self._claims = real.with_name(real.name + ".claims")
            self._claims.mkdir(exist_ok=True, mode=0o700)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._order = real.with_name(real.name + ".lock")
            self._announced = _open_lock(self._order)
            self._begin_log()
            self._opened = self._identity()
        except OSError as error:
            raise ConfigurationError(
                f"{path} cannot be opened: {(error.strerror or str(error)).lower()}; name another file"
            ) from None

    def _begin_log(self) -> None:
        """Makes the file one with a write-ahead log, which it stays.

        One process at a time: of two that do so together SQLite tells one that the file is locked, however long that
        one would wait.
        """
        fcntl.flock(self._announced, fcntl.LOCK_EX)
        try:
            self.connect().close()
        finally:
            fcntl.flock(self._announced, fcntl.LOCK_UN)

    @property
    def shown(self) -> str:
        """Its path."""
        return str(self._path)

    def connect(self, writes: bool = False, waits: bool = True) -> SqliteConnection:
        """See `database.Database`."""
        try:
            connection = sqlite3.connect(
                self._path,
                isolation_level=None,
                check_same_thread=False,
                timeout=_PATIENCE_S,
                factory=SqliteConnection,
            )
        except sqlite3.Error as error:
            raise self._unusable(error) from None
        connection.prepare(_open_lock(self._order) if writes else -1)
        checkpoint = f"wal_autocheckpoint={_CHECKPOINT_PAGES if waits else 0}"
        try:
            limit = f"journal_size_limit={_LOG_BYTES}"
            (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
            for setting in ("synchronous=NORMAL", "foreign_keys=ON", checkpoint, limit):
                connection.execute(f"PRAGMA {setting}")
            if not waits:  # from now on
                connection.execute("PRAGMA busy_timeout=0")
        except sqlite3.Error as error:
            connection.close()
            raise self._unusable(error) from None
        if mode != "wal":  # readers and writers would wait for each other
            connection.close()
            raise ConfigurationError(
                f"{self._path} stays in journal mode {mode}: processes share no memory there; name one on a local disk"
            )
        return connection

    def _unusable(self, error: sqlite3.Error) -> ConfigurationError:
        return ConfigurationError(f"{self._path} cannot be used: {error}; name another file")

    def set_up(self, connection: Connection, make: Callable[[], None]) -> None:
        """See `database.Database`."""
        with self.transaction(connection):
            make()

    @contextlib.contextmanager
    def transaction(self, connection: Connection, waits: bool = True) -> Iterator[None]:
        """See `database.Database`.

        Raises:
            StoreUnavailableError: Nothing can be written now.
        """
        assert isinstance(connection, SqliteConnection)
        order = connection.order
        fcntl.flock(order, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if waits:
                    raise
                raise BlockingIOError(str(error)) from None
            connection.announces = False
            try:
                yield
                if connection.announces:
                    _count_up(order)
                connection.execute("COMMIT")
                if connection.announces:
                    # Who looked in between has read what was before.
                    _count_up(order)
            except BaseException:
                connection.rollbacks += 1
                with contextlib.suppress(sqlite3.OperationalError):  # a full disk has rolled it back already
                    connection.execute("ROLLBACK")
                raise
        except sqlite3.OperationalError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _PASSING:
                raise StoreUnavailableError(
                    f"{self._path} cannot be written now: {error}; see governance.store"
                ) from error
            raise
        finally:
            fcntl.flock(order, fcntl.LOCK_UN)

    def news(self) -> object:
        """See `database.Database`: a number in the file whose lock orders the writers."""
        return os.pread(self._announced, _NEWS_BYTES, 0)

    def tidy(self) -> None:
        """See `database.Database`: copies the write-ahead log into the file, most of it while others go on writing."""
        with ThreadPoolExecutor(1, "store-copier", initializer=_give_way) as patient:
            patient.submit(self._copy_log).result()
        with contextlib.closing(self.connect(writes=True)) as connection:
            fcntl.flock(connection.order, fcntl.LOCK_EX)
            try:
                # What came meanwhile: only a log that is copied whole begins anew.
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            finally:
                fcntl.flock(connection.order, fcntl.LOCK_UN)

    def _copy_log(self) -> None:
        with contextlib.closing(self.connect()) as connection:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()

    def claim(self, name: str) -> Claim | None:
        """See `database.Database`; the kernel frees the lock of a process that dies."""
        path = self._claims / name
        descriptor = _open_lock(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return _LockedFile(path, descriptor)

    def inherit(self, name: str) -> Claim | None:
        """See `database.Database`: a process keeps its lock as long as it lives.

        Raises:
            StoreUnavailableError: What is written goes to a file that nobody will find again.
        """
        if self._identity() != self._opened:
            raise StoreUnavailableError(
                f"{self._path} was removed or replaced while it was open; stop all gateways and start them again"
            )
        return self.claim(name)

    def _identity(self) -> tuple[int, int] | None:
        """Which file its path leads to now."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def close(self) -> None:
        """See `database.Database`."""
        os.close(self._announced)


class _LockedFile:
    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor

    def release(self) -> None:
        """See `database.Claim`."""
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


def _give_way() -> None:
    """Gives this thread a third of what others get of the core; only Linux knows threads by numbers like processes."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)


def _count_up(descriptor: int) -> None:
    known = int.from_bytes(os.pread(descriptor, _NEWS_BYTES, 0))
    os.pwrite(descriptor, (known + 1).to_bytes(_NEWS_BYTES), 0)


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
