"""Hourly sums agree with the ledger to the micro-cent, whatever is summed already and wherever a span begins."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tokenmill.engine.gateway.admin import books, rollup, tables
from tokenmill.engine.gateway.admin.books import Column, Span
from tokenmill.engine.gateway.governance.schema import SCHEMA
from tokenmill.engine.gateway.store import Connection, Store

NOW = 1_800_000_000_000


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "books.db", SCHEMA)
    tables.prepare(made)
    yield made
    made.close()


def fill(connection: Connection, count: int, seed: int) -> None:
    """Requests of the last ten hours, with a gap of two."""
    dice = random.Random(seed)
    for index in range(count):
        hours = dice.choice([0, 1, 2, 3, 4, 7, 8, 9])
        ended = NOW - hours * rollup.HOUR_MS - dice.randrange(rollup.HOUR_MS)
        team = dice.choice(["a", "b", None])
        connection.execute(
            "INSERT INTO ledger (call, request_id, key_id, app, team, organisation, tier, backend, model, "
            "prompt_tokens, cached_tokens, completion_tokens, exact, cost, excess, outcome, status, attempts, started_at, ended_at) "
            "VALUES (?, 'r', 'k', NULL, ?, NULL, ?, 'b', 'm', ?, 1, ?, 1, ?, 0, 'ok', 200, 1, ?, ?)",
            (
                f"{seed}-{index}", team, dice.choice(["utility", "reasoning"]), dice.randrange(100),
                dice.randrange(100), dice.randrange(10**9), ended - 10, ended,
            ),
        )  # fmt: skip


@pytest.mark.parametrize("steps", [0, 1, 3, 20])
def test_sums_agree_with_the_ledger(store: Store, steps: int) -> None:
    store.write_now(lambda connection: fill(connection, 400, steps))
    for _ in range(steps):
        rollup.advance(store, NOW)
    if steps == 20:
        assert not rollup.advance(store, NOW)
        assert rollup.summed_until(store.reader) == (NOW - rollup.LAG_MS) // rollup.HOUR_MS
    columns: tuple[Column | None, ...] = (None, "team", "tier", "app", "organisation")
    for since in (NOW - 100, NOW - 5 * rollup.HOUR_MS - 1234, NOW - 9 * rollup.HOUR_MS, 0):
        for by in columns:
            expected = books.sums(store.reader, () if by is None else (by,), Span(since))
            found = rollup.sums(store.reader, by, since)
            if by is not None:
                expected = [row for row in expected if row["requests"]]
                found = [row for row in found if row["requests"]]
            assert found == expected


def test_an_hour_is_summed_once_even_when_two_workers_come_together(store: Store) -> None:
    store.write_now(lambda connection: fill(connection, 50, 1))
    while rollup.advance(store, NOW):
        pass
    total = rollup.sums(store.reader, None, 0)
    store.write_now(lambda connection: rollup._keep(connection, 0, 1, [{}]))
    assert rollup.sums(store.reader, None, 0) == total
