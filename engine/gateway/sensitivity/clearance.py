"""What a request may do with what was found in it: the verdict of the policy, and the only way to narrow its routes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenmill.engine.gateway.body import Body
from tokenmill.engine.gateway.pipeline import Exchange
from tokenmill.engine.gateway.portfolio import Route, Target
from tokenmill.engine.gateway.sensitivity.redaction import Redaction
from tokenmill.engine.gateway.sensitivity.settings import Action

#: Where a request's clearance stands in `Exchange.notes`.
NOTE = "sensitivity"


@dataclass(frozen=True)
class Clearance:
    """The verdict on one request.

    Attributes:
        kinds: How often each kind of data was found.
        action: The strictest that any of them asks for.
        zones: Zones that may see the request; None: all.
        regions: Regions that may; None: all.
        redaction: The placeholders, where the action is `redact`.
        hidden: The request's body with them.
        why: One line for people, without any of the data.
        headers: Names of headers that hold something: for trusted zones only, which they do not keep the request to.
    """

    kinds: Mapping[str, int] = field(default_factory=dict)
    action: Action = "allow"
    zones: frozenset[str] | None = None
    regions: frozenset[str] | None = None
    redaction: Redaction | None = field(default=None, repr=False)
    hidden: Body | None = field(default=None, repr=False)
    why: str = "nothing sensitive found"
    headers: frozenset[bytes] = frozenset()

    def admits(self, target: Target) -> bool:
        """Whether this backend may see the request."""
        backend = target.backend
        in_zone = self.zones is None or backend.zone in self.zones
        return in_zone and (self.regions is None or backend.region in self.regions)

    def narrow(self, routes: Sequence[Route]) -> tuple[Route, ...]:
        """The routes without the backends that may not see the request; routes that lose all of them are dropped."""
        if self.zones is None and self.regions is None:
            return tuple(routes)
        narrowed = []
        for route in routes:
            kept = tuple(target for target in route.targets if self.admits(target))
            if kept:
                narrowed.append(route if len(kept) == len(route.targets) else route.only(kept))
        return tuple(narrowed)

    def described(self) -> dict[str, Any]:
        """For the audit trail and the dry run: kinds and verdict, never the data."""
        return {
            "action": self.action,
            "kinds": dict(self.kinds),
            "zones": None if self.zones is None else sorted(self.zones),
            "regions": None if self.regions is None else sorted(self.regions),
            "why": self.why,
            **({"headers": sorted(name.decode("latin-1") for name in self.headers)} if self.headers else {}),
        }


#: That of a request which nobody has to search.
ANYWHERE = Clearance()


def clearance_of(exchange: Exchange) -> Clearance | None:
    """The request's clearance; None where no policy looked at it."""
    return exchange.notes.get(NOTE)
