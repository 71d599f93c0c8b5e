"""Which of a route's backends gets a request.

A canary takes its share first, and no more: what the others have no room for is not its to take, and a request that
failed elsewhere does not try it. Only where all others are down, or their circuits open, it gets everything: an answer
is better than a refusal. Of the others, the backend that has the longest beginning of the prompt in its cache, unless
it is busier than its share by more than a bound; where none has any, the one with the fewest outstanding requests, ties
broken at random; of different weights one is drawn, so that each has its share also of few requests at a time. Backends
that are down, whose circuit is open or that are full are not asked.
"""

import random
from collections.abc import Collection, Sequence

from tokenmill.engine.gateway.affinity import PrefixTable, owner_among, prompt_blocks
from tokenmill.engine.gateway.api_error import ApiError, retry_after, unavailable
from tokenmill.engine.gateway.pipeline import Exchange
from tokenmill.engine.gateway.portfolio import Route, Target
from tokenmill.engine.gateway.settings import Settings

#: A backend that has the prompt's beginning may be this much busier than its share, and `_SLACK` requests more.
IMBALANCE = 1.25
_SLACK = 2


class Balancer:
    """Chooses backends; remembers which prompts went where."""

    def __init__(self) -> None:
        self._prefixes = PrefixTable()

    def choose(self, route: Route, exchange: Exchange, tried: Collection[Target] = ()) -> Target | None:
        """The backend of the route to ask next, or None when none can take a request now.

        Args:
            route: The backends.
            exchange: The request, for its prompt.
            tried: Those already asked for this request.
        """
        model, key = route.model, exchange.key
        if route.canaries and (canary := _drawn(route, key, tried)) is not None:
            return canary
        for part in route.parts:
            usable = [target for target in part if can_serve(target, model, key) and target not in tried]
            if len(usable) == 1:
                return usable[0]
            if usable:
                blocks = prompt_blocks(exchange.body, model, owner_among(exchange, usable))
                chosen = self._holder(usable, blocks) or _lightest(usable)
                self._prefixes.record(blocks, chosen)
                return chosen
        return None

    def _holder(self, targets: Sequence[Target], blocks: list[int]) -> Target | None:
        matches = self._prefixes.matches(blocks, targets)
        if not matches:
            return None
        best = max(matches, key=lambda target: (matches[target], -_load(target)))
        mean = sum(target.outstanding for target in targets) / len(targets)
        # 1 where all weigh the same.
        even = best.backend.weight * len(targets) / sum(target.backend.weight for target in targets)
        return best if best.outstanding + 1 <= even * (IMBALANCE * mean + _SLACK + 1) else None


def _drawn(route: Route, key: str | None, tried: Collection[Target]) -> Target | None:
    """The canary that gets this key's request; None: it is for the others."""
    model = route.model
    only_canaries = not any(target.answers(model, key) for part in route.parts for target in part)
    if not only_canaries and any(target in tried for target in route.targets):
        return None  # one draw a request
    usable = [target for target in route.canaries if can_serve(target, model, key) and target not in tried]
    draw = random.random()
    for target in usable:
        share = target.canary or 0.0
        if draw < share:
            return target
        draw -= share
    return usable[0] if usable and only_canaries else None


def _lightest(targets: Sequence[Target]) -> Target:
    """The backend that has the least to do for its weight."""
    weight = targets[0].backend.weight
    if all(target.backend.weight == weight for target in targets):
        return min(targets, key=lambda one: (one.outstanding, random.random()))
    # The least of exponential times is each one's with a probability by its weight: idle backends are drawn by weight
    # alone. Outstanding requests stand for the times that have passed, so busy ones have their shares, too.
    return min(targets, key=lambda one: (one.outstanding + random.expovariate(1.0)) / one.backend.weight)


def _load(target: Target) -> float:
    return (target.outstanding + 1) / target.backend.weight


def can_serve(target: Target, model: str | None, key: str | None) -> bool:
    """Whether a backend may be sent this key's request for this model now."""
    return target.canary != 0 and target.has_room() and target.answers(model, key)


def refusal(routes: Sequence[Route], settings: Settings, key: str | None = None) -> ApiError:
    """Why none of the routes can serve now: 429 when all that work are full, 503 otherwise, with `Retry-After`.

    Args:
        routes: They.
        settings: For the time to come back.
        key: Whose request it is.
    """
    waits: list[float] = []
    full = False
    for route in routes:
        for target in route.targets:
            if target.up is False or target.canary == 0:
                continue
            wait = target.breaker(route.model).wait_s(key)
            if wait > 0:
                waits.append(wait)
            else:
                full = full or not target.has_room()
    if full:
        return ApiError(
            429,
            "Every backend of this model has as many requests as it may; try again soon.",
            code="overloaded",
            headers=[retry_after(settings.retry_after_s)],
        )
    names = ", ".join(sorted({target.backend.tier for route in routes for target in route.targets}))
    wait_s = min(waits, default=settings.retry_after_s)
    return unavailable(f"No backend of {names} can serve now; try again soon.", wait_s)
