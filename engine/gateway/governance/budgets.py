"""Budgets and rate limits: reserved before a request is sent, settled when it has ended, never overspent.

A reservation holds the most that a request can cost on every account of its key's chain, in the transaction that
checks the limits, so requests at the same time, in whichever process, cannot pass a limit together. Settling removes
the reservation, charges the true cost and writes the ledger's row in one transaction: once or not at all. Nobody is
charged more than was reserved. The reservations of a process that died are settled at their full amount: nobody knows
how far their requests came.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import orjson

from tokenmill.engine.gateway.governance import accounts, audit
from tokenmill.engine.gateway.governance.accounts import Account, placeholders
from tokenmill.engine.gateway.store import Connection, now_ms

#: Length of the sliding window of rate limits, in seconds.
WINDOW_S = 60


@dataclass(frozen=True)
class Reservation:
    """The most that one request can use.

    Attributes:
        call: Unique id of the request.
        worker: The process that serves it.
        chain: Ids of the key's account and of all above it, the key's first.
        request_id: The client's name for it, for people.
        model, tier: What it asks for.
        amount: Micro-cents.
        prompt, completion: Tokens.
        at: When, in milliseconds.
    """

    call: str
    worker: str
    chain: tuple[str, ...]
    request_id: str
    model: str
    tier: str
    amount: int
    prompt: int
    completion: int
    at: int


@dataclass(frozen=True)
class Spending:
    """What one request used in the end; tokens, micro-cents.

    Attributes:
        backend, tier: Who answered; empty: nobody, or nobody knows.
        exact: The backend counted the tokens.
        cost: What it cost; charged up to the amount reserved.
    """

    backend: str
    tier: str
    prompt: int
    cached: int
    completion: int
    exact: bool
    cost: int
    outcome: str
    status: int
    attempts: int


@dataclass(frozen=True)
class Rate:
    """The tightest limit per minute of a chain, with the request just reserved counted."""

    limit: int
    remaining: int


@dataclass(frozen=True)
class Granted:
    """A reservation that was made.

    Attributes:
        spent: Micro-cents of the key's period so far.
        requests, tokens: Where the chain stands; None: no limit.
    """

    spent: int
    requests: Rate | None
    tokens: Rate | None


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


def reserve(connection: Connection, wanted: Reservation) -> Granted | Refusal:
    """Reserves on every account of the chain, or on none and says why. Run it in the store's writer."""
    chain = [accounts.renew(connection, one, wanted.at) for one in accounts.several(connection, wanted.chain)]
    asked = wanted.prompt + wanted.completion
    requests: Rate | None = None
    tokens: Rate | None = None
    for account in chain:
        limits = account.limits
        refusal = _over_budget(account, wanted)
        if refusal is None and _has_rates(account):
            window = _window(connection, account, wanted)
            refusal = window.refusal(account, asked)
            requests = _tighter(requests, limits.requests_per_minute, window.requests + 1)
            tokens = _tighter(tokens, limits.tokens_per_minute, window.tokens + asked)
        if refusal is not None:
            return refusal
    connection.execute(
        f"UPDATE accounts SET reserved = reserved + ? WHERE id IN {placeholders(len(chain))}",  # noqa: S608
        (wanted.amount, *wanted.chain),
    )
    for account in chain:
        if _has_rates(account):
            _count(connection, account, wanted.at // 1000, asked)
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
    return Granted(chain[0].spent, requests, tokens)


def settle(connection: Connection, call: str, spending: Spending) -> bool:
    """Charges a request that has ended and frees its reservation; False when that was done before."""
    rows = connection.execute(
        "DELETE FROM reservations WHERE call = ? "
        "RETURNING amount, prompt_bound, completion_bound, chain, request_id, model, tier, started_at",
        (call,),
    ).fetchall()
    if not rows:
        return False
    amount, prompt_bound, completion_bound, chain_text, request_id, model, tier, started_at = rows[0]
    chain: Sequence[tuple[str, str]] = orjson.loads(chain_text)
    now = now_ms()
    charged = min(spending.cost, amount)
    identities = [identity for identity, _ in chain]
    before = [accounts.renew(connection, one, now) for one in accounts.several(connection, identities)]
    connection.execute(
        "UPDATE accounts SET reserved = reserved - ?, spent = spent + ? "  # noqa: S608
        f"WHERE id IN {placeholders(len(identities))}",
        (amount, charged, *identities),
    )
    surplus = prompt_bound + completion_bound - spending.prompt - spending.completion
    for account in before:
        if surplus and _has_rates(account):
            connection.execute(
                "UPDATE windows SET tokens = tokens - ? WHERE account = ? AND second = ?",
                (surplus, account.id, started_at // 1000),
            )
        _note_soft_limit(connection, account, account.spent + charged, now)
    by_kind = {kind: identity for identity, kind in chain}
    connection.execute(
        "INSERT INTO ledger (call, request_id, key_id, app, team, organisation, tier, backend, model, prompt_tokens, "
        "cached_tokens, completion_tokens, exact, cost, excess, outcome, status, attempts, started_at, ended_at) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
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
            now,
        ),
    )
    return True


@dataclass(frozen=True)
class _Window:
    """What an account used in the last minute, and when some of that is forgotten, in milliseconds from now."""

    requests: int
    tokens: int
    wait_ms: int

    def refusal(self, account: Account, asked: int) -> Refusal | None:
        """Why one more request of so many tokens is too much; None when it is not."""
        limits = account.limits
        most = limits.requests_per_minute
        if most is not None and self.requests + 1 > most:
            return Refusal("requests", account, most, self.requests, 1, self.wait_ms)
        most = limits.tokens_per_minute
        if most is not None and self.tokens + asked > most:
            wait = self.wait_ms if asked <= most else None
            return Refusal("tokens", account, most, self.tokens, asked, wait)
        return None


def _window(connection: Connection, account: Account, wanted: Reservation) -> _Window:
    # Whole seconds: the oldest is counted until all of it is outside of the window.
    since = wanted.at // 1000 - WINDOW_S
    oldest, requests, tokens = connection.execute(
        "SELECT min(second), CAST(coalesce(sum(requests), 0) AS BIGINT), CAST(coalesce(sum(tokens), 0) AS BIGINT) "
        "FROM windows WHERE account = ? AND second >= ?",
        (account.id, since),
    ).fetchone()
    wait = WINDOW_S * 1000 if oldest is None else (oldest + WINDOW_S + 1) * 1000 - wanted.at
    return _Window(requests, tokens, wait)


def _count(connection: Connection, account: Account, second: int, tokens: int) -> None:
    connection.execute("DELETE FROM windows WHERE account = ? AND second < ?", (account.id, second - WINDOW_S))
    connection.execute(
        "INSERT INTO windows (account, second, requests, tokens) VALUES (?, ?, 1, ?) ON CONFLICT (account, second) "
        "DO UPDATE SET requests = windows.requests + 1, tokens = windows.tokens + excluded.tokens",
        (account.id, second, tokens),
    )


def _tighter(known: Rate | None, limit: int | None, used: int) -> Rate | None:
    if limit is None or (known is not None and known.remaining <= limit - used):
        return known
    return Rate(limit, limit - used)


def _has_rates(account: Account) -> bool:
    limits = account.limits
    return limits.requests_per_minute is not None or limits.tokens_per_minute is not None


def _over_budget(account: Account, wanted: Reservation) -> Refusal | None:
    most = account.limits.hard_limit
    if most is None or account.spent + account.reserved + wanted.amount <= most:
        return None
    end = account.period_end
    wait = None if end is None else end - wanted.at
    return Refusal("budget", account, most, account.spent + account.reserved, wanted.amount, wait)


def _note_soft_limit(connection: Connection, account: Account, spent: int, now: int) -> None:
    soft = account.limits.soft_limit
    if soft is not None and account.soft_reached_at is None and spent >= soft:
        connection.execute("UPDATE accounts SET soft_reached_at = ? WHERE id = ?", (now, account.id))
        audit.append(connection, "gateway", "budget.soft_limit", account.id, {"spent": spent, "soft_limit": soft})
