"""Tables beside those of governance: who may administrate, and what was changed without a restart."""

from tokenmill.engine.gateway.store import Connection, Store

#: What a key may do at `/admin`; a key without a row may only ask models.
ROLES = "CREATE TABLE IF NOT EXISTS roles (key_id TEXT PRIMARY KEY, role TEXT NOT NULL)"
#: Shares of canaries that differ from the configuration; NULL: a backend like the others.
CANARIES = "CREATE TABLE IF NOT EXISTS canaries (backend TEXT PRIMARY KEY, share DOUBLE PRECISION)"


def make(connection: Connection) -> None:
    """Makes the tables where they are missing."""
    for statement in (ROLES, CANARIES):
        connection.execute(statement)


def prepare(store: Store) -> None:
    """`make` for a program that may wait."""
    store.write_now(make)
