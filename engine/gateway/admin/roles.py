"""Who may administrate: the master key, and keys that were given a role."""

from dataclasses import dataclass
from typing import Literal, get_args

from tokenmill.engine.gateway.database import Connection, now_ms
from tokenmill.engine.gateway.governance import accounts, audit, keys
from tokenmill.engine.gateway.governance.accounts import MASTER
from tokenmill.engine.gateway.governance.guesses import Guesses
from tokenmill.engine.gateway.governance.options import digest
from tokenmill.errors import InputError

#: `admin` may do everything; `auditor` may look at everything; `team-admin` may make, list and revoke keys and see the
#: ledger below the account that his key belongs to (`scope`).
Role = Literal["admin", "auditor", "team-admin"]
TEAM_ADMIN: Role = "team-admin"
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class Actor:
    """Who administrates.

    Attributes:
        name: For the audit trail: `master` or the key's id.
        role: What he may do; None: only ask about his own key.
        scope: The account that he may not leave; None: he may see all that his role shows.
    """

    name: str
    role: Role | None
    scope: str | None = None

    def may(self, needed: Role) -> bool:
        """Whether this role is enough."""
        return self.role in ("admin", needed)


def identify(connection: Connection, guesses: Guesses, key: str) -> Actor | None:
    """Whose key this is; None for a key that is unknown, revoked or expired.

    Raises:
        ApiError: 429 after too many keys that nobody has.
    """
    hashed = digest(key)
    if guesses.is_master(hashed):
        return Actor(MASTER, "admin")
    found = keys.by_hash(connection, hashed)
    if found is None:
        too_many = guesses.refused()
        if too_many is not None:
            raise too_many
        return None
    if found.refusal(now_ms()) is not None:
        return None
    return actor_of(connection, found.id)


def actor_of(connection: Connection, key: str) -> Actor:
    """Whoever holds a key that is valid."""
    role = role_of(connection, key)
    if role != TEAM_ADMIN:
        return Actor(key, role)
    above = accounts.find(connection, key).parent
    return Actor(key, None) if above is None else Actor(key, role, above)


def role_of(connection: Connection, key: str) -> Role | None:
    """A key's role."""
    row = connection.execute("SELECT role FROM roles WHERE key_id = ?", (key,)).fetchone()
    return next((role for role in ROLES if row is not None and role == row[0]), None)


def give(connection: Connection, key: str, role: Role | None, actor: str) -> None:
    """Gives a key a role, or takes it.

    Raises:
        InputError: There is no such key, or it belongs to no account that a `team-admin` could look after.
    """
    keys.by_id(connection, key)
    if role == TEAM_ADMIN and accounts.find(connection, key).parent is None:
        raise InputError(
            f"the key {key[:80]!r} belongs to no team; make one below the account that it is to look after"
        )
    before = role_of(connection, key)
    connection.execute("DELETE FROM roles WHERE key_id = ?", (key,))
    if role is not None:
        connection.execute("INSERT INTO roles (key_id, role) VALUES (?, ?)", (key, role))
    audit.append(connection, actor, "role.set", key, {"before": before, "after": role})
