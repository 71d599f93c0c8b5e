"""Why a request goes where it goes: what the router decided, for headers, logs, the ledger and the dashboard."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """What one criterion had to say.

    Attributes:
        criterion: `complexity`, `cost`, `latency`, `sensitivity`, `context`, `quality`.
        verdict: One short line for people; holds nothing of the prompt's text.
    """

    criterion: str
    verdict: str


@dataclass(frozen=True)
class Decision:
    """The router's choice.

    Attributes:
        tier: The tier chosen.
        candidates: Tiers that were allowed, the chosen one first, then the others in the order of preference.
        refused: Tiers that were not, with the reason.
        reasons: One for each criterion that mattered.
        cost: Expected cost there in micro-cents.
        escalation: The tier that takes over when the answer is not confident enough; None: none.
    """

    tier: str
    candidates: tuple[str, ...]
    refused: tuple[tuple[str, str], ...]
    reasons: tuple[Reason, ...]
    cost: int
    escalation: str | None = None
