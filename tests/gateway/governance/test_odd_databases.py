"""A PostgreSQL server that others set up or use otherwise: it works, or is refused in one line."""

import asyncio
import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.gateway.governance.postgres_server import PostgresServer
from tests.gateway.running import wait_until
from tokenmill.engine.gateway import store as store_module
from tokenmill.engine.gateway.admin import tables
from tokenmill.engine.gateway.database import Connection, StoreUnavailableError
from tokenmill.engine.gateway.governance import accounts, audit
from tokenmill.engine.gateway.governance.accounts import Limits
from tokenmill.engine.gateway.governance.schema import SCHEMA
from tokenmill.engine.gateway.store import Store
from tokenmill.engine.gateway.store_schema import SCHEMA_VERSION
from tokenmill.errors import ConfigurationError

psycopg = pytest.importorskip("psycopg")
postgres_module = pytest.importorskip("tokenmill.engine.gateway.postgres")


@pytest.fixture
def url(postgres: PostgresServer) -> str:
    """An empty database's."""
    return postgres.new_database()


@pytest.fixture
def root(url: str) -> Iterator[Any]:
    """A connection of its owner."""
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


def make_team(connection: Connection, name: str = "T") -> str:
    return accounts.create(connection, "team", name, None, Limits(), "test")


@pytest.mark.parametrize("default", ["repeatable read", "serializable"])
def test_a_stricter_isolation_hides_nothing_from_who_waited(url: str, root: Any, default: str) -> None:
    """A transaction that waited for its turn sees what the one before has written."""
    root.execute(f"ALTER DATABASE {root.info.dbname} SET default_transaction_isolation = '{default}'")
    first, second = Store(url, SCHEMA), Store(url, SCHEMA)
    begun, may_end = threading.Event(), threading.Event()

    def hold(connection: Connection) -> str:
        begun.set()
        assert may_end.wait(30)
        return make_team(connection)

    holding = first.submit(hold)
    assert begun.wait(30)
    waiting = second.submit(make_team)
    query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    wait_until(lambda: root.execute(query).fetchone() == (1,))
    may_end.set()
    assert holding.result(30) != waiting.result(30)
    assert audit.verify(first.reader).sequence == 2
    first.close()
    second.close()


def test_who_stops_within_a_transaction_does_not_stop_the_others(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that was suspended, or cut off, while it had its turn among the writers."""
    with monkeypatch.context() as shortly:
        shortly.setattr(postgres_module, "STOPPED_AFTER_S", 1.0)
        stopped = Store(url, SCHEMA)
    other = Store(url, SCHEMA)
    begun, goes_on = threading.Event(), threading.Event()

    def stop(connection: Connection) -> str:
        make_team(connection)
        begun.set()
        assert goes_on.wait(60)
        return make_team(connection)

    stopping = stopped.submit(stop)
    assert begun.wait(30)
    made = other.submit(make_team).result(30)
    goes_on.set()
    with pytest.raises(StoreUnavailableError, match="idle-in-transaction timeout") as raised:
        stopping.result(30)
    assert not raised.value.perhaps_done
    # Nothing of it was written, and it is served again.
    assert [team.id for team in accounts.every(other.reader)] == [made]
    assert stopped.write_now(make_team) != made
    stopped.close()
    other.close()


def test_a_server_that_became_read_only_is_left_for_the_one_in_its_place(url: str) -> None:
    """As the first of two does after a failover, without ending its connections."""

    def make(connection: Connection, names: Sequence[str]) -> Sequence[str]:
        return [make_team(connection, name) for name in names]

    def demote() -> None:
        assert isinstance(store._writer, postgres_module.PostgresConnection)
        store._writer.raw.execute("SET default_transaction_read_only = on")

    store = Store(url, SCHEMA)
    demote()
    with pytest.raises(StoreUnavailableError, match="read-only"):
        store.write_now(make_team)
    store.write_now(make_team)
    demote()
    store.post_item(make, "later")
    wait_until(lambda: "later" in [team.name for team in accounts.every(store.reader)])
    store.close()


def test_who_waits_for_a_table_that_another_keeps_is_told_so(
    url: str, root: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while an administrator rewrites it: nobody waits for good, and what was not begun by then is not done."""
    monkeypatch.setattr(store_module, "ANSWER_WAIT_S", 0.5)
    store = Store(url, SCHEMA)

    async def make_both() -> list[object]:
        begun = store.write(lambda connection: make_team(connection, "begun"))
        first = asyncio.ensure_future(begun)
        await asyncio.to_thread(wait_until, lambda: root.execute(waits).fetchone() == (1,))
        return await asyncio.gather(first, store.write(make_team), return_exceptions=True)

    waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'relation' AND NOT granted"
    with psycopg.connect(url) as keeper:
        keeper.execute("LOCK TABLE accounts")
        for result in asyncio.run(make_both()):
            assert isinstance(result, StoreUnavailableError)
            assert result.perhaps_done
            assert "has not answered for 0.5 s" in str(result)
    store.write_now(lambda connection: make_team(connection, "later"))
    assert sorted(team.name for team in accounts.every(store.reader)) == ["begun", "later"]
    store.close()


def as_before(store: Store) -> None:
    """Makes the tables those of version 4."""

    def change(connection: Connection) -> None:
        connection.execute("UPDATE schema_version SET version = 4")
        connection.execute("DROP TABLE responses")
        for column in ("requests_at_once", "under_way"):
            connection.execute(f"ALTER TABLE accounts DROP COLUMN {column}")

    store.write_now(change)


VERSION = "SELECT version FROM schema_version"


def test_nobody_waits_long_behind_a_change_of_the_tables(url: str, root: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As while a dump reads them for minutes: who comes after the change, and other writers, have their turns."""
    monkeypatch.setattr(postgres_module, "LOCK_TRIES", 1000)
    running = Store(url, SCHEMA)
    as_before(running)
    root.execute("SET statement_timeout = '30s'")
    waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'relation' AND NOT granted"
    with ThreadPoolExecutor(1) as beside:
        with psycopg.connect(url) as dump:
            dump.execute("SELECT count(*) FROM accounts")
            coming = beside.submit(Store, url, SCHEMA)
            for _ in range(2):
                wait_until(lambda: root.execute(waits).fetchone() == (1,), 30)
                assert root.execute("SELECT count(*) FROM accounts").fetchone() == (0,)
                running.submit(lambda connection: connection.execute("UPDATE audit_head SET decisions = 7")).result(30)
            assert root.execute(VERSION).fetchone() == (4,)
            assert not coming.done()
        store = coming.result(60)
    assert root.execute(VERSION).fetchone() == (SCHEMA_VERSION,)
    store.write_now(make_team)
    store.close()
    running.close()


def test_many_that_change_the_tables_keep_no_writer_waiting_one_after_the_other(
    url: str, root: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where all workers of an upgraded gateway start during a dump: they queue apart from who writes."""
    monkeypatch.setattr(postgres_module, "LOCK_TRIES", 1000)
    monkeypatch.setattr(postgres_module, "LOCK_WAIT_S", 20.0)
    running = Store(url, SCHEMA)
    as_before(running)
    waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    of_writers = f" AND objid = {postgres_module._WRITERS & 0xFFFFFFFF}"
    with ThreadPoolExecutor(4) as beside:
        with psycopg.connect(url) as dump:
            dump.execute("SELECT count(*) FROM accounts")
            coming = [beside.submit(Store, url, SCHEMA) for _ in range(4)]
            wait_until(lambda: root.execute(waiting).fetchone() == (3,), 30)
            assert root.execute(waiting + of_writers).fetchone() == (0,)
        for store in [one.result(60) for one in coming]:
            store.close()
    assert root.execute(VERSION).fetchone() == (SCHEMA_VERSION,)
    running.close()


def test_tables_that_are_in_use_all_the_time_are_one_line(url: str, root: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_module, "LOCK_WAIT_S", 0.1)
    monkeypatch.setattr(postgres_module, "LOCK_PAUSE_S", 0.01)
    with contextlib.closing(Store(url, SCHEMA)) as store:
        as_before(store)
    with psycopg.connect(url) as dump:
        dump.execute("SELECT count(*) FROM accounts")
        with pytest.raises(ConfigurationError, match="in use each of 10 times; start again when") as raised:
            Store(url, SCHEMA)
        assert "\n" not in str(raised.value)
        assert not isinstance(raised.value, StoreUnavailableError), "it is not tried again by itself"
        assert root.execute(VERSION).fetchone() == (4,)
    Store(url, SCHEMA).close()
    assert root.execute(VERSION).fetchone() == (SCHEMA_VERSION,)


def test_names_are_taken_again_where_another_server_took_its_place(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, other = Store(url, SCHEMA), Store(url, SCHEMA)
    held = store.claim("ours")
    assert held is not None
    database = store._database
    assert isinstance(database, postgres_module.Postgres)
    before = database._session
    store.inherit("another")
    assert database._session is before
    with monkeypatch.context() as demoted:
        demoted.setattr(postgres_module, "_IS_STANDBY", "SELECT true")
        store.inherit("another")
    assert database._session is not before
    assert other.claim("ours") is None
    held.release()
    assert other.claim("ours") is not None
    store.close()
    other.close()


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("default_transaction_read_only = on", "read-only transaction"),
        ("search_path = nowhere", "no schema has been selected"),
    ],
)
def test_a_database_that_takes_no_tables_is_one_line(url: str, root: Any, setting: str, says: str) -> None:
    root.execute(f"ALTER DATABASE {root.info.dbname} SET {setting}")
    with pytest.raises(ConfigurationError, match=says) as raised:
        Store(url, SCHEMA)
    assert "\n" not in str(raised.value)


def test_a_user_without_rights_is_told_so(url: str, root: Any) -> None:
    root.execute("CREATE ROLE stranger LOGIN")
    with pytest.raises(ConfigurationError, match="permission denied") as raised:
        Store(url.replace("tokenmill@", "stranger@"), SCHEMA)
    assert "\n" not in str(raised.value)
    root.execute("DROP ROLE stranger")


def test_a_user_who_may_not_make_tables_uses_those_there_are(url: str, root: Any) -> None:
    """As where a database's owner makes them, and programs may only write into them."""
    owner = Store(url, SCHEMA)
    tables.prepare(owner)
    owner.close()
    root.execute("CREATE ROLE writer LOGIN")
    root.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    root.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO writer")
    store = Store(url.replace("tokenmill@", "writer@"), SCHEMA)
    tables.prepare(store)
    assert accounts.find(store.reader, store.write_now(make_team)).name == "T"
    store.close()
    root.execute("DROP OWNED BY writer")
    root.execute("DROP ROLE writer")


@pytest.fixture
def pool(postgres: PostgresServer, url: str) -> Iterator[Callable[..., str]]:
    """Starts a PgBouncer before the database, in a mode, with further settings; gives the URL through it."""
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("PgBouncer is not installed")
    with contextlib.ExitStack() as undo:

        def start(mode: str, **settings: int) -> str:
            return undo.enter_context(postgres.pooled(program, url, mode, settings))

        yield start


def test_a_pool_whose_sessions_stay_with_their_clients_works(pool: Callable[..., str]) -> None:
    place = pool("session")
    store, other = Store(place, SCHEMA), Store(place, SCHEMA)
    held = store.claim("ours")
    assert held is not None
    for _ in range(2):
        assert other.inherit("ours") is None
    held.release()
    assert other.claim("ours") is not None
    store.close()
    other.close()


@pytest.mark.parametrize("settings", [{}, {"default_pool_size": 1}, {"server_round_robin": 1}])
@pytest.mark.parametrize("before", [0, 3, 4])
def test_a_pool_that_shares_sessions_is_refused(
    pool: Callable[..., str], settings: dict[str, int], before: int
) -> None:
    """Its server would hold the names of processes that died, and what they reserved would never be settled.

    `before`: clients that have been there already, at once; the pool keeps sessions for so many.
    """
    place = pool("transaction", **settings)
    with contextlib.ExitStack() as undo:
        for _ in range(min(before, settings.get("default_pool_size", before))):
            undo.enter_context(psycopg.connect(place)).execute("SELECT 1")
    with pytest.raises(ConfigurationError, match="name the server itself, or a pool in session mode"):
        Store(place, SCHEMA)


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_names_are_kept_in_every_script_or_not_at_all(url: str, root: Any, encoding: str) -> None:
    root.execute(f"CREATE DATABASE {encoding} ENCODING '{encoding}' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'")
    place = url.replace(f"/{root.info.dbname}?", f"/{encoding.lower()}?")
    if encoding == "LATIN1":
        with pytest.raises(ConfigurationError, match="keeps text as LATIN1"):
            Store(place, SCHEMA)
        return
    store = Store(place, SCHEMA)
    identity = store.write_now(lambda connection: make_team(connection, "日本"))
    assert accounts.find(store.reader, identity).name == "日本"
    store.close()
