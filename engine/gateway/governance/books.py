"""Budgets and rate limits: reserved before a request is sent, settled when it has ended, never overspent.

A reservation holds the most that a request can cost on every account of its key's chain, in the transaction that
checks the limits, so requests at the same time, in whichever process, cannot pass a limit together. Settling removes
the reservation, charges the true cost and writes the ledger's row in one transaction: once or not at all. Nobody is
charged more than was reserved; what a request cost beyond it is written down. The reservations of a process that died
are settled at their full amount: nobody knows how far their requests came (`workers`).

The requests of one transaction are worked out together: their accounts are read once, worked on in memory, and written
once. What is written is absolute: no other process writes between reading and writing (`store.Database.transaction`).
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import orjson

from tokenmill.engine.gateway.governance import accounts, audit
from tokenmill.engine.gateway.governance.accounts import Account
from tokenmill.engine.gateway.governance.budgets import (
    WINDOW_S,
    Granted,
    Rate,
    Refusal,
    Reservation,
    Settlement,
    Spending,
)
from tokenmill.engine.gateway.store import Connection, now_ms, placeholders

_RESERVATION = "call, worker, amount, prompt_bound, completion_bound, chain, request_id, model, tier, started_at"
_LEDGER = (
    "call, request_id, key_id, app, team, organisation, tier, backend, model, prompt_tokens, cached_tokens, "
    "completion_tokens, exact, cost, excess, outcome, status, attempts, started_at, ended_at"
)


def apply(connection: Connection, items: Sequence[Reservation | Settlement]) -> list[Granted | Refusal | bool]:
    """Reserves and settles in this order, as if each were alone; see `reserve` and `settle` for the results.

    Give it to `Store.write_item` and `Store.post_item`, which gather the items of one transaction.
    """
    books = _Books(connection, items)
    results = [books.reserve(item) if isinstance(item, Reservation) else books.settle(item) for item in items]
    books.write()
    return results


def reserve(connection: Connection, wanted: Reservation) -> Granted | Refusal:
    """Reserves on every account of the chain, or on none and says why. Run it in the store's writer."""
    answer = apply(connection, [wanted])[0]
    assert not isinstance(answer, bool)
    return answer


def settle(connection: Connection, call: str, spending: Spending) -> bool:
    """Charges a request that has ended and frees its reservation; False when that was done before."""
    return apply(connection, [Settlement(call, spending)])[0] is True


class _Page:
    """One account as it is being worked on."""

    __slots__ = ("account", "period_start", "reserved", "soft_reached_at", "spent", "touched", "window")

    def __init__(self, account: Account) -> None:
        self.account = account
        self.period_start = account.period_start
        self.spent = account.spent
        self.reserved = account.reserved
        self.soft_reached_at = account.soft_reached_at
        self.window: _Window | None = None
        self.touched = False

    def renew(self, now: int) -> None:
        """Begins a new period with nothing spent where the old one is over.

        What requests under way have reserved stays reserved, and is spent in the period in which they end.
        """
        length = self.account.limits.period_ms
        if length is not None and now >= self.period_start + length:
            self.period_start += (now - self.period_start) // length * length
            self.spent = 0
            self.soft_reached_at = None
            self.touched = True

    def refusal(self, wanted: Reservation, asked: int) -> Refusal | None:
        """Why the account's limits refuse a request; None when they do not."""
        limits = self.account.limits
        most = limits.hard_limit
        if most is not None and self.spent + self.reserved + wanted.amount > most:
            end = None if limits.period_ms is None else self.period_start + limits.period_ms - wanted.at
            return Refusal("budget", self.account, most, self.spent + self.reserved, wanted.amount, end)
        if self.window is None:
            return None
        oldest, requests, tokens = self.window.sums(wanted.at // 1000)
        # Whole seconds: the oldest is counted until all of it is outside of the window.
        wait = WINDOW_S * 1000 if oldest is None else (oldest + WINDOW_S + 1) * 1000 - wanted.at
        most = limits.requests_per_minute
        if most is not None and requests + 1 > most:
            return Refusal("requests", self.account, most, requests, 1, wait)
        most = limits.tokens_per_minute
        if most is not None and tokens + asked > most:
            return Refusal("tokens", self.account, most, tokens, asked, wait if asked <= most else None)
        return None


class _Window:
    """Requests and tokens of one account by second, with sums of the last minute."""

    __slots__ = ("_by_second", "_changed", "_since", "_sums")

    def __init__(self, rows: Iterable[Sequence[int]]) -> None:
        self._by_second: dict[int, list[int]] = {row[0]: [row[1], row[2]] for row in rows}
        self._changed: set[int] = set()
        self._since = -1
        self._sums = [0, 0]

    def sums(self, second: int) -> tuple[int | None, int, int]:
        """(oldest second, requests, tokens) of the minute before `second` and of what came since."""
        since = second - WINDOW_S
        if since != self._since:
            self._since = since
            counted = [pair for at, pair in self._by_second.items() if at >= since]
            self._sums = [sum(pair[0] for pair in counted), sum(pair[1] for pair in counted)]
        oldest = min((at for at in self._by_second if at >= since), default=None)
        return oldest, self._sums[0], self._sums[1]

    def add(self, second: int, requests: int, tokens: int) -> None:
        """Counts; a second that has left the window already is not counted again."""
        pair = self._by_second.get(second)
        if pair is None:
            if not requests:
                return
            pair = self._by_second[second] = [0, 0]
        pair[0] += requests
        pair[1] += tokens
        self._changed.add(second)
        if second >= self._since:
            self._sums[0] += requests
            self._sums[1] += tokens

    def write(self, connection: Connection, account: str, now_s: int) -> None:
        """Stores what changed and forgets what is too old."""
        old = [second for second in self._by_second if second < now_s - WINDOW_S]
        if old:
            connection.execute("DELETE FROM windows WHERE account = ? AND second <= ?", (account, max(old)))
        connection.executemany(
            "INSERT INTO windows (account, second, requests, tokens) VALUES (?, ?, ?, ?) ON CONFLICT (account, second) "
            "DO UPDATE SET requests = excluded.requests, tokens = excluded.tokens",
            [(account, second, *self._by_second[second]) for second in self._changed if second not in old],
        )


class _Books:
    """The accounts, windows and reservations of one transaction.

    Args:
        connection: The writer's, in a transaction.
        items: What is going to be reserved and settled: says what has to be read.
    """

    def __init__(self, connection: Connection, items: Sequence[Reservation | Settlement]) -> None:
        self._connection = connection
        self._now = now_ms()
        #: Reservations made here, not written yet: call to row.
        self._made: dict[str, tuple[Any, ...]] = {}
        self._ledger: list[tuple[Any, ...]] = []
        calls = [item.call for item in items if isinstance(item, Settlement)]
        #: Reservations that end here and were made before, already removed from their table.
        self._ending = {row[0]: row for row in self._take(calls)}
        chains: list[Sequence[str]] = [item.chain for item in items if isinstance(item, Reservation)]
        chains += [[one for one, _ in orjson.loads(row[5])] for row in self._ending.values()]
        identities = sorted({one for chain in chains for one in chain})
        found = accounts.several(connection, identities) if identities else []
        self._pages = {account.id: _Page(account) for account in found}
        self._revoked = self._revoked_of({chain[0] for chain in chains})
        for page in self._pages.values():
            limits = page.account.limits
            if limits.requests_per_minute is not None or limits.tokens_per_minute is not None:
                query = "SELECT second, requests, tokens FROM windows WHERE account = ?"
                page.window = _Window(connection.execute(query, (page.account.id,)))

    def _take(self, calls: Sequence[str]) -> list[Any]:
        if not calls:
            return []
        query = f"DELETE FROM reservations WHERE call IN {placeholders(len(calls))} RETURNING {_RESERVATION}"  # noqa: S608
        return self._connection.execute(query, calls).fetchall()

    def _revoked_of(self, keys: Collection[str]) -> set[str]:
        if not keys:
            return set()
        query = f"SELECT id FROM keys WHERE revoked_at IS NOT NULL AND id IN {placeholders(len(keys))}"  # noqa: S608
        return {row[0] for row in self._connection.execute(query, list(keys))}

    def reserve(self, wanted: Reservation) -> Granted | Refusal:
        """See the function `reserve`."""
        chain = [self._pages[one] for one in wanted.chain]
        if wanted.chain[0] in self._revoked:
            return Refusal("revoked", chain[0].account, 0, 0, 0, None)
        asked = wanted.prompt + wanted.completion
        for page in chain:
            page.renew(wanted.at)
            refusal = page.refusal(wanted, asked)
            if refusal is not None:
                return refusal
        second = wanted.at // 1000
        requests: Rate | None = None
        tokens: Rate | None = None
        for page in chain:
            page.reserved += wanted.amount
            page.touched = True
            if page.window is not None:
                page.window.add(second, 1, asked)
                _, used_requests, used_tokens = page.window.sums(second)
                requests = _tighter(requests, page.account.limits.requests_per_minute, used_requests)
                tokens = _tighter(tokens, page.account.limits.tokens_per_minute, used_tokens)
        kinds = orjson.dumps([(page.account.id, page.account.kind) for page in chain]).decode()
        self._made[wanted.call] = (
            wanted.call,
            wanted.worker,
            wanted.amount,
            wanted.prompt,
            wanted.completion,
            kinds,
            wanted.request_id,
            wanted.model,
            wanted.tier,
            wanted.at,
        )
        return Granted(chain[0].spent, requests, tokens)

    def settle(self, item: Settlement) -> bool:
        """See the function `settle`."""
        row = self._ending.pop(item.call, None) or self._made.pop(item.call, None)
        if row is None:
            return False
        call, _, amount, prompt_bound, completion_bound, chain_text, request_id, model, tier, started_at = row
        spending: Spending = item.spending
        charged = min(spending.cost, amount)
        surplus = prompt_bound + completion_bound - spending.prompt - spending.completion
        by_kind: dict[str, str] = {}
        for identity, kind in orjson.loads(chain_text):
            by_kind[kind] = identity
            page = self._pages[identity]
            page.renew(self._now)
            page.reserved -= amount
            page.spent += charged
            page.touched = True
            if page.window is not None:
                page.window.add(started_at // 1000, 0, -surplus)
            self._note_soft_limit(page)
        self._ledger.append(
            (
                call,
                request_id,
                by_kind["key"],
                by_kind.get("app"),
                by_kind.get("team"),
                by_kind.get("organisation"),
                spending.tier or tier,
                spending.backend,
                model,
                spending.prompt,
                spending.cached,
                spending.completion,
                int(spending.exact),
                charged,
                spending.cost - charged,
                spending.outcome,
                spending.status,
                spending.attempts,
                started_at,
                self._now,
            )
        )
        return True

    def write(self) -> None:
        """Stores everything that changed."""
        connection = self._connection
        connection.executemany(
            "UPDATE accounts SET period_start = ?, spent = ?, reserved = ?, soft_reached_at = ? WHERE id = ?",
            [
                (page.period_start, page.spent, page.reserved, page.soft_reached_at, identity)
                for identity, page in self._pages.items()
                if page.touched
            ],
        )
        for identity, page in self._pages.items():
            if page.window is not None and page.touched:
                page.window.write(connection, identity, self._now // 1000)
        _insert(connection, "reservations", _RESERVATION, list(self._made.values()))
        _insert(connection, "ledger", _LEDGER, self._ledger)

    def _note_soft_limit(self, page: _Page) -> None:
        soft = page.account.limits.soft_limit
        if soft is not None and page.soft_reached_at is None and page.spent >= soft:
            page.soft_reached_at = self._now
            details = {"spent": page.spent, "soft_limit": soft}
            audit.append(self._connection, "gateway", "budget.soft_limit", page.account.id, details)


def _insert(connection: Connection, table: str, columns: str, rows: list[tuple[Any, ...]]) -> None:
    if rows:
        query = f"INSERT INTO {table} ({columns}) VALUES {placeholders(columns.count(',') + 1)}"  # noqa: S608
        connection.executemany(query, rows)


def _tighter(known: Rate | None, limit: int | None, used: int) -> Rate | None:
    if limit is None or (known is not None and known.remaining <= limit - used):
        return known
    return Rate(limit, limit - used)
