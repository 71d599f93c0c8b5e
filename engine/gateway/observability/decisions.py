"""The last routing decisions of a worker, for people: where each request went, and why. No text of any prompt."""

from collections import deque
from typing import Any, NamedTuple

from tokenmill.engine.gateway.database import now_ms
from tokenmill.engine.gateway.decision import Decision
from tokenmill.engine.gateway.pipeline import Exchange

#: Where `router.escalation` notes what became of a request.
ESCALATION = "escalation"
#: Decisions kept.
KEPT = 50


class _Noted(NamedTuple):
    """What is kept of a request: neither its prompt nor its key, which need not live as long as the ring."""

    at: int
    elapsed: float
    request: str
    asked: str
    team: str
    app: str
    decision: Decision
    backend: str
    escalated: bool
    status: int


class Decisions:
    """A ring; `note` belongs into `on_end`."""

    def __init__(self) -> None:
        self._ring: deque[_Noted] = deque(maxlen=KEPT)

    def note(self, exchange: Exchange) -> None:
        """Remembers a request that has ended, if it was routed."""
        decision, principal, target = exchange.decision, exchange.principal, exchange.target
        if decision is not None:
            self._ring.append(
                _Noted(
                    now_ms(),
                    exchange.seconds,
                    exchange.request_id[:128],
                    (exchange.model or "")[:100],
                    (principal.team or "") if principal else "",
                    (principal.app or "") if principal else "",
                    decision,
                    target.backend.name if target else "",
                    was_escalated(exchange),
                    exchange.status,
                )
            )

    def latest(self) -> list[dict[str, Any]]:
        """The ring, the latest last."""
        return [_described(noted) for noted in list(self._ring)]


def _described(noted: _Noted) -> dict[str, Any]:
    decision = noted.decision
    return {
        "at": noted.at,
        "request": noted.request,
        "asked": noted.asked,
        "team": noted.team,
        "app": noted.app,
        "tier": decision.tier,
        "backend": noted.backend,
        "escalated": noted.escalated,
        "status": noted.status,
        "seconds": noted.elapsed,
        "reasons": [f"{reason.criterion}: {reason.verdict}" for reason in decision.reasons],
        "refused": [f"{tier}: {reason}" for tier, reason in decision.refused],
    }


def was_escalated(exchange: Exchange) -> bool:
    """Whether the answer is that of the tier which takes over from one that is not sure."""
    judged = exchange.notes.get(ESCALATION)
    return bool(judged and judged.get("escalated"))
