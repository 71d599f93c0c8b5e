"""Hourly sums of the ledger: what the dashboard shows of a day or a month without reading millions of rows.

An hour is summed once it is over, by whichever worker comes first; the ledger stays the truth, and whatever is not
summed yet is read from it.
"""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from tokenmill.engine.gateway.admin import tables
from tokenmill.engine.gateway.admin.books import Column, Span
from tokenmill.engine.gateway.admin.books import sums as ledger_sums
from tokenmill.engine.gateway.database import Connection, StoreUnavailableError, now_ms
from tokenmill.engine.gateway.governance.pages import AHEAD_S
from tokenmill.engine.gateway.governance.service import Governance
from tokenmill.engine.gateway.store import Store

log = logging.getLogger("tokenmill.gateway.admin")

HOUR_MS = 3_600_000
#: An hour is closed this long after its end: rows that were on their way are committed, also by a clock that is behind.
LAG_MS = 60_000 + AHEAD_S * 1000
#: Sums older than this are not shown by anybody and go.
KEPT_HOURS = 32 * 24
#: Seconds between two looks for an hour that is over, and between two hours where several are to be summed.
EVERY_S, PAUSE_S = 60.0, 0.5
_COLUMNS: tuple[Column, ...] = ("organisation", "team", "app", "tier")
#: What is summed, of `books.SUM_NAMES`.
SUM_NAMES = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "cost")


class Rollup:
    """A service: keeps the sums up to date.

    Args:
        governance: Has the store.
    """

    def __init__(self, governance: Governance) -> None:
        self._governance = governance
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins."""
        await self._governance.store.write(tables.make)
        self._task = asyncio.create_task(self._keep_on())

    async def stop(self) -> None:
        """Ends."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _keep_on(self) -> None:
        while True:
            again = False
            try:
                again = await asyncio.to_thread(advance, self._governance.store, now_ms())
            except StoreUnavailableError as error:
                log.warning("an hour of the ledger cannot be summed: %s; trying again", error)
            except Exception:
                log.exception("an hour of the ledger could not be summed; trying again")
            await asyncio.sleep(PAUSE_S if again else EVERY_S)


def advance(store: Store, now: int) -> bool:
    """Sums the next hour that is over, if there is one; returns whether it did. Call it in a thread."""
    connection = store.connect_reader()
    try:
        begun = summed_until(connection)
        if begun * HOUR_MS > now - LAG_MS + AHEAD_S * 1000:
            # A clock that was set back since has closed hours that were not over.
            store.write_now(partial(_open_again, begun=begun, hour=(now - LAG_MS) // HOUR_MS))
            return True
        query = "SELECT min(ended_at) FROM ledger WHERE ended_at >= ?"
        (first,) = connection.execute(query, (begun * HOUR_MS,)).fetchone()
        if first is None or (hour := int(first) // HOUR_MS) >= (now - LAG_MS) // HOUR_MS:
            return False
        rows = ledger_sums(connection, _COLUMNS, _hours(hour, hour + 1), limit=100_000)
    finally:
        connection.close()
    store.write_now(lambda writer: _keep(writer, begun, hour, rows))
    return True


def _keep(connection: Connection, begun: int, hour: int, rows: Sequence[dict[str, Any]]) -> None:
    if summed_until(connection) != begun:
        return  # another worker was faster
    names = (*_COLUMNS, *SUM_NAMES)
    for row in rows:
        connection.execute(
            f"INSERT INTO ledger_hours (hour, {', '.join(names)}) VALUES (?{', ?' * len(names)})",  # noqa: S608
            (hour, *(row[name] for name in names)),
        )
    connection.execute("DELETE FROM ledger_hours WHERE hour < ?", (hour - KEPT_HOURS,))
    connection.execute("DELETE FROM ledger_summed")
    connection.execute("INSERT INTO ledger_summed (until_hour) VALUES (?)", (hour + 1,))


def _open_again(connection: Connection, begun: int, hour: int) -> None:
    if summed_until(connection) == begun:
        connection.execute("DELETE FROM ledger_hours WHERE hour >= ?", (hour,))
        connection.execute("UPDATE ledger_summed SET until_hour = ?", (hour,))


def summed_until(connection: Connection) -> int:
    """The first hour that is not summed, in hours since 1970."""
    row = connection.execute("SELECT until_hour FROM ledger_summed").fetchone()
    return 0 if row is None else int(row[0])


def sums(connection: Connection, by: Column | None, since: int) -> list[dict[str, Any]]:
    """`SUM_NAMES` like those of `books.sums`, by one of organisation, team, app and tier, or by nothing, since then."""
    first, until = -(-since // HOUR_MS), summed_until(connection)
    columns = () if by is None else (by,)
    hours: list[dict[str, Any]] = []
    edges = [Span(since)]
    if until > first:
        hours = _sums_of_hours(connection, columns, first)
        edges = [Span(since, first * HOUR_MS), Span(until * HOUR_MS)]
    merged: dict[str, dict[str, Any]] = {}
    for row in (*hours, *(row for span in edges for row in ledger_sums(connection, columns, span))):
        name = "" if by is None else row[by] or ""
        known = merged.setdefault(name, {**({} if by is None else {by: name}), **dict.fromkeys(SUM_NAMES, 0)})
        for field in SUM_NAMES:
            known[field] += int(row[field])
    return sorted(merged.values(), key=lambda row: (-row["cost"], -row["requests"]))


def _sums_of_hours(connection: Connection, columns: Sequence[Column], first: int) -> list[dict[str, Any]]:
    by = ", ".join(columns)
    head, tail = (f"{by}, ", f" GROUP BY {by}") if by else ("", "")
    total = ", ".join(f"coalesce(sum({name}), 0)" for name in SUM_NAMES)
    query = f"SELECT {head}{total} FROM ledger_hours WHERE hour >= ?{tail}"  # noqa: S608 - our own column names
    rows = connection.execute(query, (first,)).fetchall()
    return [dict(zip((*columns, *SUM_NAMES), row, strict=True)) for row in rows]


def _hours(first: int, end: int) -> Span:
    return Span(first * HOUR_MS, end * HOUR_MS)
