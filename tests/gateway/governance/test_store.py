"""The store: order, failures, cancelled writes, names that die with their process, old rows that leave."""

import asyncio
import contextlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.governance.conftest import KINDS, new_place
from tests.gateway.governance.postgres_server import PostgresServer
from tests.gateway.governance.test_budgets import NOW, ask, end, key_with
from tests.gateway.running import wait_until
from tokenmill.engine.gateway.admin import books
from tokenmill.engine.gateway.database import Connection, now_ms
from tokenmill.engine.gateway.governance import accounts, audit, keys, retention, workers
from tokenmill.engine.gateway.governance.accounts import Limits
from tokenmill.engine.gateway.governance.retention import DAY_MS
from tokenmill.engine.gateway.governance.schema import SCHEMA
from tokenmill.engine.gateway.governance.workers import WorkerLock
from tokenmill.engine.gateway.store import Store
from tokenmill.engine.gateway.store_schema import SCHEMA_VERSION
from tokenmill.errors import ConfigurationError

HOLDER = "import sys; from tokenmill.engine.gateway.store import Store; "


def collect(connection: Connection, items: list[Any]) -> list[Any]:
    """Says how many came together; fails on a negative one."""
    if min(items) < 0:
        raise ValueError("negative")
    connection.execute("SELECT 1")
    return [(item, len(items)) for item in items]


def test_items_of_one_loop_round_are_done_together(store: Store) -> None:
    async def main() -> list[Any]:
        return await asyncio.gather(*(store.write_item(collect, number) for number in range(20)))

    assert asyncio.run(main()) == [(number, 20) for number in range(20)]


def test_one_failure_hurts_nobody_else(store: Store) -> None:
    async def main() -> list[Any]:
        futures = [store.write_item(collect, number) for number in (1, -1, 2)]
        return await asyncio.gather(*futures, return_exceptions=True)

    first, failed, last = asyncio.run(main())
    assert (first, last) == ((1, 1), (2, 1))
    assert isinstance(failed, ValueError)


def test_cancelled_write_does_not_run_and_posted_ones_do(store: Store) -> None:
    async def main() -> None:
        team = partial(accounts.create, kind="team", parent=None, limits=Limits(), actor="t")

        def make_teams(connection: Connection, names: list[str]) -> list[str]:
            return [team(connection, name=name, account=name) for name in names]

        store.post_item(make_teams, "posted")
        task = asyncio.create_task(store.write(partial(team, name="cancelled", account="cancelled")))
        await asyncio.sleep(0)
        task.cancel()
        await store.write(partial(team, name="written", account="written"))

    asyncio.run(main())
    assert [one.id for one in accounts.every(store.reader)] == ["posted", "written"]


def test_name_is_free_when_its_process_dies(store: Store) -> None:
    held = store.claim("ours")
    assert held is not None
    assert store.claim("ours") is None
    code = HOLDER + "s = Store(sys.argv[1], ()); c = s.claim('theirs'); print(c is not None, flush=True); input()"
    command = [sys.executable, "-c", code, str(store.place)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"True\n"
        assert store.claim("theirs") is None
        holder.kill()
        wait_until(lambda: store.claim("theirs") is not None)
    held.release()
    assert store.claim("ours") is not None


def test_newer_tables_are_refused(store: Store) -> None:
    store.write_now(lambda connection: connection.execute("UPDATE schema_version SET version = 1000"))
    with pytest.raises(ConfigurationError, match="schema version 1000"):
        Store(store.place, SCHEMA)


@pytest.mark.parametrize("kind", KINDS)
def test_tables_of_an_older_version_are_changed(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A store of version 1 had one row for a request; what it holds keeps its sums, new rows go beside it."""
    place = new_place(kind, tmp_path, request)
    old = Store(place, SCHEMA)
    key = key_with(old, Limits(hard_limit=1000))

    def write_as_then(connection: Connection) -> None:
        connection.execute("UPDATE schema_version SET version = 1")
        for column in ("kind", "accepted_draft_tokens", "rejected_draft_tokens"):
            connection.execute(f"ALTER TABLE ledger DROP COLUMN {column}")
        connection.execute("ALTER TABLE audit_head DROP COLUMN decisions")
        for column in ("requests_at_once", "under_way"):
            connection.execute(f"ALTER TABLE accounts DROP COLUMN {column}")
        connection.execute("DROP TABLE responses")
        connection.execute(
            "INSERT INTO ledger (call, request_id, key_id, app, team, organisation, tier, backend, model, "
            "prompt_tokens, cached_tokens, completion_tokens, exact, cost, excess, outcome, status, attempts, "
            "started_at, ended_at) VALUES ('old', 'r', ?, NULL, 'team', NULL, 't', 'b', 'm', 5, 0, 2, 1, 9, 0, 'ok', "
            "200, 2, ?, ?)",
            (key, NOW, NOW),
        )

    old.write_now(write_as_then)
    old.close()
    for _ in range(2):
        store = Store(place, SCHEMA)
        assert store.reader.execute("SELECT version FROM schema_version").fetchall() == [(SCHEMA_VERSION,)]
        assert books.sums(store.reader, ("kind",))[0] == {
            "kind": "answer", "requests": 1, "prompt_tokens": 5, "cached_tokens": 0, "completion_tokens": 2,
            "accepted_draft_tokens": 0, "rejected_draft_tokens": 0, "cost": 9,
        }  # fmt: skip
        store.close()
    store = Store(place, SCHEMA)
    assert ask(store, key, "new", 10, at=NOW) is None
    store.write_now(lambda connection: accounts.set_limits(connection, key, Limits(requests_at_once=1), "t"))
    assert ask(store, key, "second", 10, at=NOW) is not None
    assert end(store, "new", 7)
    (total,) = books.sums(store.reader, ())
    assert (total["requests"], total["cost"]) == (2, 16)
    store.write_now(lambda connection: keys.revoke(connection, key, "t"))
    assert audit.changes(store.reader) == audit.verify(store.reader).sequence == 4
    store.close()


def purged(store: Store, stopping: asyncio.Event | None = None) -> int:
    """How many rows left that are older than a day."""
    return asyncio.run(retention.purge(store, 1, now_ms(), stopping or asyncio.Event()))


def test_many_old_rows_leave_one_part_after_the_other(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "ROWS_AT_ONCE", 3)
    key = key_with(store, Limits())
    for call in range(10):
        assert ask(store, key, str(call), 10, at=NOW) is None
        assert end(store, str(call), 7)
    store.write_now(lambda connection: connection.execute("UPDATE ledger SET ended_at = ?", (now_ms() - 2 * DAY_MS,)))
    before = audit.changes(store.reader)
    stopped = asyncio.Event()
    stopped.set()
    assert purged(store, stopped) == 0
    # It has to end after its first part, while it lets others write.
    stopping, real = asyncio.Event(), retention._remove

    def remove(*given: Any, **named: Any) -> tuple[int, int]:
        stopping.set()
        return real(*given, **named)

    with monkeypatch.context() as patched:
        patched.setattr(retention, "_remove", remove)
        assert purged(store, stopping) == 3
    assert purged(store) == 7
    rows = store.reader.execute("SELECT action, details FROM audit WHERE sequence > ? ORDER BY sequence", (before,))
    told = [json.loads(details) for action, details in rows.fetchall() if action == "ledger.purge"]
    assert [row.get("rows", row.get("begun")) for row in told] == [True, 3, True, 7]
    assert {row["days"] for row in told} == {1}


def test_old_rows_leave_and_budgets_keep_what_was_spent(store: Store) -> None:
    key = key_with(store, Limits(hard_limit=1000))
    for call in range(3):
        assert ask(store, key, str(call), 10, at=NOW) is None
        assert end(store, str(call), 7)
    assert purged(store) == 0
    store.write_now(
        lambda connection: connection.execute(
            "UPDATE ledger SET ended_at = ended_at - ? WHERE call < '2'", (2 * DAY_MS,)
        )
    )
    assert purged(store) == 2
    assert store.reader.execute("SELECT call FROM ledger").fetchall() == [("2",)]
    assert accounts.find(store.reader, key).spent == 21
    last = store.reader.execute("SELECT action, details FROM audit ORDER BY sequence DESC LIMIT 1").fetchone()
    assert last[0] == "ledger.purge" and '"rows":2' in last[1]
    audit.verify(store.reader)


def test_postgres_may_come_back(postgres: PostgresServer) -> None:
    """A server that went away and came back is used again; what was committed is there, our name is ours again."""
    store = Store(postgres.new_database(), SCHEMA)
    worker = WorkerLock(store)
    key = key_with(store, Limits(hard_limit=100))
    assert ask(store, key, "a", 60) is None
    postgres.crash()
    with contextlib.suppress(Exception):
        store.write_now(lambda connection: connection.execute("SELECT 1"))  # this one may notice the loss
    assert end(store, "a", 10)
    for _ in range(2):
        with contextlib.suppress(Exception):
            workers.recover(store)
    other = Store(str(store.place), SCHEMA)
    assert other.claim(worker.id) is None
    other.close()
    rows = store.write_now(lambda connection: connection.execute("SELECT id FROM workers").fetchall())
    assert rows == [(worker.id,)]
    with contextlib.suppress(Exception):
        accounts.find(store.reader, key)
    assert accounts.find(store.reader, key).spent == 10
    worker.close()
    store.close()


def test_postgres_that_cannot_be_reached_is_one_line() -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(ConfigurationError, match=r"postgresql://127.0.0.1:9/x cannot be used: .*") as raised:
        Store("postgresql://me:secret@127.0.0.1:9/x", SCHEMA)
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)
