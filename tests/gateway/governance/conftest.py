"""A store of each kind, empty: an SQLite file, and a database of a real PostgreSQL server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway.governance.postgres_server import PostgresServer, programs
from tokenmill.engine.gateway.governance.schema import SCHEMA
from tokenmill.engine.gateway.store import Store

KINDS = ("sqlite", "postgres")


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One server for all tests."""
    if programs() is None:
        pytest.skip("PostgreSQL is not installed (initdb is neither on PATH nor under /usr/lib/postgresql)")
    pytest.importorskip("psycopg")
    with PostgresServer() as server:
        yield server


def new_place(kind: str, folder: Path, request: pytest.FixtureRequest) -> str:
    """Where a new, empty store of a kind can be made."""
    if kind == "sqlite":
        return str(folder / "governance" / "gateway.db")
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.new_database()


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """An open store of each kind."""
    opened = Store(new_place(request.param, tmp_path, request), SCHEMA)
    yield opened
    opened.close()
