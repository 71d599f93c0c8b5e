"""The audit trail: rows that are only ever appended, each hash covering its row and the hash before it.

An edited, removed, inserted or exchanged row breaks the chain from there on; rows cut off the end are missed because
the last hash is kept beside the trail. Whoever can rewrite the whole file can rewrite the whole chain: keep the head
that `tokenmill admin audit verify` prints in another place, and hand it to a later check.

A change is written in the transaction that makes it (`append`). What policies decide, which may be a row for every
request, changes nothing and is written a moment later (`extend`).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from tokenmill.engine.gateway.database import Connection, now_ms
from tokenmill.errors import CheckpointError

#: What stands before the first row.
ORIGIN = hashlib.sha256(b"tokenmill audit 1").hexdigest()
#: Rows that are read at once when the trail is checked: a long one needs no more memory.
_READ_AT_ONCE = 1000
_BEFORE_ALL = -(2**63)


@dataclass(frozen=True)
class Head:
    """The end of the trail: the number of its last row (0 when empty) and that row's hash."""

    sequence: int
    hash: str


@dataclass(eq=False, slots=True)
class Entry:
    """A row that is to be appended.

    Attributes:
        actor: Who did it: `admin api`, `admin command`, `gateway`.
        action: What, e.g. `key.create`.
        subject: To which account, worker or request.
        details: Anything else; no secrets.
        at: When, in milliseconds.
        tried: The row's number and hash when it was last tried to append it.
    """

    actor: str
    action: str
    subject: str
    details: dict[str, Any]
    at: int = field(default_factory=now_ms)
    tried: tuple[int, str] | None = None


def append(connection: Connection, actor: str, action: str, subject: str, details: dict[str, Any]) -> None:
    """Adds a row in the transaction of what it records, a change; see `Entry` for the arguments."""
    connection.announce()
    _append(connection, [Entry(actor, action, subject, details)])


def extend(connection: Connection, decisions: Sequence[Entry]) -> list[None]:
    """Adds rows that record no change, in this order; the collector for `Store.post_item`.

    Each becomes one row however often it is tried: one whose row is there is left out.
    """
    new = [entry for entry in decisions if entry.tried is None or not _is_there(connection, entry.tried)]
    if new:
        with connection.beside():
            _append(connection, new, decisions=len(new))
    return [None] * len(decisions)


def _append(connection: Connection, entries: Sequence[Entry], decisions: int = 0) -> None:
    """Adds rows; so many of them are decisions."""
    head = _head(connection)
    number, digest = head.sequence, head.hash
    rows = []
    for entry in entries:
        number += 1
        details = orjson.dumps(entry.details).decode()
        row = (number, entry.at, entry.actor, entry.action, entry.subject, details)
        digest = _digest(digest, row)
        rows.append((*row, digest))
        entry.tried = number, digest
    connection.executemany(
        "INSERT INTO audit (sequence, at, actor, action, subject, details, hash) VALUES (?, ?, ?, ?, ?, ?, ?)", rows
    )
    connection.execute(
        "INSERT INTO audit_head (id, sequence, hash, decisions) VALUES (1, ?, ?, ?) "
        "ON CONFLICT (id) DO UPDATE SET sequence = excluded.sequence, hash = excluded.hash, "
        "decisions = audit_head.decisions + excluded.decisions",
        (number, digest, decisions),
    )


def _is_there(connection: Connection, tried: tuple[int, str]) -> bool:
    """Whether this row was appended: its hash covers it and all rows before it."""
    query = "SELECT 1 FROM audit WHERE sequence = ? AND hash = ?"
    return connection.execute(query, tried).fetchone() is not None


def verify(connection: Connection, expected: str | None = None) -> Head:
    """Checks the whole trail and returns its head; rows may be appended meanwhile.

    Args:
        connection: Any.
        expected: A head's hash that was noted earlier and must be part of the trail.

    Raises:
        CheckpointError: The trail was changed; says at which row.
    """
    previous, count, last = ORIGIN, 0, _BEFORE_ALL
    seen = expected is None or expected == ORIGIN
    query = (
        "SELECT sequence, at, actor, action, subject, details, hash FROM audit WHERE sequence > ? "
        "ORDER BY sequence LIMIT ?"
    )
    while True:
        # The head first: what others append meanwhile is then read, too, and where nothing follows, it is the end.
        head = _head(connection)
        rows = connection.execute(query, (last, _READ_AT_ONCE)).fetchall()
        if not rows:
            break
        for row in rows:
            count += 1
            if row[0] != count:
                raise CheckpointError(f"audit trail: row {count} is missing; restore the file from a backup")
            if _digest(previous, row[:6]) != row[6]:
                raise CheckpointError(
                    f"audit trail: row {count} was changed, or the one before it; restore from a backup"
                )
            previous, last = row[6], row[0]
            seen = seen or previous == expected
    if (head.sequence, head.hash) != (count, previous):
        raise CheckpointError(
            f"audit trail: it ends at row {count}, its head says {head.sequence}; restore the file from a backup"
        )
    if not seen:
        raise CheckpointError(f"audit trail: no row has the noted hash {expected}; restore the file from a backup")
    return head


def changes(connection: Connection) -> int:
    """How many rows are no decisions of policies; it grows with every change that is audited."""
    row = connection.execute("SELECT sequence - decisions FROM audit_head").fetchone()
    return 0 if row is None else int(row[0])


def _head(connection: Connection) -> Head:
    row = connection.execute("SELECT sequence, hash FROM audit_head").fetchone()
    return Head(*row) if row is not None else Head(0, ORIGIN)


def _digest(previous: str, row: tuple[Any, ...]) -> str:
    # Nothing but an edited row holds what JSON does not have.
    return hashlib.sha256(orjson.dumps([previous, *row], default=repr)).hexdigest()
