"""Versions of the store's tables: what an empty database gets, and what changes those of an older Tokenmill."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tokenmill.errors import ConfigurationError

if TYPE_CHECKING:
    from tokenmill.engine.gateway.database import Connection

#: What made each version of the tables from the one before; both databases take the statements.
CHANGES: Mapping[int, Sequence[str]] = {
    2: ("ALTER TABLE ledger ADD COLUMN kind TEXT NOT NULL DEFAULT 'answer'",),
    3: (
        "ALTER TABLE ledger ADD COLUMN accepted_draft_tokens BIGINT NOT NULL DEFAULT 0",
        "ALTER TABLE ledger ADD COLUMN rejected_draft_tokens BIGINT NOT NULL DEFAULT 0",
    ),
    4: ("ALTER TABLE audit_head ADD COLUMN decisions BIGINT NOT NULL DEFAULT 0",),
    5: (
        "ALTER TABLE accounts ADD COLUMN requests_at_once BIGINT CHECK (requests_at_once >= 0)",
        "ALTER TABLE accounts ADD COLUMN under_way BIGINT NOT NULL DEFAULT 0",
    ),
    6: (
        "CREATE TABLE responses (id TEXT PRIMARY KEY, number BIGINT NOT NULL, owner TEXT NOT NULL, "
        "backend TEXT NOT NULL, server TEXT NOT NULL, at BIGINT NOT NULL)",
        "CREATE INDEX responses_by_number ON responses (number)",
    ),
}
#: Version of the tables; a database made by a newer Tokenmill is refused, one by an older is changed.
SCHEMA_VERSION = max(CHANGES)


def make_tables(connection: "Connection", schema: Sequence[str], shown: str) -> None:
    """Makes the tables in an empty database, or changes those of an older Tokenmill. Call it in a transaction.

    Args:
        connection: The writer's.
        schema: Statements that make the tables as they are now.
        shown: The database's place, for messages.

    Raises:
        ConfigurationError: The tables were made by a newer Tokenmill, or by another program.
    """
    # Not `IF NOT EXISTS`: a server asks for the right to make tables also where there is nothing to be made.
    if not connection.has("schema_version"):
        connection.make("CREATE TABLE schema_version (version INTEGER NOT NULL)")
    row = connection.execute("SELECT version FROM schema_version").fetchone()
    if row is None:
        for statement in schema:
            connection.make(statement)
        connection.execute("INSERT INTO schema_version (version) VALUES (?)", (SCHEMA_VERSION,))
    elif not isinstance(row[0], int):
        raise ConfigurationError(
            f"{shown} has tables of another program; name a database of a gateway, or an empty one"
        )
    elif row[0] > SCHEMA_VERSION:
        raise ConfigurationError(
            f"{shown} has schema version {row[0]}, this Tokenmill knows {SCHEMA_VERSION}; upgrade Tokenmill"
        )
    elif row[0] < SCHEMA_VERSION:
        for version in range(row[0] + 1, SCHEMA_VERSION + 1):
            for statement in CHANGES[version]:
                connection.execute(statement)
        connection.execute("UPDATE schema_version SET version = ?", (SCHEMA_VERSION,))
