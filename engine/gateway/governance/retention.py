"""Old ledger rows leave by policy; that they did stays in the audit trail."""

from tokenmill.engine.gateway.governance import audit
from tokenmill.engine.gateway.store import Connection, Store

DAY_MS = 86_400_000
#: Rows removed in one transaction: the requests' own writes go in between.
ROWS_AT_ONCE = 500


def purge(store: Store, days: int, now: int) -> int:
    """Removes the ledger rows of requests that ended more than `days` before `now`; returns how many.

    Budgets keep what was spent: accounts hold sums of their own.
    """
    before = now - days * DAY_MS
    removed = 0
    while (count := store.write_now(lambda connection: _remove(connection, before, days))) > 0:
        removed += count
    return removed


def _remove(connection: Connection, before: int, days: int) -> int:
    calls = connection.execute(
        "DELETE FROM ledger WHERE call IN (SELECT call FROM ledger WHERE ended_at < ? ORDER BY ended_at LIMIT ?) "
        "RETURNING ended_at",
        (before, ROWS_AT_ONCE),
    ).fetchall()
    if calls:
        details = {"rows": len(calls), "ended_before": before, "days": days}
        audit.append(connection, "gateway", "ledger.purge", "ledger", details)
    return len(calls)
