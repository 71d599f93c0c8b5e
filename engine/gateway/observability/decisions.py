"""The last routing decisions of a worker, for people: where each request went, and why. No text of any prompt."""

import time
from collections import deque
from typing import Any

from tokenmill.engine.gateway.pipeline import Exchange
from tokenmill.engine.gateway.store import now_ms

#: Decisions kept.
KEPT = 50


class Decisions:
    """A ring; `note` belongs into `on_end`."""

    def __init__(self) -> None:
        self._ring: deque[tuple[int, float, Exchange]] = deque(maxlen=KEPT)

    def note(self, exchange: Exchange) -> None:
        """Remembers a request that has ended, if it was routed."""
        if exchange.decision is not None:
            elapsed = time.perf_counter() - exchange.started
            exchange.payload = b""  # the prompt need not live as long as the ring
            exchange.body = None
            self._ring.append((now_ms(), elapsed, exchange))

    def latest(self) -> list[dict[str, Any]]:
        """The ring, the latest last."""
        return [_described(*entry) for entry in list(self._ring)]


def _described(at: int, elapsed: float, exchange: Exchange) -> dict[str, Any]:
    decision, principal, target = exchange.decision, exchange.principal, exchange.target
    assert decision is not None
    return {
        "at": at,
        "request": exchange.request_id[:128],
        "asked": (exchange.model or "")[:100],
        "team": (principal.team or "") if principal else "",
        "app": (principal.app or "") if principal else "",
        "tier": decision.tier,
        "backend": target.backend.name if target else "",
        "escalated": was_escalated(exchange),
        "status": exchange.status,
        "seconds": elapsed,
        "reasons": [f"{reason.criterion}: {reason.verdict}" for reason in decision.reasons],
        "refused": [f"{tier}: {reason}" for tier, reason in decision.refused],
    }


def was_escalated(exchange: Exchange) -> bool:
    """Whether the tier that answers in the end is the one that the router kept for doubtful answers."""
    decision, calls = exchange.decision, exchange.calls
    return (
        decision is not None
        and decision.escalation is not None
        and len(calls) > 1
        and calls[-1].target.backend.tier == decision.escalation
        and calls[0].target.backend.tier != decision.escalation
    )
