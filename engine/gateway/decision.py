"""Why a request goes where it goes: what the router decided, for headers, logs, the ledger and the dashboard."""

import msgspec


class Reason(msgspec.Struct, frozen=True):
    """What one criterion had to say.

    Attributes:
        criterion: `complexity`, `cost`, `latency`, `sensitivity`, `context`, `quality`.
        verdict: One short line for people; holds nothing of the prompt's text.
    """

    criterion: str
    verdict: str


class Decision(msgspec.Struct, frozen=True):
    """The router's choice.

    Attributes:
        tier: The tier chosen.
        candidates: Tiers that were allowed, the chosen one first, then the others in the order of preference.
        refused: Tiers that were not, with the reason.
        reasons: One for each criterion that mattered.
        costs: Expected cost at each of the candidates in micro-cents.
        escalation: The tier that takes over when the answer is not confident enough; None: none.
    """

    tier: str
    candidates: tuple[str, ...]
    refused: tuple[tuple[str, str], ...]
    reasons: tuple[Reason, ...]
    costs: tuple[int, ...]
    escalation: str | None = None

    @property
    def cost(self) -> int:
        """Expected cost at the tier chosen, in micro-cents."""
        return self.costs[0]
