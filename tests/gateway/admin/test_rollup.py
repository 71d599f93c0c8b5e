"""Hourly sums agree with the ledger to the micro-cent, whatever is summed already and wherever a span begins."""

import random

import pytest

from tokenmill.engine.gateway.admin import books, rollup, tables
from tokenmill.engine.gateway.admin.books import Column, Span
from tokenmill.engine.gateway.database import Connection
from tokenmill.engine.gateway.store import Store

NOW = 1_800_000_000_000


@pytest.fixture
def summed(store: Store) -> Store:
    """A store of each kind with the tables of sums."""
    tables.prepare(store)
    return store


def fill(connection: Connection, count: int, seed: int) -> None:
    """Requests of the last ten hours, with a gap of two."""
    dice = random.Random(seed)
    for index in range(count):
        hours = dice.choice([0, 1, 2, 3, 4, 7, 8, 9])
        ended = NOW - hours * rollup.HOUR_MS - dice.randrange(rollup.HOUR_MS)
        team = dice.choice(["a", "b", None])
        connection.execute(
            "INSERT INTO ledger (call, request_id, key_id, app, team, organisation, tier, backend, model, "
            "prompt_tokens, cached_tokens, completion_tokens, exact, cost, excess, outcome, status, attempts, "
            "started_at, ended_at) "
            "VALUES (?, 'r', 'k', NULL, ?, NULL, ?, 'b', 'm', ?, 1, ?, 1, ?, 0, 'ok', 200, 1, ?, ?)",
            (
                f"{seed}-{index}", team, dice.choice(["utility", "reasoning"]), dice.randrange(100),
                dice.randrange(100), dice.randrange(10**9), ended - 10, ended,
            ),
        )  # fmt: skip


@pytest.mark.parametrize("steps", [0, 1, 3, 20])
def test_sums_agree_with_the_ledger(summed: Store, steps: int) -> None:
    summed.write_now(lambda connection: fill(connection, 400, steps))
    for _ in range(steps):
        rollup.advance(summed, NOW)
    if steps == 20:
        assert not rollup.advance(summed, NOW)
        assert rollup.summed_until(summed.reader) == (NOW - rollup.LAG_MS) // rollup.HOUR_MS
    columns: tuple[Column | None, ...] = (None, "team", "tier", "app", "organisation")
    half = rollup.HOUR_MS // 2
    # The one in the middle of an hour has requests of that hour before it and after it.
    for since in (
        NOW - 100,
        NOW - 3 * rollup.HOUR_MS - half,
        NOW - 5 * rollup.HOUR_MS - 1234,
        NOW - 9 * rollup.HOUR_MS,
        0,
    ):
        for by in columns:
            named = () if by is None else (by,)
            whole = books.sums(summed.reader, named, Span(since))
            expected = [{name: row[name] for name in (*named, *rollup.SUM_NAMES)} for row in whole]
            found = rollup.sums(summed.reader, by, since)
            if by is not None:
                expected = [row for row in expected if row["requests"]]
                found = [row for row in found if row["requests"]]
            assert found == expected


def test_an_hour_is_summed_once_even_when_two_workers_come_together(summed: Store) -> None:
    summed.write_now(lambda connection: fill(connection, 50, 1))
    while rollup.advance(summed, NOW):
        pass
    total = rollup.sums(summed.reader, None, 0)
    summed.write_now(lambda connection: rollup._keep(connection, 0, 1, [{}]))
    assert rollup.sums(summed.reader, None, 0) == total


def test_only_the_worker_that_saw_too_late_an_hour_opens_it_again(summed: Store) -> None:
    """Another one has opened hours meanwhile, by a clock that is behind: what is not summed must not count as such."""
    summed.write_now(lambda connection: fill(connection, 50, 1))
    rollup.advance(summed, NOW)
    begun, total = rollup.summed_until(summed.reader), rollup.sums(summed.reader, None, 0)
    summed.write_now(lambda connection: rollup._open_again(connection, begun + 100, begun + 5))
    assert rollup.summed_until(summed.reader) == begun
    assert rollup.sums(summed.reader, None, 0) == total


def test_sums_that_nobody_sees_any_more_go(summed: Store) -> None:
    summed.write_now(lambda connection: fill(connection, 50, 1))
    while rollup.advance(summed, NOW):
        pass
    later = NOW + rollup.KEPT_HOURS * rollup.HOUR_MS
    summed.write_now(
        lambda connection: connection.execute("UPDATE ledger SET ended_at = ? WHERE call = '1-0'", (later,))
    )
    while rollup.advance(summed, later + 2 * rollup.HOUR_MS):
        pass
    hours = summed.reader.execute("SELECT DISTINCT hour FROM ledger_hours ORDER BY hour").fetchall()
    assert [int(row[0]) for row in hours] == [later // rollup.HOUR_MS]


def test_hours_that_a_clock_closed_before_their_end_are_opened_again(summed: Store) -> None:
    """A machine whose clock was two hours ahead has summed the hour that runs; what came later was in no sum."""
    now = NOW - 1
    summed.write_now(lambda connection: fill(connection, 100, 1))
    while rollup.advance(summed, now + 2 * rollup.HOUR_MS):
        pass
    summed.write_now(lambda connection: fill(connection, 100, 2))
    while rollup.advance(summed, now):
        pass
    assert rollup.summed_until(summed.reader) == (now - rollup.LAG_MS) // rollup.HOUR_MS
    running = now // rollup.HOUR_MS * rollup.HOUR_MS
    (expected,), (found,) = books.sums(summed.reader, (), Span(running)), rollup.sums(summed.reader, None, running)
    assert found["requests"] > 0
    assert found == {name: expected[name] for name in rollup.SUM_NAMES}
