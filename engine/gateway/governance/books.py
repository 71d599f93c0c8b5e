"""Budgets and rate limits: reserved before a request is sent, settled when it has ended, never overspent.

A reservation holds the most that a request can cost on every account of its key's chain, in the transaction that
checks the limits, so requests at the same time, in whichever process, cannot pass a limit together. Settling removes
the reservation, charges the true cost and writes the ledger's row in one transaction: once or not at all. Nobody is
charged more than was reserved; what a request cost beyond it is written down. The reservations of a process that died
are settled at their full amount: nobody knows how far their requests came (`workers`).

The requests of one transaction are worked out together: their accounts are read once, worked on in memory, and written
once. What is written is absolute: no other process writes between reading and writing (`store.Database.transaction`).
A process that is the only one to write does not even read (`pages`).
"""

import functools
from collections.abc import Collection, Sequence
from typing import Any

import orjson

from tokenmill.engine.gateway.database import Connection, now_ms, placeholders
from tokenmill.engine.gateway.governance import accounts, audit
from tokenmill.engine.gateway.governance.budgets import (
    WINDOW_S,
    Granted,
    Rate,
    Refusal,
    Reservation,
    Settlement,
    Spending,
)
from tokenmill.engine.gateway.governance.pages import AHEAD_S, Kept, Page, Window

#: Kind of the one row that every request has in the ledger.
ANSWER = "answer"
#: More than any limit leaves.
_FAR = 1 << 62
_RESERVATION = "call, worker, amount, prompt_bound, completion_bound, chain, request_id, model, tier, started_at"
_LEDGER = (
    "call, request_id, key_id, app, team, organisation, tier, backend, model, prompt_tokens, cached_tokens, "
    "completion_tokens, exact, cost, excess, outcome, status, attempts, started_at, ended_at, kind, "
    "accepted_draft_tokens, rejected_draft_tokens"
)


def apply(
    connection: Connection, items: Sequence[Reservation | Settlement], kept: Kept | None = None
) -> list[Granted | Refusal | bool]:
    """Reserves and settles in this order, as if each were alone; see `reserve` and `settle` for the results.

    Give it to `Store.write_item` and `Store.post_item`, which gather the items of one transaction.

    Args:
        connection: The writer's, in a transaction.
        items: What to do.
        kept: What this process knows from before; None: nothing.
    """
    books = _Books(connection, items, kept or Kept())
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


class _Books:
    """The accounts, windows and reservations of one transaction.

    Args:
        connection: The writer's, in a transaction.
        items: What is going to be reserved and settled: says what has to be read.
        kept: What is known without reading.
    """

    def __init__(self, connection: Connection, items: Sequence[Reservation | Settlement], kept: Kept) -> None:
        kept.check(connection)
        self._connection = connection
        self._kept = kept
        self._now = now_ms()
        #: Reservations made here, not written yet: call to row.
        self._made: dict[str, tuple[Any, ...]] = {}
        self._ledger: list[tuple[Any, ...]] = []
        self._touched: dict[str, Page] = {}
        #: The pages of a chain that is worked on, by its accounts.
        self._chains: dict[tuple[str, ...], list[Page]] = {}
        calls = [item.call for item in items if isinstance(item, Settlement)]
        #: Reservations that end here and were made before, already removed from their table.
        self._ending = self._take(calls) if calls else {}
        chains = {item.chain for item in items if isinstance(item, Reservation)}
        chains.update([_chain(row[5])[0] for row in self._ending.values()])
        self._pages = kept.pages
        missing = sorted({one for chain in chains for one in chain if one not in self._pages})
        if missing:
            self._read(missing)

    def _take(self, calls: Sequence[str]) -> dict[str, tuple[Any, ...]]:
        known = self._kept.reservations
        found = {call: row for call in calls if (row := known.pop(call, None)) is not None}
        if found:
            query = "DELETE FROM reservations WHERE call = ?"
            self._connection.executemany(query, [(call,) for call in found])
        unknown = [call for call in calls if call not in found]
        if unknown:
            query = f"DELETE FROM reservations WHERE call IN {placeholders(len(unknown))} RETURNING {_RESERVATION}"  # noqa: S608
            found |= {row[0]: row for row in self._connection.execute(query, unknown).fetchall()}
        return found

    def _read(self, identities: Sequence[str]) -> None:
        revoked = self._revoked_of(identities)
        for account in accounts.several(self._connection, identities):
            limits, window = account.limits, None
            if limits.requests_per_minute is not None or limits.tokens_per_minute is not None:
                query = "SELECT second, requests, tokens FROM windows WHERE account = ?"
                window = Window(self._connection.execute(query, (account.id,)))
            self._pages[account.id] = Page(account, account.id in revoked, window)

    def _revoked_of(self, keys: Collection[str]) -> set[str]:
        query = f"SELECT id FROM keys WHERE revoked_at IS NOT NULL AND id IN {placeholders(len(keys))}"  # noqa: S608
        return {row[0] for row in self._connection.execute(query, list(keys))}

    def reserve(self, wanted: Reservation) -> Granted | Refusal:
        """See the function `reserve`."""
        call, worker, identities, request_id, model, tier, amount, prompt, completion, at = wanted
        chain = self._chains.get(identities) or self._touch(identities)
        if chain[0].revoked:
            return Refusal("revoked", chain[0].account, 0, 0, 0, None)
        second, asked = at // 1000, prompt + completion
        for page in chain:
            if page.ends is not None and not page.period_start <= at < page.ends:
                page.renew(at)
            refusal = page.refusal(wanted, second, asked)
            if refusal is not None:
                return refusal
        # Of each kind, the limit that is nearest.
        requests, requests_left = None, _FAR
        tokens, tokens_left = None, _FAR
        for page in chain:
            page.reserved += amount
            page.under_way += 1
            window = page.window
            if window is not None:
                window.add(second, 1, asked)
                limits = page.limits
                most = limits.requests_per_minute
                if most is not None and (left := most - window.requests) < requests_left:
                    requests, requests_left = most, left
                most = limits.tokens_per_minute
                if most is not None and (left := most - window.tokens) < tokens_left:
                    tokens, tokens_left = most, left
        kinds = self._kept.chains.get(identities)
        if kinds is None:
            kinds = orjson.dumps([(page.account.id, page.account.kind) for page in chain]).decode()
            self._kept.chains[identities] = kinds
        self._made[call] = (call, worker, amount, prompt, completion, kinds, request_id, model, tier, at)
        return Granted(
            chain[0].spent,
            None if requests is None else Rate(requests, requests_left),
            None if tokens is None else Rate(tokens, tokens_left),
        )

    def settle(self, item: Settlement) -> bool:
        """See the function `settle`."""
        row = self._ending.pop(item.call, None) or self._made.pop(item.call, None)
        if row is None:
            return False
        call, _, amount, prompt_bound, completion_bound, chain_text, request_id, model, tier, started_at = row
        spending: Spending = item.spending
        charged = min(spending.total, amount)
        surplus = prompt_bound + completion_bound - spending.prompt - spending.completion
        for part in spending.others:
            surplus -= part.prompt + part.completion
        identities, whose = _chain(chain_text)
        now, second = self._now, started_at // 1000
        for page in self._chains.get(identities) or self._touch(identities):
            if page.ends is not None and not page.period_start <= now < page.ends:
                page.renew(now)
            page.reserved -= amount
            page.under_way -= 1
            page.spent += charged
            if page.window is not None and surplus:
                page.window.add(second, 0, -surplus)
            soft = page.limits.soft_limit
            if soft is not None and page.soft_reached_at is None and page.spent >= soft:
                self._note_soft_limit(page, soft)
        for number, part in enumerate(spending.others, start=1):
            paid = min(part.cost, charged)
            charged -= paid
            self._ledger.append(
                (
                    f"{call}/{number}",
                    request_id,
                    *whose,
                    part.tier,
                    part.backend,
                    model,
                    part.prompt,
                    part.cached,
                    part.completion,
                    int(part.exact),
                    paid,
                    part.cost - paid,
                    spending.outcome,
                    part.status,
                    0,
                    started_at,
                    self._now,
                    part.kind,
                    part.accepted,
                    part.rejected,
                )
            )
        self._ledger.append(
            (
                call,
                request_id,
                *whose,
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
                ANSWER,
                spending.accepted,
                spending.rejected,
            )
        )
        return True

    def _touch(self, identities: tuple[str, ...]) -> list[Page]:
        """The pages of a chain, which are going to be changed."""
        chain = self._chains[identities] = [self._pages[one] for one in identities]
        self._touched.update(zip(identities, chain, strict=True))
        return chain

    def write(self) -> None:
        """Stores everything that changed."""
        connection, touched = self._connection, self._touched
        connection.executemany(
            "UPDATE accounts SET period_start = ?, spent = ?, reserved = ?, soft_reached_at = ?, under_way = ? "
            "WHERE id = ?",
            [
                (page.period_start, page.spent, page.reserved, page.soft_reached_at, page.under_way, identity)
                for identity, page in touched.items()
            ],
        )
        self._write_windows([(identity, page.window) for identity, page in touched.items() if page.window is not None])
        _insert(connection, "reservations", _RESERVATION, list(self._made.values()))
        _insert(connection, "ledger", _LEDGER, self._ledger)
        self._kept.reservations.update(self._made)
        self._kept.written(connection)

    def _write_windows(self, windows: Sequence[tuple[str, Window]]) -> None:
        """Stores what was counted and forgets what is too old."""
        counted = []
        second = self._now // 1000
        for identity, window in windows:
            # Not only what is in the window now: it may be so for a machine whose clock is behind.
            old, ahead = window.drop_outside(second - WINDOW_S - AHEAD_S, second + AHEAD_S)
            if old is not None:
                self._connection.execute("DELETE FROM windows WHERE account = ? AND second <= ?", (identity, old))
            if ahead is not None:
                self._connection.execute("DELETE FROM windows WHERE account = ? AND second >= ?", (identity, ahead))
            counted += [(identity, *row) for row in window.changed()]
        if counted:
            self._connection.executemany(
                "INSERT INTO windows (account, second, requests, tokens) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (account, second) DO UPDATE SET requests = excluded.requests, tokens = excluded.tokens",
                counted,
            )

    def _note_soft_limit(self, page: Page, soft: int) -> None:
        page.soft_reached_at = self._now
        details = {"spent": page.spent, "soft_limit": soft}
        audit.append(self._connection, "gateway", "budget.soft_limit", page.account.id, details)


@functools.lru_cache(maxsize=4096)
def _chain(text: str) -> tuple[tuple[str, ...], tuple[str | None, ...]]:
    """(the accounts of a reservation's chain, what the ledger says of them: key, app, team and organisation)."""
    pairs = orjson.loads(text)
    by_kind = {kind: identity for identity, kind in pairs}
    whose = by_kind["key"], by_kind.get("app"), by_kind.get("team"), by_kind.get("organisation")
    return tuple(identity for identity, _ in pairs), whose


@functools.cache
def _insertion(table: str, columns: str) -> str:
    return f"INSERT INTO {table} ({columns}) VALUES {placeholders(columns.count(',') + 1)}"  # noqa: S608


def _insert(connection: Connection, table: str, columns: str, rows: list[tuple[Any, ...]]) -> None:
    if rows:
        connection.executemany(_insertion(table, columns), rows)
