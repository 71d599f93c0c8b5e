"""Requests while the store cannot be reached: each is told so, and none leaves work behind for those after it."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.governance.conftest import KINDS, new_place
from tests.gateway.governance.governed import CHAT, MASTER_KEY, Governed, options
from tests.gateway.governance.line import Line
from tests.gateway.governance.postgres_server import PostgresServer
from tests.gateway.governance.test_at_once import reservation, settlement
from tests.gateway.governance.test_bounds import exchange, target
from tests.gateway.governance.test_budgets import key_with
from tests.gateway.running import RunningGateway, wait_until
from tests.gateway.upstream import FakeUpstream
from tokenmill.engine.gateway.api_error import ApiError
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.backlog import AGAIN_S, Backlog
from tokenmill.engine.gateway.database import StoreUnavailableError
from tokenmill.engine.gateway.governance import accounts, books
from tokenmill.engine.gateway.governance.accounts import MASTER, Limits
from tokenmill.engine.gateway.governance.budgets import Granted
from tokenmill.engine.gateway.governance.pages import Kept
from tokenmill.engine.gateway.governance.reserve import Reserve
from tokenmill.engine.gateway.governance.schema import SCHEMA
from tokenmill.engine.gateway.governance.service import Governance
from tokenmill.engine.gateway.pipeline import Exchange, Reply
from tokenmill.engine.gateway.portfolio import Route
from tokenmill.engine.gateway.principal import Principal
from tokenmill.engine.gateway.store import Store


@dataclass(frozen=True)
class Thing:
    """Something to write."""

    number: int
    dispensable: bool = False


def test_one_is_tried_after_a_failure_and_more_as_it_goes_well() -> None:
    now = 0.0
    backlog = Backlog[Thing](4, clock=lambda: now)
    assert backlog.due_in_s() is None
    for number in range(10):
        backlog.keep(Thing(number))
    assert (list(backlog.take()), backlog.due_in_s()) == ([], AGAIN_S)
    now = AGAIN_S
    (first,) = backlog.take()
    backlog.keep(first)
    assert list(backlog.take()) == []
    now = 2 * AGAIN_S
    # What failed for its own sake is behind the others.
    assert [[thing.number for thing in backlog.take()] for _ in range(5)] == [[1], [2, 3], [4, 5, 6, 7], [8, 9, 0], []]


def test_only_what_may_be_dropped_is(caplog: pytest.LogCaptureFixture) -> None:
    backlog = Backlog[Thing](100, most_kept=2)
    with caplog.at_level(logging.ERROR):
        for number in range(20):
            backlog.keep(Thing(number, dispensable=number % 2 == 1))
    kept = [*range(0, 20, 2), 1, 3]
    assert sorted(thing.number for thing in backlog.take_anyway()) == sorted(kept)
    assert len(caplog.records) == 1
    backlog.keep(Thing(0, dispensable=True))
    assert len(backlog) == 1


def test_a_batch_that_cannot_be_written_is_not_tried_piece_by_piece(store: Store) -> None:
    """Nor is what waits for the store tried with each batch; at last it is written, once."""
    key = key_with(store, Limits())
    apply, line = partial(books.apply, kept=Kept()), Line(store)
    calls = [str(number) for number in range(30)]

    async def main() -> None:
        for call in calls:
            assert isinstance(await store.write_item(apply, reservation(key, call, 10)), Granted)
        line.cut, line.tried = "before", 0
        for call in calls:
            store.post_item(apply, settlement(call, 1))
        batches = 20
        for number in range(batches):
            batch = [store.write_item(apply, reservation(key, f"{number}/{i}", 1)) for i in range(10)]
            answers = await asyncio.gather(*batch, return_exceptions=True)
            assert {type(answer) for answer in answers} == {StoreUnavailableError}
        # Each by the loop and by the thread, which also tries again once a second.
        assert line.tried < 4 * batches + 60
        line.cut = None

    asyncio.run(main())
    wait_until(lambda: store.reader.execute("SELECT count(*) FROM ledger").fetchone() == (len(calls),))
    found = accounts.find(store.reader, key)
    assert (found.spent, found.reserved) == (len(calls), 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", ["before", "after"])
def test_reservation_that_failed_is_settled_only_where_it_may_have_been_made(
    kind: str, cut: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Where the answer to its commit was lost; otherwise nothing is left to be done."""
    governance = Governance(options(new_place(kind, tmp_path, request)))
    posted: list[Any] = []

    async def below(_exchange: Exchange) -> Reply:
        raise AssertionError("was served")

    async def main() -> None:
        await governance.start()
        store = governance.store
        post: Callable[..., None] = store.post_item
        store.post_item = lambda *args, **named: (posted.append(args), post(*args, **named))[1]  # type: ignore[method-assign]
        line = Line(store)
        asking = exchange("/v1/chat/completions", {"model": "m", "max_tokens": 1})
        asking.principal, asking.routes = Principal(MASTER), [Route((target(),), "m")]
        line.cut = cut
        with pytest.raises(ApiError) as refused:
            await Reserve(governance).handle(asking, below)
        line.cut = None
        assert (refused.value.status, "books cannot be written" in str(refused.value)) == (503, True)
        made = store.reader.execute("SELECT count(*) FROM reservations").fetchone()
        assert made == (1 if cut == "after" else 0,)
        asking.end()
        assert len(posted) == made[0]
        await governance.stop()

    asyncio.run(main())
    store = Store(governance.options.store, SCHEMA)
    assert store.reader.execute("SELECT count(*) FROM reservations").fetchone() == (0,)
    assert store.reader.execute("SELECT outcome FROM ledger").fetchall() == [("open",)] * len(posted)
    store.close()


def test_postgres_says_whether_a_commit_may_have_arrived(postgres: PostgresServer) -> None:
    store = Store(postgres.new_database(), SCHEMA)
    end = "SELECT pg_terminate_backend(?)"

    def end_session(connection: Any) -> None:
        pid = connection.execute("SELECT pg_backend_pid()").fetchone()
        assert store.reader.execute(end, pid).fetchone() == (True,)

    def end_and_ask(connection: Any) -> None:
        end_session(connection)
        connection.execute("SELECT 1")

    for operation, perhaps in ((end_session, True), (end_and_ask, False)):
        with pytest.raises(StoreUnavailableError) as raised:
            store.write_now(operation)
        assert raised.value.perhaps_done is perhaps
    # A connection that broke in between costs nobody his answer.
    for (pid,) in store.reader.execute(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    ).fetchall():
        store.reader.execute(end, (pid,))
    assert store.write_now(lambda connection: connection.execute("SELECT 1").fetchone()) == (1,)
    store.close()


def test_refused_requests_are_few_lines_in_the_log(
    postgres: PostgresServer, shared_upstream: FakeUpstream, capfd: pytest.CaptureFixture[str]
) -> None:
    place = postgres.new_database()
    backend = Backend("a", shared_upstream.url, "utility")
    with RunningGateway(backend, governance=options(place), key=MASTER_KEY) as gateway:
        governed = Governed(gateway, Store(place, SCHEMA))
        assert governed.ask(MASTER_KEY, {"model": "tiny"})[0] == 200
        capfd.readouterr()
        with postgres.away():
            assert {
                gateway.post(CHAT, {"model": "tiny"}, authorization=f"Bearer {MASTER_KEY}")[0] for _ in range(50)
            } == {503}
            said = capfd.readouterr().err
        assert said.count("requests could not be served") == 1
        assert "Traceback" not in said
        governed.store.close()
