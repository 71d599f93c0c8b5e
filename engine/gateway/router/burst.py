"""In which order the zones of a tier are asked: one's own machines first, others only when those are full.

The forwarder asks the routes in their order and goes on to the next where no backend of one can take the request: so
overflow to another zone is nothing but the order of the routes.
"""

from collections.abc import Mapping

from tokenmill.engine.gateway.portfolio import Portfolio, Route, Target
from tokenmill.engine.gateway.router.settings import RoutingSettings

#: The nearest first.
ZONES = ("on-premises", "edge", "cloud")
#: Routes that are kept; there are as many as ways to leave backends of a tier out.
MOST_KNOWN = 1000


def by_preference(targets: tuple[Target, ...], settings: RoutingSettings) -> list[tuple[Target, ...]]:
    """The backends in groups, the group to be asked first in front.

    Args:
        targets: The backends of a tier or model; at least one.
        settings: Whether other zones may help out, and from which queue on.
    """
    zone = targets[0].backend.zone
    for target in targets:
        if target.backend.zone != zone:
            break
    else:
        return [targets]
    zones = [tuple([target for target in targets if target.backend.zone == zone]) for zone in ZONES]
    groups = [group for group in zones if group]
    if not settings.burst:
        return groups[:1]
    queue = settings.burst_queue
    if queue is not None:
        # A group whose every backend has that many requests open counts as full: it is asked last. The farthest has
        # nobody to hand over to.
        last = groups[-1]
        groups.sort(key=lambda group: group is not last and all(target.outstanding >= queue for target in group))
    return groups


def spread(route: Route, settings: RoutingSettings) -> tuple[Route, ...]:
    """A route as one or more, zone by zone."""
    groups = by_preference(route.targets, settings)
    if groups[0] is route.targets:
        return (route,)
    return tuple([route.only(group) for group in groups])


class Roads:
    """The routes of what the router chose: the same few groups of backends come back with every request.

    Args:
        portfolio: Whose backends they are; when it is indexed anew, nothing of the old ones is kept.
        why: `Route.why` of them all.
    """

    def __init__(self, portfolio: Portfolio, why: str) -> None:
        self._portfolio = portfolio
        self._why = why
        self._tiers: Mapping[str, tuple[Target, ...]] = {}
        self._known: dict[tuple[Target, ...], Route] = {}

    def over(self, group: tuple[Target, ...]) -> Route:
        """The route over a group."""
        if self._tiers is not self._portfolio.tiers or len(self._known) > MOST_KNOWN:
            self._tiers, self._known = self._portfolio.tiers, {}
        route = self._known.get(group)
        if route is None:
            route = self._known[group] = Route(group, None, self._why)
        return route
