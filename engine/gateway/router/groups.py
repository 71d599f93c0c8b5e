"""What does not change about some of a tier's backends: worked out once, for the same few come back with every request.

Which backends a request can go to differs from request to request; there are as many groups of them as policies,
capabilities and lengths tell apart.
"""

from collections.abc import Iterable, Mapping, Sequence

from tokenmill.engine.gateway.portfolio import Portfolio, Route, Target, listed
from tokenmill.engine.gateway.principal import Principal

#: The nearest first.
ZONES = ("on-premises", "edge", "cloud")
#: Groups that are kept.
MOST_KNOWN = 1000


class Group:
    """Some backends of a tier, or of a model.

    Args:
        targets: At least one.
        why: `Route.why` of `route`.
        model: The model that `route` is for; None: each backend's first.

    Attributes:
        targets: The backends.
        stable: Those that are no canaries.
        canaries: Canaries that get any requests.
        zones: The stable ones, parted by zone, the nearest first; where there are none, all.
        quality: Share of requests that each of them answers well; 0 where one does not say.
        route: The way to them, the nearest zone first.
    """

    __slots__ = ("_prices", "canaries", "quality", "route", "stable", "targets", "zones")

    def __init__(self, targets: tuple[Target, ...], why: str, model: str | None = None) -> None:
        self.targets = targets
        self.quality = min(target.backend.quality or 0.0 for target in targets)
        self.stable = tuple(target for target in targets if target.canary is None)
        self.canaries = tuple(target for target in targets if target.canary)
        asked = self.stable or targets
        parted = [tuple(target for target in asked if target.backend.zone == zone) for zone in ZONES]
        parted = [zone for zone in parted if zone]
        self.zones: Sequence[Group] = (
            (self,) if parted == [targets] else tuple(Group(zone, why, model) for zone in parted)
        )
        route = Route(targets, model, why)
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
        name: The router's name, `Route.why` of their routes.
    """

    def __init__(self, portfolio: Portfolio, name: str) -> None:
        self._portfolio = portfolio
        self._name = name
        self._forget()

    def of(self, targets: tuple[Target, ...]) -> Group:
        """The group of these backends; at least one."""
        if self._tiers is not self._portfolio.tiers or len(self._known) > MOST_KNOWN:
            self._forget()
        group = self._known.get(targets)
        if group is None:
            group = self._known[targets] = Group(targets, self._name)
        return group

    def allowed(self, targets: tuple[Target, ...], principal: Principal) -> Group | None:
        """What a key may use of a tier's backends; None: nothing.

        All where it has no list of models, or one that holds the tier, or the router's name alone. Else those that
        serve the first model of the list that any of them serves, and that model of each.
        """
        if principal.models is None:
            return self.of(targets)
        if self._tiers is not self._portfolio.tiers or len(self._of_keys) > MOST_KNOWN:
            self._forget()
        asked = (principal.models, targets)
        try:
            return self._of_keys[asked]
        except KeyError:
            group = self._of_keys[asked] = self._by_list(targets, principal)
            return group

    def _by_list(self, targets: tuple[Target, ...], principal: Principal) -> Group | None:
        if set(principal.models or ()) <= {self._name} or principal.may_ask_for(targets[0].backend.tier):
            return self.of(targets)
        model, serving = next(listed(principal, targets), (None, ()))
        return Group(serving, self._name, model) if serving else None

    def _forget(self) -> None:
        self._tiers: Mapping[str, tuple[Target, ...]] = self._portfolio.tiers
        self._known: dict[tuple[Target, ...], Group] = {}
        #: By lists of models, too.
        self._of_keys: dict[tuple[tuple[str, ...], tuple[Target, ...]], Group | None] = {}
