"""Which of a route's backends gets a request.

Least outstanding requests per weight, ties broken at random; before that, a canary takes its share. Backends that are
down, whose circuit is open or that are full are not asked.
"""

import random
from collections.abc import Collection, Sequence

from tokenmill.engine.gateway.api_error import ApiError, retry_after, unavailable
from tokenmill.engine.gateway.portfolio import Route, Target
from tokenmill.engine.gateway.settings import Settings


def choose(route: Route, tried: Collection[Target] = ()) -> Target | None:
    """The backend of the route to ask next, or None when none can take a request now.

    Args:
        route: The backends.
        tried: Those already asked for this request.
    """
    usable = [target for target in route.targets if target not in tried and can_serve(target, route.model)]
    if len(usable) <= 1:
        return usable[0] if usable else None
    stable = [target for target in usable if target.canary is None]
    draw = random.random()
    for target in usable:
        if target.canary is not None:
            if draw < target.canary or not stable:
                return target
            draw -= target.canary
    return min(stable, key=lambda target: ((target.outstanding + 1) / target.backend.weight, random.random()))


def can_serve(target: Target, model: str | None) -> bool:
    """Whether a backend may be sent a request for this model now."""
    return target.up is not False and target.has_room() and target.breaker(model).wait_s() <= 0


def refusal(routes: Sequence[Route], settings: Settings) -> ApiError:
    """Why none of the routes can serve now: 429 when all that work are full, 503 otherwise, with `Retry-After`."""
    waits: list[float] = []
    full = False
    for route in routes:
        for target in route.targets:
            wait = target.breaker(route.model).wait_s()
            if target.up is not False and wait <= 0:
                full = full or not target.has_room()
            elif target.up is not False:
                waits.append(wait)
    if full:
        return ApiError(
            429,
            "Every backend of this model has as many requests as it may; try again soon.",
            code="overloaded",
            headers=[retry_after(settings.retry_after_s)],
        )
    names = ", ".join(sorted({target.backend.tier for route in routes for target in route.targets}))
    return unavailable(
        f"No backend of {names} can serve now; try again soon.", min(waits, default=settings.retry_after_s)
    )
