"""Everything that the dashboard shows, collected: the ledger of all gateways, the metrics of this one's workers."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenmill.engine.gateway.admin import books, canaries, rollup
from tokenmill.engine.gateway.admin.books import Minute
from tokenmill.engine.gateway.database import Connection, now_ms
from tokenmill.engine.gateway.governance import accounts
from tokenmill.engine.gateway.governance.accounts import Account
from tokenmill.engine.gateway.governance.service import Governance
from tokenmill.engine.gateway.metrics import Metrics
from tokenmill.engine.gateway.observability.engines import Engine, Engines
from tokenmill.engine.gateway.observability.gpus import Gpu, gpus
from tokenmill.engine.gateway.observability.quantiles import quantiles
from tokenmill.engine.gateway.observability.shared import Seen
from tokenmill.engine.gateway.observability.snapshot import Family, total
from tokenmill.engine.gateway.portfolio import NOT_PROBED

HOUR_MS = 3_600_000
#: Spans that can be chosen for the sums: what stands in the address, and its length.
SPANS = {"1h": HOUR_MS, "24h": 24 * HOUR_MS, "7d": 7 * 24 * HOUR_MS, "30d": 30 * 24 * HOUR_MS}
#: Minutes in the charts.
MINUTES = 60
#: Rows of each table of sums.
ROWS = 12
#: Rows of the table of budgets, the fullest: there may be thousands, and each takes as long to write as a request.
BUDGETS = 50
DECISIONS = 15
_SHARES = (0.5, 0.95, 0.99)


@dataclass(frozen=True)
class Latency:
    """Seconds at the 50th, 95th and 99th percentile; empty where nothing is known."""

    tier: str
    whole: list[float | None]
    first_token: list[float]
    per_token: list[float]


@dataclass(frozen=True)
class Figures:
    """The page's content."""

    at: int
    span: str
    minutes: list[Minute]
    total: dict[str, Any]
    by_tier: list[dict[str, Any]]
    by_team: list[dict[str, Any]]
    by_app: list[dict[str, Any]]
    latencies: list[Latency]
    budgets: list[Account]
    budgets_in_all: int
    backends: list[dict[str, Any]]
    decisions: list[dict[str, Any]]
    open_requests: int
    workers: int
    escalations: int
    engines: list[Engine]
    gpus: list[Gpu] | None


@dataclass(frozen=True)
class Sources:
    """Where figures come from."""

    governance: Governance
    metrics: Metrics
    engines: Engines


async def collect(sources: Sources, span: str) -> Figures:
    """The figures of now; reading happens in threads, requests to models go on."""

    def read(connection: Connection) -> tuple[dict[str, Any], list[Seen]]:
        return _from_books(connection, span), sources.metrics.board.everybody()

    (found, seen), asked, cards = await asyncio.gather(
        sources.governance.long_reads.run(read), sources.engines.now(), asyncio.to_thread(gpus)
    )
    families = total([one.report.families for one in seen], [one.lives for one in seen])
    whole: dict[str, list[int]] = found.pop("whole")
    backends = _backends([one for one in seen if one.lives], found.pop("shares"))
    return Figures(
        **found,
        span=span,
        latencies=_latencies(whole, families),
        backends=backends,
        decisions=sorted((d for one in seen for d in one.report.decisions), key=lambda d: -d["at"])[:DECISIONS],
        open_requests=int(_sum(families, "tokenmill_open_requests")),
        workers=sum(one.lives for one in seen),
        escalations=int(_sum(families, "tokenmill_escalations")),
        engines=asked.engines,
        gpus=cards,
    )


def _from_books(connection: Connection, span: str) -> dict[str, Any]:
    now = now_ms()
    since = now - SPANS[span]
    limited = [
        account
        for account in accounts.every(connection)
        if account.limits.hard_limit is not None or account.limits.soft_limit is not None
    ]
    return {
        "at": now,
        "minutes": books.minutes(connection, MINUTES, now),
        "total": rollup.sums(connection, None, since)[0],
        "by_tier": rollup.sums(connection, "tier", since)[:ROWS],
        "by_team": rollup.sums(connection, "team", since)[:ROWS],
        "by_app": rollup.sums(connection, "app", since)[:ROWS],
        "budgets": sorted(limited, key=lambda account: -used_share(account, now))[:BUDGETS],
        "budgets_in_all": len(limited),
        "shares": canaries.shares(connection),
        "whole": books.latencies(connection, now - HOUR_MS),
    }


def used_share(account: Account, now: int) -> float:
    """What is spent of an account's budget in the period of now, 1 for all of it; a budget of nothing is used up."""
    limits = account.limits
    most = limits.hard_limit if limits.hard_limit is not None else limits.soft_limit
    spent = 0 if account.renewed(now) else account.spent
    return spent / most if most else 1.0


def _latencies(whole: dict[str, list[int]], families: Sequence[Family]) -> list[Latency]:
    first = quantiles(families, "tokenmill_time_to_first_token_seconds", "tier", _SHARES)
    per_token = quantiles(families, "tokenmill_time_per_output_token_seconds", "tier", _SHARES)
    found = []
    for tier in dict.fromkeys([*whole, *first, *per_token]):
        times = [books.percentile(whole.get(tier, ()), share) for share in _SHARES]
        seconds = [None if time is None else time / 1000 for time in times]
        found.append(Latency(tier, seconds, first.get(tier, []), per_token.get(tier, [])))
    return found


def _backends(seen: Sequence[Seen], shares: dict[str, float | None]) -> list[dict[str, Any]]:
    """The backends, up when any worker reaches them; what is open adds up. Who has not looked yet says nothing."""
    merged: dict[str, dict[str, Any]] = {}
    for one in seen:
        for state in one.report.backends:
            known = merged.setdefault(state["name"], {**state, "outstanding": 0, "open_circuits": []})
            known["outstanding"] += state["outstanding"]
            known["open_circuits"] = sorted({*known["open_circuits"], *state["open_circuits"]})
            if state["up"]:
                known["up"], known["reason"] = True, ""
            elif not known["up"] and known["reason"] == NOT_PROBED:
                known["reason"] = state["reason"]
    for name, share in shares.items():
        if name in merged:
            merged[name]["canary"] = share
    return list(merged.values())


def _sum(families: Sequence[Family], name: str) -> float:
    return sum(number for family in families if family.name == name for _, (number,) in family.series)
