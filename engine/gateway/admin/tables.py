"""Tables beside those of governance: who may administrate, what was changed without a restart, hourly sums."""

import secrets

from tokenmill.engine.gateway.database import Connection
from tokenmill.engine.gateway.store import Store

TABLES = {
    # What a key may do at `/admin`; a key without a row may only ask models.
    "roles": "CREATE TABLE roles (key_id TEXT PRIMARY KEY, role TEXT NOT NULL)",
    # Shares of canaries that differ from the configuration; NULL: a backend like the others.
    "canaries": "CREATE TABLE canaries (backend TEXT PRIMARY KEY, share DOUBLE PRECISION)",
    # Sums of the ledger by the hour (since 1970); see `rollup`.
    "ledger_hours": """
CREATE TABLE ledger_hours (
    hour BIGINT NOT NULL,
    organisation TEXT NOT NULL,
    team TEXT NOT NULL,
    app TEXT NOT NULL,
    tier TEXT NOT NULL,
    requests BIGINT NOT NULL,
    prompt_tokens BIGINT NOT NULL,
    cached_tokens BIGINT NOT NULL,
    completion_tokens BIGINT NOT NULL,
    cost BIGINT NOT NULL,
    PRIMARY KEY (hour, organisation, team, app, tier)
)""",
    # The first hour that is not summed.
    "ledger_summed": "CREATE TABLE ledger_summed (until_hour BIGINT NOT NULL)",
    # Sessions of the dashboard that were ended before their time, by the end of their cookie, until when in
    # milliseconds.
    "ended_sessions": "CREATE TABLE ended_sessions (mac TEXT PRIMARY KEY, until BIGINT NOT NULL)",
    # A random text that sessions are signed with, beside the master key: that alone may be guessed.
    "session_secret": "CREATE TABLE session_secret (id INTEGER PRIMARY KEY CHECK (id = 1), secret TEXT NOT NULL)",
}


def make(connection: Connection) -> None:
    """Makes the tables where they are missing."""
    for name, statement in TABLES.items():
        if not connection.has(name):
            connection.make(statement)
    query = "INSERT INTO session_secret (id, secret) VALUES (1, ?) ON CONFLICT (id) DO NOTHING"
    connection.execute(query, (secrets.token_hex(32),))


def prepare(store: Store) -> None:
    """`make` for a program that may wait."""
    store.write_now(make)
