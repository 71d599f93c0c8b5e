"""API keys: random, kept as a hash only, shown once, scoped to models, expiring, revocable.

A key is 256 random bits, so a plain SHA-256 is enough to keep it; a slow password hash would only make every request,
and every flood of wrong keys, expensive.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from tokenmill.engine.gateway.database import Connection, now_ms
from tokenmill.engine.gateway.governance import accounts, audit
from tokenmill.engine.gateway.governance.accounts import Limits
from tokenmill.engine.gateway.governance.options import digest
from tokenmill.errors import InputError

PREFIX = "sk-"


@dataclass(frozen=True)
class Key:
    """One key as it is kept.

    Attributes:
        id: Its public id, `key-...`; also its account's.
        models: Model and tier names it may ask for; None: all.
        metadata: Whatever its maker attached.
        expires_at, revoked_at: Milliseconds; None: never, not.
    """

    id: str
    models: tuple[str, ...] | None
    metadata: Mapping[str, Any]
    expires_at: int | None
    revoked_at: int | None

    def refusal(self, now: int) -> str | None:
        """Why it is not accepted at `now`; None when it is."""
        if self.revoked_at is not None:
            return "was revoked"
        if self.expires_at is not None and now >= self.expires_at:
            return "has expired"
        return None


def create(
    connection: Connection,
    actor: str,
    *,
    name: str = "",
    parent: str | None = None,
    models: Sequence[str] | None = None,
    limits: Limits | None = None,
    lifetime_ms: int | None = None,
    expires_at: int | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> tuple[str, str]:
    """Makes a key; returns (its id, the key itself, which is kept nowhere).

    Args:
        connection: The writer's.
        actor: For the audit trail.
        name: For people.
        parent: The app, team or organisation it belongs to.
        models: What it may ask for; None: everything.
        limits: Its own budget and rates.
        lifetime_ms: How long it is valid; None: until `expires_at`.
        expires_at: When it ends, in milliseconds; None: when it is revoked.
        metadata: Kept with it.

    Raises:
        InputError: The parent does not exist or cannot own keys, the lifetime is not above 0, or a model has no name.
    """
    if models is not None and "" in models:
        raise InputError("a model's name is empty; name a model or a tier, or none for all")
    if lifetime_ms is not None and lifetime_ms <= 0:
        raise InputError(f"a lifetime of {lifetime_ms} ms is over at once; give one above 0, or none")
    account = accounts.create(connection, "key", name, parent, limits or Limits(), actor)
    key = PREFIX + secrets.token_urlsafe(32)
    connection.execute(
        "INSERT INTO keys (id, hash, models, metadata, expires_at) VALUES (?, ?, ?, ?, ?)",
        (
            account,
            digest(key),
            None if models is None else orjson.dumps(list(models)).decode(),
            orjson.dumps(dict(metadata or {})).decode(),
            expires_at if lifetime_ms is None else now_ms() + lifetime_ms,
        ),
    )
    return account, key


_COLUMNS = "id, models, metadata, expires_at, revoked_at"


def _key(row: Sequence[Any]) -> Key:
    models = None if row[1] is None else tuple(orjson.loads(row[1]))
    return Key(row[0], models, orjson.loads(row[2]), row[3], row[4])


def by_hash(connection: Connection, hashed: str) -> Key | None:
    """The key with this hash, valid or not."""
    row = connection.execute(f"SELECT {_COLUMNS} FROM keys WHERE hash = ?", (hashed,)).fetchone()  # noqa: S608
    return None if row is None else _key(row)


def by_id(connection: Connection, key: str) -> Key:
    """The key with this public id.

    Raises:
        InputError: There is none.
    """
    row = connection.execute(f"SELECT {_COLUMNS} FROM keys WHERE id = ?", (key,)).fetchone()  # noqa: S608
    if row is None:
        raise InputError(missing(key))
    return _key(row)


def missing(key: str) -> str:
    """What is said about a key that does not exist."""
    return f"there is no key {key[:80]!r}; `tokenmill admin key list` shows those there are"


def every(connection: Connection) -> list[Key]:
    """All keys, the oldest first."""
    query = f"SELECT {', '.join('keys.' + name for name in _COLUMNS.split(', '))} FROM keys "  # noqa: S608
    return [_key(row) for row in connection.execute(query + "JOIN accounts USING (id) ORDER BY created_at, keys.id")]


def revoke(connection: Connection, key: str, actor: str) -> None:
    """Makes a key invalid for good, from the next request on, in every process. Revoking twice changes nothing.

    Raises:
        InputError: There is no such key.
    """
    if by_id(connection, key).revoked_at is None:
        connection.execute("UPDATE keys SET revoked_at = ? WHERE id = ?", (now_ms(), key))
        audit.append(connection, actor, "key.revoke", key, {})
