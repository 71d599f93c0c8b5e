"""The audit trail: rows that are only ever appended, each hash covering its row and the hash before it.

An edited, removed, inserted or exchanged row breaks the chain from there on; rows cut off the end are missed because
the last hash is kept beside the trail. Whoever can rewrite the whole file can rewrite the whole chain: keep the head
that `tokenmill admin audit verify` prints in another place, and hand it to a later check.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import orjson

from tokenmill.engine.gateway.store import Connection, now_ms
from tokenmill.errors import CheckpointError

#: What stands before the first row.
ORIGIN = hashlib.sha256(b"tokenmill audit 1").hexdigest()


@dataclass(frozen=True)
class Head:
    """The end of the trail: the number of its last row (0 when empty) and that row's hash."""

    sequence: int
    hash: str


def append(connection: Connection, actor: str, action: str, subject: str, details: dict[str, Any]) -> None:
    """Adds a row in the transaction of what it records.

    Args:
        connection: The writer's.
        actor: Who did it: `admin api`, `admin command`, `gateway`.
        action: What, e.g. `key.create`.
        subject: To which account or worker.
        details: Anything else; no secrets.
    """
    connection.announce()
    head = _head(connection)
    row = (head.sequence + 1, now_ms(), actor, action, subject, orjson.dumps(details).decode())
    digest = _digest(head.hash, row)
    connection.execute(
        "INSERT INTO audit (sequence, at, actor, action, subject, details, hash) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (*row, digest),
    )
    connection.execute(
        "INSERT INTO audit_head (id, sequence, hash) VALUES (1, ?, ?) "
        "ON CONFLICT (id) DO UPDATE SET sequence = excluded.sequence, hash = excluded.hash",
        (row[0], digest),
    )


def verify(connection: Connection, expected: str | None = None) -> Head:
    """Checks the whole trail and returns its head.

    Args:
        connection: Any.
        expected: A head's hash that was noted earlier and must be part of the trail.

    Raises:
        CheckpointError: The trail was changed; says at which row.
    """
    previous, count = ORIGIN, 0
    seen = expected is None or expected == ORIGIN
    query = "SELECT sequence, at, actor, action, subject, details, hash FROM audit ORDER BY sequence"
    for row in connection.execute(query):
        count += 1
        if row[0] != count:
            raise CheckpointError(f"audit trail: row {count} is missing; restore the file from a backup")
        if _digest(previous, row[:6]) != row[6]:
            raise CheckpointError(f"audit trail: row {count} was changed, or the one before it; restore from a backup")
        previous = row[6]
        seen = seen or previous == expected
    head = _head(connection)
    if (head.sequence, head.hash) != (count, previous):
        raise CheckpointError(
            f"audit trail: it ends at row {count}, its head says {head.sequence}; restore the file from a backup"
        )
    if not seen:
        raise CheckpointError(f"audit trail: no row has the noted hash {expected}; restore the file from a backup")
    return head


def sequence(connection: Connection) -> int:
    """Number of the last row; it grows with every change that is audited."""
    row = connection.execute("SELECT sequence FROM audit_head").fetchone()
    return 0 if row is None else int(row[0])


def _head(connection: Connection) -> Head:
    row = connection.execute("SELECT sequence, hash FROM audit_head").fetchone()
    return Head(*row) if row is not None else Head(0, ORIGIN)


def _digest(previous: str, row: tuple[Any, ...]) -> str:
    return hashlib.sha256(orjson.dumps([previous, *row])).hexdigest()
