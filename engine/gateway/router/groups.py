"""What does not change about some of a tier's backends: worked out once, for the same few come back with every request.

Which backends a request can go to differs from request to request; there are as many groups of them as policies,
capabilities and lengths tell apart.
"""

from collections.abc import Iterable, Mapping, Sequence

from tokenmill.engine.gateway.portfolio import Portfolio, Route, Target

#: The nearest first.
ZONES = ("on-premises", "edge", "cloud")
#: Groups that are kept.
MOST_KNOWN = 1000


class Group:
    """Some backends of a tier, or of a model.

    Args:
        targets: At least one.
        why: `Route.why` of `route`.

    Attributes:
        targets: The backends.
        stable: Those that are no canaries.
        canaries: Canaries that get any requests.
        zones: The stable ones, parted by zone, the nearest first; where there are none, all.
        quality: Share of requests that each of them answers well; 0 where one does not say.
        route: The way to them for a request that names no model, the nearest zone first.
    """

    __slots__ = ("_prices", "canaries", "quality", "route", "stable", "targets", "zones")

    def __init__(self, targets: tuple[Target, ...], why: str) -> None:
        self.targets = targets
        self.quality = min(target.backend.quality or 0.0 for target in targets)
        self.stable = tuple(target for target in targets if target.canary is None)
        self.canaries = tuple(target for target in targets if target.canary)
        asked = self.stable or targets
        parted = [tuple(target for target in asked if target.backend.zone == zone) for zone in ZONES]
        parted = [zone for zone in parted if zone]
        self.zones: Sequence[Group] = (self,) if parted == [targets] else tuple(Group(zone, why) for zone in parted)
        route = Route(targets, None, why)
        self.route = self.way(route, parted) if self.stable else route
        # Backends of a tier mostly cost the same.
        self._prices = tuple({target.backend.prices for target in targets})

    def way(self, route: Route, parts: Iterable[tuple[Target, ...]]) -> Route:
        """A route by these parts of its stable backends, one after the other, and its canaries."""
        parts = tuple(parts)
        targets = tuple([target for part in parts for target in part]) + self.canaries
        return Route(targets, route.model, route.why, route.after, parts)

    def cost(self, prompt: int, completion: int) -> int:
        """What so many tokens cost at the cheapest of them, in micro-cents."""
        prices = self._prices
        if len(prices) == 1:
            return prices[0].cost(prompt, 0, completion)
        return min(one.cost(prompt, 0, completion) for one in prices)


class Groups:
    """The groups that were asked for.

    Args:
        portfolio: Whose backends they are; when it is indexed anew, nothing of the old ones is kept.
        why: `Route.why` of their routes.
    """

    def __init__(self, portfolio: Portfolio, why: str) -> None:
        self._portfolio = portfolio
        self._why = why
        self._tiers: Mapping[str, tuple[Target, ...]] = portfolio.tiers
        self._known: dict[tuple[Target, ...], Group] = {}

    def of(self, targets: tuple[Target, ...]) -> Group:
        """The group of these backends; at least one."""
        if self._tiers is not self._portfolio.tiers or len(self._known) > MOST_KNOWN:
            self._tiers, self._known = self._portfolio.tiers, {}
        group = self._known.get(targets)
        if group is None:
            group = self._known[targets] = Group(targets, self._why)
        return group
