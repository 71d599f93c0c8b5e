"""Changes to keys that exist: new secrets, other models, another end."""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from tokenmill.engine.gateway.database import Connection, now_ms
from tokenmill.engine.gateway.governance import accounts, audit, keys
from tokenmill.engine.gateway.governance.keys import Key
from tokenmill.engine.gateway.governance.options import digest
from tokenmill.errors import InputError


def rotate(connection: Connection, key: str, actor: str) -> str:
    """Gives a key a new secret and returns it; the old one is refused as soon as a worker looks for changes.

    Its id, budget and books stay: rotating is no way to begin a budget anew.

    Raises:
        InputError: There is no such key, or it is not valid any more.
    """
    found = keys.by_id(connection, key)
    refusal = found.refusal(now_ms())
    if refusal is not None:
        raise InputError(f"the key {key[:80]!r} {refusal}; make a new one")
    secret = keys.PREFIX + secrets.token_urlsafe(32)
    connection.execute("UPDATE keys SET hash = ? WHERE id = ?", (digest(secret), key))
    audit.append(connection, actor, "key.rotate", key, {})
    return secret


def change(
    connection: Connection,
    key: str,
    actor: str,
    *,
    name: str,
    models: Sequence[str] | None,
    metadata: Mapping[str, Any],
    expires_at: int | None,
) -> None:
    """Replaces what is kept with a key, all but its secret and its limits.

    Raises:
        InputError: There is no such key.
    """
    before = keys.by_id(connection, key)
    connection.execute("UPDATE accounts SET name = ? WHERE id = ?", (name, key))
    connection.execute(
        "UPDATE keys SET models = ?, metadata = ?, expires_at = ? WHERE id = ?",
        (
            None if models is None else orjson.dumps(list(models)).decode(),
            orjson.dumps(dict(metadata)).decode(),
            expires_at,
            key,
        ),
    )
    details = {"before": _state(before), "after": _state(keys.by_id(connection, key))}
    audit.append(connection, actor, "key.change", key, details)


def named(connection: Connection, said: str) -> Key:
    """The key that somebody means: by its id, its secret or its secret's hash.

    Raises:
        InputError: There is none.
    """
    found = keys.by_hash(connection, digest(said)) or keys.by_hash(connection, said)
    return found if found is not None else keys.by_id(connection, said)


def aliased(connection: Connection, alias: str) -> list[str]:
    """Ids of the keys with this name that were not revoked; an empty name is none."""
    query = (
        "SELECT id FROM accounts JOIN keys USING (id) WHERE name = ? AND name <> '' AND revoked_at IS NULL "
        "ORDER BY created_at"
    )
    return [row[0] for row in connection.execute(query, (alias,))]


def secret_hash(connection: Connection, key: str) -> str:
    """The hash under which a key's secret is kept; LiteLLM calls it the token."""
    row = connection.execute("SELECT hash FROM keys WHERE id = ?", (key,)).fetchone()
    return str(row[0]) if row is not None else ""


def parent_team(connection: Connection, key: str) -> str | None:
    """The team above a key."""
    chain = accounts.chain(connection, key)
    return next((account.id for account in chain if account.kind == "team"), None)


def _state(key: Key) -> dict[str, Any]:
    return {"models": key.models, "metadata": dict(key.metadata), "expires_at": key.expires_at}
