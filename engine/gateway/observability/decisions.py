"""The last routing decisions of a worker, for people: where each request went, and why. No text of any prompt."""

import time
from collections import deque
from typing import Any

from tokenmill.engine.gateway.pipeline import Exchange
from tokenmill.engine.gateway.store import now_ms

#: Where `router.escalation` notes what became of a request.
ESCALATION = "escalation"
#: Decisions kept.
KEPT = 50


class Decisions:
    """A ring; `note` belongs into `on_end`."""

    def __init__(self) -> None:
        self._ring: deque[dict[str, Any]] = deque(maxlen=KEPT)

    def note(self, exchange: Exchange) -> None:
        """Remembers a request that has ended, if it was routed."""
        if exchange.decision is not None:
            # At once, not when somebody looks: neither prompt nor key need live as long as the ring.
            self._ring.append(_described(now_ms(), time.perf_counter() - exchange.started, exchange))

    def latest(self) -> list[dict[str, Any]]:
        """The ring, the latest last."""
        return list(self._ring)


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
    """Whether the answer is that of the tier which takes over from one that is not sure."""
    return bool((exchange.notes.get(ESCALATION) or {}).get("escalated"))
