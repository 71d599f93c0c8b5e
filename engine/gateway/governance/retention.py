"""Old ledger rows leave by policy; that they did stays in the audit trail."""

import asyncio
import contextlib
import time
from functools import partial

from tokenmill.engine.gateway.database import Connection
from tokenmill.engine.gateway.governance import audit
from tokenmill.engine.gateway.store import Store

DAY_MS = 86_400_000
#: Rows removed in one transaction: the requests' own writes go in between.
ROWS_AT_ONCE = 100
#: Of the time that requests have for their writes, all processes together take one part in so many.
ONE_PART_OF = 5


async def purge(store: Store, days: int, now: int, stopping: asyncio.Event) -> int:
    """Removes the ledger rows of requests that ended more than `days` before `now`; returns how many.

    Budgets keep what was spent: accounts hold sums of their own. A ledger from which millions of rows leave keeps
    nobody waiting: each transaction is followed by a pause. The trail says when that begins and how many it were.

    Args:
        store: The store.
        days, now: What leaves.
        stopping: Set when there is no more time for it.
    """
    details = {"ended_before": now - days * DAY_MS, "days": days}
    removed, last = 0, False
    while not last and not stopping.is_set():
        begun = time.monotonic()
        count, others = await store.write(partial(_remove, details=details, before=removed))
        took = time.monotonic() - begun
        removed, last = removed + count, count < ROWS_AT_ONCE
        if not last:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), took * (ONE_PART_OF - 1) * others)
    if removed and not last:
        await store.write(partial(_tell, details={"rows": removed, **details}))
    return removed


def _remove(connection: Connection, details: dict[str, int], before: int) -> tuple[int, int]:
    """(rows removed, processes that may be at it); `before`: rows removed before this."""
    count = len(
        connection.execute(
            "DELETE FROM ledger WHERE call IN (SELECT call FROM ledger WHERE ended_at < ? ORDER BY ended_at LIMIT ?) "
            "RETURNING ended_at",
            (details["ended_before"], ROWS_AT_ONCE),
        ).fetchall()
    )
    if count < ROWS_AT_ONCE and before + count:
        _tell(connection, {"rows": before + count, **details})
    elif count and not before:
        _tell(connection, {"begun": True, **details})
    (processes,) = connection.execute("SELECT count(*) FROM workers").fetchone()
    return count, max(processes, 1)


def _tell(connection: Connection, details: dict[str, int]) -> None:
    audit.append(connection, "gateway", "ledger.purge", "ledger", details)
