"""In which order the zones of a tier are asked: one's own machines first, others only when those are full.

The forwarder asks the routes in their order and goes on to the next where no backend of one can take the request: so
overflow to another zone is nothing but the order of the routes.
"""

from collections.abc import Sequence

from tokenmill.engine.gateway.portfolio import Route, Target
from tokenmill.engine.gateway.router.settings import RoutingSettings

#: The nearest first.
ZONES = ("on-premises", "edge", "cloud")


def by_preference(targets: Sequence[Target], settings: RoutingSettings) -> list[tuple[Target, ...]]:
    """The backends in groups, the group to be asked first in front.

    Args:
        targets: The backends of a tier or model; at least one.
        settings: Whether other zones may help out, and from which queue on.
    """
    groups = [tuple(target for target in targets if target.backend.zone == zone) for zone in ZONES]
    groups = [group for group in groups if group]
    if len(groups) == 1:
        return groups
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
    if len(groups) == 1 and len(groups[0]) == len(route.targets):
        return (route,)
    return tuple(route.only(group) for group in groups)
