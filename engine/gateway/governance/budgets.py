"""Budgets and rate limits: reserved before a request is sent, settled when it has ended, never overspent.

A reservation holds the most that a request can cost on every account of its key's chain, in the transaction that
checks the limits, so requests at the same time, in whichever process, cannot pass a limit together. Settling removes
the reservation, charges the true cost and writes the ledger's row in one transaction: once or not at all. The
reservations of a process that died are settled at their full amount: nobody knows how far their requests came.
"""

import fcntl
import os
import sqlite3
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import orjson

from tokenmill.engine.gateway.governance import accounts, audit
from tokenmill.engine.gateway.governance.accounts import Account
from tokenmill.engine.gateway.store import Store, now_ms

#: Length of the sliding window of rate limits, in seconds.
WINDOW_S = 60


@dataclass(frozen=True)
class Reservation:
    """The most that one request can use.

    Attributes:
        call: Unique id of the request.
        worker: The process that serves it.
        key: The key's account.
        request_id: The client's name for it, for people.
        model, tier: What it asks for.
        amount: Micro-cents.
        prompt, completion: Tokens.
        at: When, in milliseconds.
    """

    call: str
    worker: str
    key: str
    request_id: str
    model: str
    tier: str
    amount: int
    prompt: int
    completion: int
    at: int


@dataclass(frozen=True)
class Spending:
    """What one request used in the end; tokens, micro-cents."""

    backend: str
    prompt: int
    cached: int
    completion: int
    exact: bool
    cost: int
    outcome: str
    status: int
    attempts: int


@dataclass(frozen=True)
class Refusal:
    """Why a request may not be served now.

    Attributes:
        limit: Which limit.
        account: Whose.
        allowed: The limit, in its unit.
        used: What counts against it already.
        asked: What the request would add at most.
        retry_ms: When it may be tried again, in milliseconds from now; None: not by waiting.
    """

    limit: Literal["budget", "requests", "tokens"]
    account: Account
    allowed: int
    used: int
    asked: int
    retry_ms: int | None


def reserve(connection: sqlite3.Connection, wanted: Reservation) -> Refusal | None:
    """Reserves on every account of the chain, or on none and says why. Run it in the store's writer."""
    chain = [accounts.renew(connection, account, wanted.at) for account in accounts.chain(connection, wanted.key)]
    for account in chain:
        refusal = _refusal(connection, account, wanted)
        if refusal is not None:
            return refusal
    second = wanted.at // 1000
    for account in chain:
        connection.execute("UPDATE accounts SET reserved = reserved + ? WHERE id = ?", (wanted.amount, account.id))
        if _has_rates(account):
            connection.execute("DELETE FROM windows WHERE account = ? AND second < ?", (account.id, second - WINDOW_S))
            connection.execute(
                "INSERT INTO windows (account, second, requests, tokens) VALUES (?, ?, 1, ?) ON CONFLICT "
                "(account, second) DO UPDATE SET requests = windows.requests + 1, "
                "tokens = windows.tokens + excluded.tokens",
                (account.id, second, wanted.prompt + wanted.completion),
            )
    connection.execute(
        "INSERT INTO reservations (call, worker, amount, prompt_bound, completion_bound, chain, request_id, model, "
        "tier, started_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            wanted.call,
            wanted.worker,
            wanted.amount,
            wanted.prompt,
            wanted.completion,
            orjson.dumps([(account.id, account.kind) for account in chain]).decode(),
            wanted.request_id,
            wanted.model,
            wanted.tier,
            wanted.at,
        ),
    )
    return None


def settle(connection: sqlite3.Connection, call: str, spending: Spending) -> bool:
    """Charges a request that has ended and frees its reservation; False when that was done before."""
    row = connection.execute(
        "SELECT amount, prompt_bound, completion_bound, chain, request_id, model, tier, started_at "
        "FROM reservations WHERE call = ?",
        (call,),
    ).fetchone()
    if row is None:
        return False
    amount, prompt_bound, completion_bound, chain_text, request_id, model, tier, started_at = row
    connection.execute("DELETE FROM reservations WHERE call = ?", (call,))
    chain: Sequence[tuple[str, str]] = orjson.loads(chain_text)
    now = now_ms()
    surplus = prompt_bound + completion_bound - spending.prompt - spending.completion
    for identity, _ in chain:
        accounts.renew(connection, accounts.find(connection, identity), now)
        connection.execute(
            "UPDATE accounts SET reserved = reserved - ?, spent = spent + ? WHERE id = ?",
            (amount, spending.cost, identity),
        )
        connection.execute(
            "UPDATE windows SET tokens = tokens - ? WHERE account = ? AND second = ?",
            (surplus, identity, started_at // 1000),
        )
        _note_soft_limit(connection, accounts.find(connection, identity), now)
    by_kind = {kind: identity for identity, kind in chain}
    connection.execute(
        "INSERT INTO ledger (call, request_id, key_id, app, team, organisation, tier, backend, model, prompt_tokens, "
        "cached_tokens, completion_tokens, exact, cost, outcome, status, attempts, started_at, ended_at) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            call,
            request_id,
            by_kind["key"],
            by_kind.get("app"),
            by_kind.get("team"),
            by_kind.get("organisation"),
            tier,
            spending.backend,
            model,
            spending.prompt,
            spending.cached,
            spending.completion,
            int(spending.exact),
            spending.cost,
            spending.outcome,
            spending.status,
            spending.attempts,
            started_at,
            now,
        ),
    )
    return True


class WorkerLock:
    """Proof that this process lives: a lock on a file of its own, which the kernel frees when the process dies.

    Args:
        store: The store.
    """

    def __init__(self, store: Store) -> None:
        self.id = uuid.uuid4().hex
        self._store = store
        folder = _lock_folder(store)
        folder.mkdir(mode=0o700, exist_ok=True)
        self._path = folder / self.id
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        # Locked before anybody can read of it.
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        store.write_now(
            lambda connection: connection.execute(
                "INSERT INTO workers (id, started_at) VALUES (?, ?)", (self.id, now_ms())
            )
        )

    def close(self) -> None:
        """Leaves; what is still reserved is settled by whoever comes next."""
        os.close(self._descriptor)


def recover(store: Store) -> int:
    """Settles what dead processes had reserved, at its full amount; returns for how many requests."""
    settled = 0
    for (worker,) in store.reader.execute("SELECT id FROM workers").fetchall():
        path = _lock_folder(store) / worker
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            descriptor = -1  # another process is at it, and may die before it is done
        else:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                continue
        settled += store.write_now(partial(_bury, worker=worker))
        with suppress(FileNotFoundError):
            path.unlink()
        if descriptor >= 0:
            os.close(descriptor)
    return settled


def _bury(connection: sqlite3.Connection, worker: str) -> int:
    rows: list[Any] = connection.execute(
        "SELECT call, prompt_bound, completion_bound, amount FROM reservations WHERE worker = ?", (worker,)
    ).fetchall()
    for call, prompt, completion, amount in rows:
        settle(connection, call, Spending("", prompt, 0, completion, False, amount, "lost", 0, 0))
    connection.execute("DELETE FROM workers WHERE id = ?", (worker,))
    if rows:
        audit.append(connection, "gateway", "worker.lost", worker, {"requests": len(rows)})
    return len(rows)


def _lock_folder(store: Store) -> Path:
    return store.path.with_name(store.path.name + ".workers")


def _has_rates(account: Account) -> bool:
    limits = account.limits
    return limits.requests_per_minute is not None or limits.tokens_per_minute is not None


def _refusal(connection: sqlite3.Connection, account: Account, wanted: Reservation) -> Refusal | None:
    limits = account.limits
    if limits.hard_limit is not None and account.spent + account.reserved + wanted.amount > limits.hard_limit:
        end = account.period_end
        wait = None if end is None else end - wanted.at
        return Refusal("budget", account, limits.hard_limit, account.spent + account.reserved, wanted.amount, wait)
    if not _has_rates(account):
        return None
    # Whole seconds: the oldest is counted until all of it is outside of the window.
    since = wanted.at // 1000 - WINDOW_S
    oldest, requests, tokens = connection.execute(
        "SELECT min(second), coalesce(sum(requests), 0), coalesce(sum(tokens), 0) FROM windows "
        "WHERE account = ? AND second >= ?",
        (account.id, since),
    ).fetchone()
    wait = WINDOW_S * 1000 if oldest is None else (oldest + WINDOW_S + 1) * 1000 - wanted.at
    if limits.requests_per_minute is not None and requests + 1 > limits.requests_per_minute:
        return Refusal("requests", account, limits.requests_per_minute, requests, 1, wait)
    asked = wanted.prompt + wanted.completion
    if limits.tokens_per_minute is not None and tokens + asked > limits.tokens_per_minute:
        possible = asked <= limits.tokens_per_minute
        return Refusal("tokens", account, limits.tokens_per_minute, tokens, asked, wait if possible else None)
    return None


def _note_soft_limit(connection: sqlite3.Connection, account: Account, now: int) -> None:
    soft = account.limits.soft_limit
    if soft is not None and account.soft_reached_at is None and account.spent >= soft:
        connection.execute("UPDATE accounts SET soft_reached_at = ? WHERE id = ?", (now, account.id))
        audit.append(
            connection, "gateway", "budget.soft_limit", account.id, {"spent": account.spent, "soft_limit": soft}
        )
