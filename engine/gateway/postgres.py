"""The store in a PostgreSQL database, for gateways on several machines.

An advisory lock orders the writers' transactions, so that the same operations are right here as on SQLite; each holds
a whole batch, so the lock costs one round trip for many requests. Names are claimed with advisory locks of a session
of their own: the server frees them when the process or its connection dies. Which of the two it was, only time can
tell: a process that lives connects again and takes its names, so one is dead whose name stays free.
"""

import contextlib
import functools
import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar
from urllib.parse import urlsplit

from tokenmill.engine.gateway.database import Claim, Connection, Cursor, StoreUnavailableError
from tokenmill.errors import ConfigurationError, MissingDependencyError

try:
    import psycopg
    from psycopg.conninfo import conninfo_to_dict, make_conninfo

    from tokenmill.engine.gateway.postgres_patience import Hurried, Waiting
except ImportError as problem:
    raise MissingDependencyError("psycopg", "postgres", "a store in PostgreSQL") from problem

T = TypeVar("T")

#: Seconds to wait for the server when connecting: at first, and when it was lost.
CONNECT_TIMEOUT_S, RECONNECT_TIMEOUT_S = 10, 2
#: Seconds for which nobody tries to connect again when that has just failed.
NOT_AGAIN_S = 1.0
#: Seconds that an event loop waits for a new connection.
SOON_S = 0.05
#: Seconds for which a name must have been free to be inherited. Who lives looks after his names twice a second.
DEAD_AFTER_S = 1.2
#: The same from when the server was found again: all were without it then, and come back one after the other.
DEAD_AFTER_LOSS_S = 2 * RECONNECT_TIMEOUT_S
#: Seconds after which the server ends a transaction of a process that has stopped within it: the others wait for it.
STOPPED_AFTER_S = 5.0
#: Seconds for which a change of the tables waits for whoever uses them, less than others wait for an answer
#: (`PATIENCE_S`); seconds until it is tried again, and how often it is tried.
LOCK_WAIT_S, LOCK_PAUSE_S, LOCK_TRIES = 1.0, 1.0, 10
#: What libpq is told where the URL says nothing of it: a server that cannot be reached any more is given up within
#: seconds. Without, a statement waits for the kernel to do so, a quarter of an hour.
_NOTICE_LOSS = {
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
}
#: The advisory lock that orders writers.
_WRITERS = 0x746F6B656E6D696C
#: The one in which those queue who may have to change the tables: of them one at a time is among the writers.
_CHANGERS = _WRITERS + 1
#: Encodings of a database that keep every text; SQL_ASCII keeps the bytes.
_ENCODINGS = frozenset({"UTF8", "SQL_ASCII"})


class PostgresConnection:
    """A connection that takes statements as the store writes them, and is made anew when it broke.

    Args:
        url: `postgresql://...`.
        timeout_s: How long to wait for the server now.
        waits: It may wait for the server as long as that takes; otherwise it gives up soon, and another thread connects
            anew: it is for an event loop, whose streams all stand still meanwhile.

    Raises:
        ConfigurationError: The database cannot keep every text.
        StoreUnavailableError: The server does not let us in, here or when a statement is to be run.
    """

    def __init__(self, url: str, timeout_s: int = CONNECT_TIMEOUT_S, waits: bool = True) -> None:
        self._url = url
        self._again_at = float("-inf")
        self._kind: type[psycopg.Connection[Any]] = psycopg.Connection if waits else Hurried
        #: Looks after statements that may wait.
        self._waiting: Waiting | None = None
        #: The connection that another thread makes.
        self._coming: Future[psycopg.Connection[Any]] | None = None
        self._raw = self._connect(timeout_s)

    @property
    def broken(self) -> bool:
        """Whether it is known to have broken; the next statement makes it anew."""
        return self._raw.closed

    @property
    def raw(self) -> "psycopg.Connection[Any]":
        """psycopg's own connection, unbroken as far as is known."""
        if self.broken:
            self._raw = self._connect(RECONNECT_TIMEOUT_S) if self._kind is psycopg.Connection else self._come()
        return self._raw

    def _come(self) -> "psycopg.Connection[Any]":
        """A new connection that another thread has made, or makes at once."""
        self._refuse_too_soon()
        coming, patience_s = self._coming, 0.0
        if coming is None or (coming.done() and coming.exception() is not None):  # that one's failure is long ago
            coming, patience_s = Future(), SOON_S
            threading.Thread(target=self._fetch, args=(coming,), name="store-connector", daemon=True).start()
            self._coming = coming
        try:
            raw = coming.result(patience_s)
        except TimeoutError:
            raise StoreUnavailableError(f"{shown(self._url)} does not answer; see governance.store") from None
        self._coming = None
        return raw

    def _fetch(self, coming: "Future[psycopg.Connection[Any]]") -> None:
        try:
            coming.set_result(self._connect(RECONNECT_TIMEOUT_S))
        except Exception as error:  # noqa: BLE001 - it goes to whoever asks for the connection
            coming.set_exception(error)

    def execute(self, statement: str, parameters: Sequence[Any] = (), /) -> Cursor:
        """See `database.Connection`."""
        raw = self.raw
        with self._watched():
            return raw.execute(_translated(statement), parameters)

    def executemany(self, statement: str, parameters: Sequence[Sequence[Any]], /) -> object:
        """See `database.Connection`."""
        if parameters:
            raw = self.raw
            with self._watched():
                raw.cursor().executemany(_translated(statement), parameters)
        return None

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing.

        Raises:
            StoreUnavailableError: The server is gone; the error says whether the end of the transaction may have
                arrived.
        """
        raw = self.raw
        committing = False
        try:
            with self._awaited(), raw.transaction():
                with self._awaited(False):
                    yield
                committing = True
        except psycopg.Error as error:
            if self._is_loss(error):
                raise self._lost(error, committing) from error
            raise

    def session(self) -> int:
        """The number of the server's process that serves us now."""
        number: int = self.execute("SELECT pg_backend_pid()").fetchone()[0]
        return number

    def make(self, statement: str) -> None:
        """See `database.Connection`."""
        self.execute(statement)

    def has(self, table: str) -> bool:
        """See `database.Connection`."""
        found: bool = self.execute("SELECT to_regclass(?) IS NOT NULL", (table,)).fetchone()[0]
        return found

    def announce(self) -> None:
        """See `database.Connection`: nobody could tell."""

    def version(self) -> object:
        """See `database.Connection`: cannot be told."""
        return None

    def beside(self) -> contextlib.AbstractContextManager[None]:
        """See `database.Connection`."""
        return contextlib.nullcontext()

    def interrupt(self) -> None:
        """See `database.Connection`."""
        with contextlib.suppress(psycopg.Error):  # a server that cannot be reached does no work for us
            self._raw.cancel_safe(timeout=RECONNECT_TIMEOUT_S)

    def close(self) -> None:
        """See `database.Connection`."""
        self._raw.close()
        if self._coming is not None:
            self._coming.add_done_callback(_close)

    def _refuse_too_soon(self) -> None:
        if time.monotonic() < self._again_at:
            raise StoreUnavailableError(f"{shown(self._url)} could not be reached a moment ago; see governance.store")

    def _connect(self, timeout_s: int) -> "psycopg.Connection[Any]":
        self._refuse_too_soon()
        try:
            said = conninfo_to_dict(self._url)
            added = {name: value for name, value in _NOTICE_LOSS.items() if name not in said}
            place = make_conninfo(
                self._url,
                connect_timeout=timeout_s,
                application_name="tokenmill",
                client_encoding="utf8",
                **added,
            )
            raw = self._kind.connect(place, autocommit=True)
            raw.execute(f"SET idle_in_transaction_session_timeout = {round(STOPPED_AFTER_S * 1000)}")
            if self._kind is psycopg.Connection:
                self._waiting = Waiting(raw, place)
        except psycopg.Error as error:
            self._again_at = time.monotonic() + NOT_AGAIN_S
            raise self._lost(error) from None
        encoding = raw.info.parameter_status("server_encoding")
        if encoding not in _ENCODINGS:
            raw.close()
            raise ConfigurationError(f"{shown(self._url)} keeps text as {encoding}; make the database with UTF8")
        # Whatever the database's default: what a transaction reads must not be older than its turn among the writers.
        raw.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        return raw

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Statements in which the connection may be lost."""
        try:
            with self._awaited():
                yield
        except psycopg.Error as error:
            if self._is_loss(error):
                raise self._lost(error) from error
            raise

    def _awaited(self, server: bool = True) -> contextlib.AbstractContextManager[None]:
        """Meanwhile the server is waited for, or is not."""
        return contextlib.nullcontext() if self._waiting is None else self._waiting.awaited(server)

    def _is_loss(self, error: psycopg.Error) -> bool:
        """Whether it is the server's or the line's doing; it may end a session for reasons of its own."""
        if isinstance(error, psycopg.errors.ReadOnlySqlTransaction):
            # Another one has taken its place, and it kept the connection: the next statement looks who has the name.
            self._raw.close()
        return isinstance(error, psycopg.OperationalError) or self.broken

    def _lost(self, error: psycopg.Error, perhaps_done: bool = False) -> StoreUnavailableError:
        reason = " ".join(str(error).split())
        return StoreUnavailableError(f"{shown(self._url)} cannot be used: {reason}; see governance.store", perhaps_done)


class Postgres:
    """One database.

    Args:
        url: `postgresql://user@host/database`; libpq's variables and files give what it leaves out.

    Raises:
        ConfigurationError: It is no such URL.
    """

    local = False
    error = psycopg.Error

    def __init__(self, url: str) -> None:
        try:
            known = urlsplit(url).scheme in ("postgresql", "postgres")
        except ValueError:
            known = False
        if not known:  # not shown: it may hold a password
            raise ConfigurationError("the store's URL is no postgresql://user@host/database; give one, or a file")
        self._url = url
        self._session: PostgresConnection | None = None
        self._held: set[str] = set()
        #: Since when the names of others have been free, as far as was seen; `time.monotonic()`.
        self._free_since: dict[str, float] = {}
        self._found_again_at = float("-inf")
        self._guard = threading.Lock()

    @property
    def shown(self) -> str:
        """Its URL without anything secret."""
        return shown(self._url)

    def connect(self, writes: bool = False, waits: bool = True) -> PostgresConnection:
        """See `database.Database`."""
        connection = PostgresConnection(self._url, waits=waits)
        if writes:
            self._refuse_shared_sessions(connection)
        return connection

    def _refuse_shared_sessions(self, connection: PostgresConnection) -> None:
        """A session that a pool gives to another after each transaction would hold our names after our death.

        Raises:
            ConfigurationError: Such a pool stands between.
        """
        with contextlib.ExitStack() as undo:
            undo.callback(connection.close)
            ours = connection.session()
            other = PostgresConnection(self._url)
            undo.callback(other.close)
            with other.transaction():
                # A pool that shares has one session for both, or another one for us as long as that one is taken; some
                # give all they have in turn.
                if other.session() == ours or any(connection.session() != ours for _ in range(3)):
                    raise ConfigurationError(f"{self.shown} {_SHARED}")
            undo.pop_all()
            other.close()

    @contextlib.contextmanager
    def transaction(self, connection: Connection, waits: bool = True) -> Iterator[None]:
        """See `database.Database`; always waits."""
        with self._in_turn(connection, _WRITERS):
            yield

    @contextlib.contextmanager
    def _in_turn(self, connection: Connection, *locks: int) -> Iterator[None]:
        """A transaction that holds these advisory locks, taken one after the other."""
        assert isinstance(connection, PostgresConnection)
        with connection.transaction():
            for lock in locks:
                connection.execute("SELECT pg_advisory_xact_lock(?)", (lock,))
            yield

    def set_up(self, connection: Connection, make: Callable[[], None]) -> None:
        """See `database.Database`.

        A change of a table waits until nobody reads it, and all others wait behind it, also other gateways: so it is
        given up soon, and tried again when they have had their turn. Of many that start together none waits among the
        writers but one: else these would wait for all of them.
        """
        for number in range(LOCK_TRIES):
            if number:
                time.sleep(LOCK_PAUSE_S)
            try:
                with self._in_turn(connection, _CHANGERS, _WRITERS):
                    connection.execute(f"SET LOCAL lock_timeout = {round(LOCK_WAIT_S * 1000)}")
                    make()
                return
            except StoreUnavailableError as error:
                if not isinstance(error.__cause__, psycopg.errors.LockNotAvailable):
                    raise
        raise ConfigurationError(
            f"{self.shown} cannot be changed for this version: its tables were in use each of {LOCK_TRIES} times; "
            "start again when what reads or locks them (a dump, a long query; see pg_stat_activity) has ended"
        )

    def news(self) -> object:
        """See `database.Database`: asking takes too long."""
        return None

    def tidy(self) -> None:
        """See `database.Database`: the server does so itself."""

    def claim(self, name: str) -> Claim | None:
        """See `database.Database`."""
        with self._guard:
            return self._take(name)

    def _take(self, name: str) -> Claim | None:
        session = self._living_session()
        # A session may take its own lock again and again: what this process holds is known here.
        if name in self._held:
            return None
        taken: bool = session.execute("SELECT pg_try_advisory_lock(?)", (_lock_number(name),)).fetchone()[0]
        if not taken:
            return None
        self._held.add(name)
        return _Held(self, name)

    def inherit(self, name: str) -> Claim | None:
        """See `database.Database`: a name that has been free for a while."""
        with self._guard:
            session = self._living_session()
            if not session.execute(_IS_FREE, _lock_words(name)).fetchone()[0]:
                self._free_since.pop(name, None)
                return None
            now = time.monotonic()
            free_s = now - self._free_since.setdefault(name, now)
            if free_s < DEAD_AFTER_S or now - self._found_again_at < DEAD_AFTER_LOSS_S:
                return None
            del self._free_since[name]
            return self._take(name)

    def release(self, name: str) -> None:
        """Frees a name that this process holds."""
        with self._guard:
            self._held.discard(name)
            if self._session is not None and not self._session.broken:
                with contextlib.suppress(StoreUnavailableError):  # lost: the server has freed it
                    self._session.execute("SELECT pg_advisory_unlock(?)", (_lock_number(name),))

    def close(self) -> None:
        """See `database.Database`."""
        if self._session is not None:
            self._session.close()

    def _living_session(self) -> PostgresConnection:
        """The session that holds our names; a new one that takes them again where the server lost it."""
        if self._session is None:
            self._session = PostgresConnection(self._url)
            return self._session
        if not self._session.broken:
            with contextlib.suppress(StoreUnavailableError):
                if not self._session.execute(_IS_STANDBY).fetchone()[0]:
                    return self._session
        # Until all is taken again, the broken one stands for what is lost.
        self._session.close()
        session = PostgresConnection(self._url, RECONNECT_TIMEOUT_S)
        for held in self._held:
            # Nobody else has a use for it but to bury us; that is short.
            session.execute("SELECT pg_advisory_lock(?)", (_lock_number(held),))
        self._session = session
        self._free_since.clear()
        self._found_again_at = time.monotonic()
        return session


def _close(coming: "Future[psycopg.Connection[Any]]") -> None:
    """Closes a connection that nobody waits for any more."""
    if coming.exception() is None:
        coming.result().close()


class _Held:
    def __init__(self, database: Postgres, name: str) -> None:
        self._database = database
        self._name = name

    def release(self) -> None:
        """See `database.Claim`."""
        self._database.release(self._name)


def shown(url: str) -> str:
    """A URL fit for messages."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


_SHARED = (
    "is a pool that shares the server's sessions among its clients (PgBouncer's pool_mode transaction or statement); "
    "name the server itself, or a pool in session mode"
)
#: Whether another server has taken its place: names that are held there are held nowhere.
_IS_STANDBY = "SELECT pg_is_in_recovery()"
#: Whether nobody holds an advisory lock, by the halves of its number.
_IS_FREE = (
    "SELECT NOT EXISTS (SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1 AND granted "
    "AND classid::bigint = ? AND objid::bigint = ? "
    "AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))"
)


def _lock_words(name: str) -> tuple[int, int]:
    """A lock's number as `pg_locks` has it: (upper, lower) 32 bits."""
    return divmod(_lock_number(name) % 2**64, 2**32)


def _lock_number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)


@functools.lru_cache(maxsize=256)
def _translated(statement: str) -> str:
    return statement.replace("%", "%%").replace("?", "%s")
