"""Questions to the ledger: sums by whom and by what, latencies, minutes. Money in micro-cents, times in ms."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from tokenmill.engine.gateway.database import Connection

Column = Literal["organisation", "team", "app", "key", "tier", "backend", "model", "outcome", "kind", "day"]
COLUMNS: tuple[Column, ...] = get_args(Column)
DAY_MS = 86_400_000
MINUTE_MS = 60_000
#: What each column is in SQL; nothing of a query is ever taken from outside but values.
_SQL: Mapping[Column, str] = {
    "organisation": "organisation",
    "team": "team",
    "app": "app",
    "key": "key_id",
    "tier": "tier",
    "backend": "backend",
    "model": "model",
    "outcome": "outcome",
    "kind": "kind",
    "day": f"ended_at / {DAY_MS}",
}
#: A request has one row of this kind; its other rows are calls that cost something, too.
_ANSWERS = "coalesce(sum(CASE WHEN kind = 'answer' THEN 1 ELSE 0 END), 0)"
_SUMS = (
    f"{_ANSWERS}, coalesce(sum(prompt_tokens), 0), coalesce(sum(cached_tokens), 0), "
    "coalesce(sum(completion_tokens), 0), coalesce(sum(accepted_draft_tokens), 0), "
    "coalesce(sum(rejected_draft_tokens), 0), coalesce(sum(cost), 0)"
)
SUM_NAMES = (
    "requests", "prompt_tokens", "cached_tokens", "completion_tokens", "accepted_draft_tokens",
    "rejected_draft_tokens", "cost",
)  # fmt: skip


@dataclass(frozen=True)
class Span:
    """From when to when, in milliseconds; None: from the beginning, up to now. `until` is not included."""

    since: int | None = None
    until: int | None = None

    def where(self, conditions: Mapping[Column, str] | None = None) -> tuple[str, list[Any]]:
        """A WHERE clause and its values."""
        parts: list[str] = ["1 = 1"]
        values: list[Any] = []
        if self.since is not None:
            parts.append("ended_at >= ?")
            values.append(self.since)
        if self.until is not None:
            parts.append("ended_at < ?")
            values.append(self.until)
        for column, value in (conditions or {}).items():
            parts.append(f"{_SQL[column]} = ?")
            values.append(value)
        return " AND ".join(parts), values


def sums(
    connection: Connection,
    by: Sequence[Column],
    span: Span = Span(),
    conditions: Mapping[Column, str] | None = None,
    limit: int = 10_000,
) -> list[dict[str, Any]]:
    """Requests, tokens and cost, one row per combination of `by`, the dearest first.

    Args:
        connection: Any.
        by: What to group by; empty: one row for all.
        span: When the requests ended.
        conditions: Only rows with these values.
        limit: Most rows.
    """
    where, values = span.where(conditions)
    grouped = ", ".join(_SQL[column] for column in by)
    head = f"{grouped}, " if by else ""
    tail = f" GROUP BY {grouped}" if by else ""
    query = f"SELECT {head}{_SUMS} FROM ledger WHERE {where}{tail} ORDER BY sum(cost) DESC, count(*) DESC LIMIT ?"  # noqa: S608
    rows = connection.execute(query, (*values, limit)).fetchall()
    return [dict(zip((*by, *SUM_NAMES), (*_shown(by, row), *map(int, row[len(by) :])), strict=True)) for row in rows]


def _shown(by: Sequence[Column], row: Sequence[Any]) -> list[Any]:
    return [
        datetime.fromtimestamp(value * DAY_MS / 1000, UTC).date().isoformat() if column == "day" else (value or "")
        for column, value in zip(by, row, strict=False)
    ]


@dataclass(frozen=True)
class Minute:
    """What ended in one minute; `start` in milliseconds."""

    start: int
    requests: int
    tokens: int
    cost: int
    failed: int


def minutes(connection: Connection, count: int, now: int) -> list[Minute]:
    """The last minutes, the oldest first; the current one, which is not over, is the last."""
    last = now // MINUTE_MS
    first = last - count + 1
    query = (
        f"SELECT ended_at / {MINUTE_MS}, {_ANSWERS}, sum(prompt_tokens + completion_tokens), sum(cost), "  # noqa: S608
        "sum(CASE WHEN outcome = 'ok' OR kind <> 'answer' THEN 0 ELSE 1 END) FROM ledger WHERE ended_at >= ? GROUP BY 1"
    )
    found = {int(row[0]): row[1:] for row in connection.execute(query, (first * MINUTE_MS,))}
    return [
        Minute(minute * MINUTE_MS, *(int(value) for value in found.get(minute, (0, 0, 0, 0))))
        for minute in range(first, last + 1)
    ]


def latencies(connection: Connection, since: int, most: int = 20_000) -> dict[str, list[int]]:
    """Milliseconds from head to end of the last requests that went well, sorted, by tier.

    Args:
        connection: Any.
        since: Only those that ended from then on.
        most: Only the last so many.
    """
    query = (
        "SELECT tier, ended_at - started_at FROM ledger WHERE ended_at >= ? AND outcome = 'ok' AND kind = 'answer' "
        "ORDER BY ended_at DESC LIMIT ?"
    )
    found: dict[str, list[int]] = {}
    for tier, elapsed in connection.execute(query, (since, most)):
        found.setdefault(tier, []).append(int(elapsed))
    return {tier: sorted(times) for tier, times in sorted(found.items())}


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """The smallest value that is at least as large as this share of all; None of nothing."""
    if not ordered:
        return None
    rank = max(1, -(-len(ordered) * share // 1))
    return ordered[min(len(ordered), int(rank)) - 1]


def as_csv(rows: Sequence[Mapping[str, Any]], header: Sequence[str]) -> str:
    """The rows as CSV (RFC 4180). A text that a spreadsheet would take for a formula is quoted with `'`."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(header)
    for row in rows:
        writer.writerow([_harmless(row[name]) for name in header])
    return out.getvalue()


def _harmless(value: Any) -> Any:
    return "'" + value if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
