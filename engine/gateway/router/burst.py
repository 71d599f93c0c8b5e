"""In which order the zones of a tier are asked: one's own machines first, others only when those are full.

A route's parts are its zones in their order; the balancer goes on to the next where no backend of one can take the
request. So overflow to another zone is nothing but the order of the parts. Canaries stand apart: a share is of all that
a tier gets, in whichever zone the canary and the others are.
"""

from collections.abc import Sequence

from tokenmill.engine.gateway.portfolio import Route
from tokenmill.engine.gateway.router.groups import Group
from tokenmill.engine.gateway.router.settings import RoutingSettings


def by_preference(group: Group, settings: RoutingSettings) -> Sequence[Group]:
    """The backends zone by zone, those to be asked first in front.

    Args:
        group: The backends of a tier or model.
        settings: Whether other zones may help out, and from which queue on.
    """
    zones = group.zones
    if len(zones) == 1:
        return zones
    if not settings.burst:
        return zones[:1]
    queue = settings.burst_queue
    if queue is None:
        return zones
    # A zone whose every backend has that many requests open counts as full: it is asked last. The farthest has nobody
    # to hand over to.
    last = zones[-1]
    return sorted(zones, key=lambda zone: zone is not last and all(one.outstanding >= queue for one in zone.targets))


def spread(route: Route, group: Group, zones: Sequence[Group]) -> Route:
    """A route with its parts in this order, without the zones that may not help out.

    Args:
        route: The route.
        group: That of its backends.
        zones: See `by_preference`.
    """
    parts = tuple([zone.targets for zone in zones])
    return route if parts == route.parts or not group.stable else group.way(route, parts)
