"""What the store asks of a database, whichever it is (`sqlite`, `postgres`)."""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from tokenmill.errors import ConfigurationError


class StoreUnavailableError(ConfigurationError):
    """The database cannot be asked now; later it may.

    Attributes:
        perhaps_done: The answer to a commit was lost: nobody knows whether it was done. Otherwise nothing was written.
    """

    def __init__(self, message: str, perhaps_done: bool = False) -> None:
        super().__init__(message)
        self.perhaps_done = perhaps_done


def now_ms() -> int:
    """The time in milliseconds since 1970, UTC."""
    return time.time_ns() // 1_000_000


@functools.lru_cache(maxsize=256)
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

    def make(self, statement: str) -> None:
        """Runs a statement that makes a table or an index."""
        ...

    def has(self, table: str) -> bool:
        """Whether there is such a table, where the ones of the store are."""
        ...

    def announce(self) -> None:
        """Has `Database.news` change with this transaction."""
        ...

    def version(self) -> object:
        """Differs from before where anything in the database may; None: nobody can tell. For the writer's."""
        ...

    def beside(self) -> AbstractContextManager[None]:
        """What this connection writes meanwhile does not change its `version`: it concerns nobody who asks for that."""
        ...

    def interrupt(self) -> None:
        """Has the statement under way fail; for another thread."""
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
    def error(self) -> type[Exception]:
        """What its library raises where a statement fails."""
        ...

    @property
    def shown(self) -> str:
        """Its place, for messages."""
        ...

    def connect(self, writes: bool = False, waits: bool = True) -> Connection:
        """A new connection; each statement outside of a transaction is one of its own.

        Args:
            writes: It is for transactions.
            waits: It may wait for others, and for the disk.

        Raises:
            ConfigurationError: The database cannot be reached, or is none.
        """
        ...

    def transaction(self, connection: Connection, waits: bool = True) -> AbstractContextManager[None]:
        """All or nothing, and nobody else writes meanwhile.

        Args:
            connection: One that was made for it.
            waits: For others to be done; otherwise raises `BlockingIOError` while somebody else writes.
        """
        ...

    def set_up(self, connection: Connection, make: Callable[[], None]) -> None:
        """Makes tables, or changes them, in one `transaction`, without having others wait for long.

        Args:
            connection: One that was made for transactions.
            make: Does it; may be called again where nothing came of it.

        Raises:
            ConfigurationError: Others use the tables all the time.
        """
        ...

    def news(self) -> object:
        """Differs from before where a transaction was announced; None: nobody can tell. Takes a microsecond."""
        ...

    def tidy(self) -> None:
        """Does what transactions that may not wait leave undone. Takes its time: call it in a thread of its own."""
        ...

    def claim(self, name: str) -> Claim | None:
        """Takes a name; None while another process holds it."""
        ...

    def inherit(self, name: str) -> Claim | None:
        """`claim` of a name whose holder must be dead; None as long as he may live.

        Also makes sure that the database still knows what this process holds: call it every second or so.
        """
        ...

    def close(self) -> None:
        """Frees what is not a connection."""
        ...
