"""What is asked of the ledger, on a store of each kind: which requests count, and where a span ends."""

from collections.abc import Sequence

import pytest

from tokenmill.engine.gateway.admin import books
from tokenmill.engine.gateway.admin.books import MINUTE_MS, Minute, Span
from tokenmill.engine.gateway.database import Connection
from tokenmill.engine.gateway.store import Store

NOW = 1_800_000_030_000
MINUTE = NOW // MINUTE_MS * MINUTE_MS


def put(store: Store, *rows: tuple[int, int, str, str]) -> None:
    """Rows of the ledger: (end, milliseconds it took, outcome, kind); each has 3 tokens and costs 5 micro-cents."""

    def write(connection: Connection) -> None:
        for number, (ended, took, outcome, kind) in enumerate(rows):
            connection.execute(
                "INSERT INTO ledger (call, request_id, key_id, tier, backend, model, prompt_tokens, cached_tokens, "
                "completion_tokens, exact, cost, excess, outcome, status, attempts, started_at, ended_at, kind) "
                "VALUES (?, 'r', 'k', 'utility', 'b', 'm', 1, 0, 2, 1, 5, 0, ?, 200, 1, ?, ?, ?)",
                (str(number), outcome, ended - took, ended, kind),
            )

    store.write_now(write)


def test_each_minute_has_what_ended_in_it(store: Store) -> None:
    put(
        store,
        (MINUTE - 2 * MINUTE_MS - 1, 9, "ok", "answer"),  # a minute too old
        (MINUTE - 2 * MINUTE_MS, 9, "ok", "answer"),
        (MINUTE - 1, 9, "error", "answer"),
        (MINUTE, 9, "ok", "answer"),
        (MINUTE + 1, 9, "error", "call"),  # a part of an answer: it costs, and is no request, so it fails none
    )
    assert books.minutes(store.reader, 3, NOW) == [
        Minute(MINUTE - 2 * MINUTE_MS, 1, 3, 5, 0),
        Minute(MINUTE - MINUTE_MS, 1, 3, 5, 1),
        Minute(MINUTE, 1, 6, 10, 0),
    ]


def test_latencies_are_those_of_requests_that_went_well(store: Store) -> None:
    rows = ((NOW - 3, 70), (NOW - 2, 90), (NOW - 1, 80))
    put(
        store,
        *((ended, took, "ok", "answer") for ended, took in rows),
        (NOW, 1, "error", "answer"),
        (NOW, 2, "ok", "call"),
    )
    assert books.latencies(store.reader, 0) == {"utility": [70, 80, 90]}
    assert books.latencies(store.reader, NOW - 2) == {"utility": [80, 90]}
    assert books.latencies(store.reader, 0, most=2) == {"utility": [80, 90]}


def test_a_span_ends_before_its_end(store: Store) -> None:
    put(store, *((NOW + late, 9, "ok", "answer") for late in (-1, 0, 1)))

    def requests(span: Span) -> int:
        return int(books.sums(store.reader, (), span)[0]["requests"])

    assert (requests(Span()), requests(Span(since=NOW)), requests(Span(until=NOW))) == (3, 2, 1)


@pytest.mark.parametrize(
    ("ordered", "share", "expected"),
    [
        ((), 0.5, None),
        ((1, 2, 3), 0.0, 1),
        ((1, 2, 3), 0.5, 2),
        ((1, 2, 3, 4), 0.5, 2),
        ((1, 2, 3, 4), 0.51, 3),
        ((1, 2, 3, 4), 0.99, 4),
        ((1, 2, 3, 4), 1.0, 4),
        ((7,), 0.01, 7),
    ],
)
def test_a_percentile_is_the_smallest_that_covers_its_share(
    ordered: Sequence[float], share: float, expected: float | None
) -> None:
    assert books.percentile(ordered, share) == expected


def test_a_sheet_takes_no_text_for_a_formula() -> None:
    texts = ("=1", "+1", "-1", "@a", "\ta", "\ra", "a=1", "")
    lines = books.as_csv([{"name": text, "cost": -1} for text in texts], ("name", "cost"))
    assert lines == ("name,cost\r\n'=1,-1\r\n'+1,-1\r\n'-1,-1\r\n'@a,-1\r\n'\ta,-1\r\n\"'\ra\",-1\r\na=1,-1\r\n,-1\r\n")
