"""The store in an SQLite file.

Between processes a file lock orders the transactions: it wakes the next one at once, where SQLite's own waiting would
sleep for milliseconds, and the kernel frees it when a process dies. The file is in WAL mode with `synchronous=NORMAL`:
a process killed at any point loses nothing that was committed and leaves nothing half written; a power failure may
lose the last moments, but never consistency.
"""

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from tokenmill.engine.gateway.store import Claim, Connection
from tokenmill.errors import ConfigurationError

#: Pages in the write-ahead log before they are copied into the file, which waits for the disk: 16 MiB.
_CHECKPOINT = "wal_autocheckpoint=4096"


class Sqlite:
    """One file and what stands beside it: `FILE.lock` for the order of writers, `FILE.claims/` for names.

    Args:
        path: The file.

    Raises:
        ConfigurationError: The file or its folder cannot be made or opened.
    """

    local = True

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._claims = path.with_name(path.name + ".claims")
            self._claims.mkdir(exist_ok=True, mode=0o700)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._lock = _open_lock(Path(f"{path}.lock"))
        except OSError as error:
            raise ConfigurationError(
                f"{path} cannot be opened: {(error.strerror or str(error)).lower()}; name another file"
            ) from None

    @property
    def shown(self) -> str:
        """Its path."""
        return str(self._path)

    def connect(self) -> Connection:
        """See `store.Database`."""
        connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=30.0)
        try:
            for setting in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", _CHECKPOINT):
                connection.execute(f"PRAGMA {setting}")
        except sqlite3.Error as error:
            connection.close()
            raise ConfigurationError(f"{self._path} cannot be used: {error}; name another file") from None
        return connection

    @contextlib.contextmanager
    def transaction(self, connection: Connection) -> Iterator[None]:
        """See `store.Database`."""
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.OperationalError):  # a full disk has rolled it back already
                    connection.execute("ROLLBACK")
                raise
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def claim(self, name: str) -> Claim | None:
        """See `store.Database`; the kernel frees the lock of a process that dies."""
        path = self._claims / name
        descriptor = _open_lock(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return _LockedFile(path, descriptor)

    def close(self) -> None:
        """See `store.Database`."""
        os.close(self._lock)


class _LockedFile:
    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor

    def release(self) -> None:
        """See `store.Claim`."""
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
