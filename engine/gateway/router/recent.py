"""The last routing decisions, for the dashboard: what was decided, why, and how it ended. No text of any request."""

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from tokenmill.engine.gateway.decision import Decision
from tokenmill.engine.gateway.pipeline import Exchange


@dataclass(frozen=True)
class Recent:
    """One decision.

    Attributes:
        at: Seconds since 1970.
        request_id: The request's id.
        model: What it asked for.
        decision: What was decided.
        backend: Who answered; None: nobody.
        tier: That backend's tier, after failover and escalation.
        status: HTTP status of the answer; 0: the client hung up before.
        outcome: How the request ended.
        confidence: Of the first tier's answer where it was judged.
        escalated: Another tier took over.
    """

    at: float
    request_id: str
    model: str | None
    decision: Decision
    backend: str | None
    tier: str | None
    status: int
    outcome: str
    confidence: float | None
    escalated: bool


class RecentDecisions:
    """A ring of them.

    Args:
        size: How many are kept.
    """

    def __init__(self, size: int) -> None:
        self._ring: deque[Recent] = deque(maxlen=size)

    def add(self, exchange: Exchange) -> None:
        """Takes in a request that has ended."""
        if exchange.decision is None:
            return
        target = exchange.target
        judged: dict[str, Any] = exchange.notes.get("escalation") or {}
        self._ring.append(
            Recent(
                time.time(),
                exchange.request_id,
                exchange.model,
                exchange.decision,
                target.backend.name if target else None,
                target.backend.tier if target else None,
                exchange.status,
                exchange.outcome,
                judged.get("confidence"),
                bool(judged.get("escalated")),
            )
        )

    def latest(self, count: int | None = None) -> list[Recent]:
        """The newest first; all that are kept, or so many."""
        newest = list(reversed(self._ring))
        return newest if count is None else newest[:count]
