"""Which backend keeps a response, and whose it is, in a store that several machines share.

What one machine remembers (`kept`) no other knows, nor it itself after a start. So every response is entered here, too,
behind its answer; who asks another machine for it before that is done is made to wait for a moment. An id is entered as
a hash: whoever reads the store can ask for nothing.
"""

import asyncio
import functools
import hashlib
import ipaddress
import platform
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from tokenmill.engine.gateway.database import Connection, StoreUnavailableError, now_ms, placeholders

if TYPE_CHECKING:
    from tokenmill.engine.gateway.governance.service import Governance
    from tokenmill.engine.gateway.portfolio import Target

#: Responses that are entered, but for those since the last look, and for how long at most: as long as OpenAI keeps one.
MOST, LONGEST_MS = 1_000_000, 30 * 86_400_000
#: Entries between two looks for those that are to leave, and most that leave then.
LOOK_EVERY, LEAVE_AT_ONCE = 500, 2_000
#: Seconds after which one looks again for a response that is not there: its entry may be on its way.
AGAIN_S = (0.05, 0.2, 0.5)


class Entry(NamedTuple):
    """One response.

    Attributes:
        owner: Whose it is: an account.
        backend: Name of the backend that keeps it.
        server: Which server that is: `server_of`.
    """

    owner: str
    backend: str
    server: str

    def among(self, targets: Iterable["Target"]) -> "Target | None":
        """The backend that keeps it, by its address, which another machine may call by another name; else by its name,
        as where the address is one of the machine's own. None: it is none of these.
        """
        targets = list(targets)
        same = [one for one in targets if server_of(one.backend.root) == self.server]
        named = [one for one in same or targets if one.backend.name == self.backend]
        return next(iter(named or same), None)


class Register:
    """The entries, for one process.

    Args:
        governance: Has the store.
    """

    def __init__(self, governance: "Governance") -> None:
        self._governance = governance

    def enter(self, name: str, owner: str, target: "Target") -> None:
        """Has a response entered, soon, or when the store is there again."""
        entry = Entry(owner, target.backend.name, server_of(target.backend.root))
        self._governance.store.post_item(write, (_hashed(name), entry, now_ms()), beside=True)

    async def find(self, name: str, owner: str | None) -> Entry | None:
        """A response's entry; None: there is none, or it is another's, which takes as long.

        Args:
            name: Its id.
            owner: Whose it must be; None: anybody's.

        Raises:
            ApiError: 503 while the store cannot be asked.
        """
        for pause_s in (0.0, *AGAIN_S):
            await asyncio.sleep(pause_s)
            try:
                found: Entry | None = await self._governance.store.write_item(read, _hashed(name))
            except StoreUnavailableError as error:
                raise self._governance.unreadable(error) from error
            if found is not None and owner in (None, found.owner):
                return found
        return None


def write(connection: Connection, items: Sequence[tuple[str, Entry, int]]) -> list[None]:
    """Enters responses: (hash of the id, entry, since when in milliseconds); for `Store.post_item`."""
    (newest,) = connection.execute("SELECT coalesce(max(number), 0) FROM responses").fetchone()
    rows = [(name, newest + place, *entry, at) for place, (name, entry, at) in enumerate(items, 1)]
    connection.executemany(
        "INSERT INTO responses (id, number, owner, backend, server, at) VALUES (?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (id) DO UPDATE SET number = excluded.number, owner = excluded.owner, "
        "backend = excluded.backend, server = excluded.server, at = excluded.at",
        rows,
    )
    if newest // LOOK_EVERY != (newest + len(rows)) // LOOK_EVERY:
        _leave(connection, newest + len(rows))
    return [None] * len(rows)


def read(connection: Connection, names: Sequence[str]) -> list[Entry | None]:
    """Entries of responses by the hashes of their ids; the collector for `Store.write_item`."""
    # One statement: all machines' writers wait for this transaction.
    query = f"SELECT id, owner, backend, server FROM responses WHERE id IN {placeholders(len(names))} AND at > ?"  # noqa: S608
    found = {row[0]: Entry(*row[1:]) for row in connection.execute(query, (*names, now_ms() - LONGEST_MS))}
    return [found.get(name) for name in names]


def try_out(connection: Connection) -> None:
    """Fails where this user of the database may not do all of this: rights to older tables do not hold for a new one.

    Otherwise each response would tell the log so, and break up the transaction that it is entered in.
    """
    write(connection, [("", Entry("", "", ""), 0)])
    connection.execute("DELETE FROM responses WHERE id = ?", ("",))


def _leave(connection: Connection, newest: int) -> None:
    """The oldest leave, where they are too many or too old."""
    oldest = connection.execute("SELECT number, at FROM responses ORDER BY number LIMIT ?", (LEAVE_AT_ONCE,)).fetchall()
    before = now_ms() - LONGEST_MS
    gone = [number for number, at in oldest if number <= newest - MOST or at <= before]
    if gone:
        connection.execute("DELETE FROM responses WHERE number <= ?", (gone[-1],))


@functools.lru_cache(maxsize=4096)
def server_of(address: str) -> str:
    """Tells a server from others on all machines, by its address: this machine's own are no other machine's."""
    host = urlsplit(address).hostname or ""
    whose = platform.node() if _is_own(host) else ""
    return hashlib.blake2b(f"{address} {whose}".encode(), digest_size=8).hexdigest()


def _is_own(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _hashed(name: str) -> str:
    return hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=16).hexdigest()
