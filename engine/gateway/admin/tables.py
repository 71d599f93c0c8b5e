"""Tables beside those of governance: who may administrate, what was changed without a restart, hourly sums."""

import secrets

from tokenmill.engine.gateway.store import Connection, Store

#: What a key may do at `/admin`; a key without a row may only ask models.
ROLES = "CREATE TABLE IF NOT EXISTS roles (key_id TEXT PRIMARY KEY, role TEXT NOT NULL)"
#: Shares of canaries that differ from the configuration; NULL: a backend like the others.
CANARIES = "CREATE TABLE IF NOT EXISTS canaries (backend TEXT PRIMARY KEY, share DOUBLE PRECISION)"
#: Sums of the ledger by the hour (since 1970); see `rollup`.
LEDGER_HOURS = """
CREATE TABLE IF NOT EXISTS ledger_hours (
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
)"""
#: The first hour that is not summed.
LEDGER_SUMMED = "CREATE TABLE IF NOT EXISTS ledger_summed (until_hour BIGINT NOT NULL)"

#: Sessions of the dashboard that were ended before their time, by the end of their cookie, until when in milliseconds.
ENDED_SESSIONS = "CREATE TABLE IF NOT EXISTS ended_sessions (mac TEXT PRIMARY KEY, until BIGINT NOT NULL)"

#: A random text that sessions are signed with, beside the master key: that alone may be guessed.
SESSION_SIGNING = (
    "CREATE TABLE IF NOT EXISTS session_secret (id INTEGER PRIMARY KEY CHECK (id = 1), secret TEXT NOT NULL)"
)


def make(connection: Connection) -> None:
    """Makes the tables where they are missing."""
    for statement in (ROLES, CANARIES, LEDGER_HOURS, LEDGER_SUMMED, ENDED_SESSIONS, SESSION_SIGNING):
        connection.execute(statement)
    query = "INSERT INTO session_secret (id, secret) VALUES (1, ?) ON CONFLICT (id) DO NOTHING"
    connection.execute(query, (secrets.token_hex(32),))


def prepare(store: Store) -> None:
    """`make` for a program that may wait."""
    store.write_now(make)
