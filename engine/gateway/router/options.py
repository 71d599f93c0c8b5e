"""The tiers that may answer a request, and why the others may not: the hard constraints, which nothing overrules."""

from collections.abc import Mapping, Sequence

import msgspec

from tokenmill.engine.gateway import anthropic
from tokenmill.engine.gateway.backends import NO_TEXT, Backend
from tokenmill.engine.gateway.portfolio import Portfolio, Route, Target
from tokenmill.engine.gateway.principal import Principal
from tokenmill.engine.gateway.router.burst import by_preference, spread
from tokenmill.engine.gateway.router.features import Features
from tokenmill.engine.gateway.router.groups import Group, Groups
from tokenmill.engine.gateway.router.settings import RoutingSettings
from tokenmill.engine.gateway.sensitivity.clearance import Clearance


class Option(msgspec.Struct, frozen=True):
    """A tier that may answer.

    Attributes:
        tier: Its name.
        targets: Its backends that may see and can serve the request.
        route: The way to them, zone by zone in the order in which they are asked; see `burst`.
        first: Those of them that would be asked first, canaries aside.
        quality: Share of requests that it answers well; 0 where nobody says.
        cost: Expected cost at the cheapest of the first, in micro-cents.
        up: Whether any of them is not known to be down.
    """

    tier: str
    targets: tuple[Target, ...]
    route: Route
    first: Group
    quality: float
    cost: int
    up: bool = True


def options_of(
    portfolio: Portfolio,
    features: Features,
    clearance: Clearance | None,
    principal: Principal | None,
    settings: RoutingSettings,
    groups: Groups,
) -> tuple[list[Option], dict[str, str]]:
    """(the tiers that may answer, tier to reason of the others that the key may ask for: it is told of no others).

    Args:
        portfolio: All tiers.
        features: What the request needs.
        clearance: What it may do; None: anything.
        principal: Whose it is; None: anybody's.
        settings: For the expected length of answers and the order of zones.
        groups: What is known of the backends.
    """
    found: list[Option] = []
    refused: dict[str, str] = {}
    if clearance is not None and clearance.zones is None and clearance.regions is None:
        clearance = None  # it admits everybody
    completion = _expected(features, settings)
    for tier, targets in portfolio.tiers.items():
        kept, why = targets, ""
        if clearance is not None:
            kept = tuple([target for target in targets if clearance.admits(target)])
            why = f"sensitivity: {clearance.why}"
        if kept:
            kept, why = fit(kept, features)
        if kept:
            group = groups.of(kept) if principal is None else groups.allowed(kept, principal)
            if group is not None:
                found.append(_option(tier, group, features, completion, settings, groups))
        elif principal is None or groups.allowed(targets, principal) is not None:
            refused[tier] = why
    return found, refused


def fit(targets: tuple[Target, ...], features: Features) -> tuple[tuple[Target, ...], str]:
    """(the backends that can answer, why the first one that cannot does not), whatever policies say."""
    for target in targets:
        why = _unfit(target.backend, features)
        if why is not None:
            return tuple([target for target in targets if _unfit(target.backend, features) is None]), why
    return targets, ""


def _unfit(backend: Backend, features: Features) -> str | None:
    """Why a backend cannot answer; None: it can."""
    needs, capabilities = features.needs, backend.capabilities
    if needs:
        lacking = needs.difference(capabilities)
        if lacking:
            return f"capability: needs {', '.join(sorted(lacking))}"
    if capabilities and needs.isdisjoint(NO_TEXT) and not backend.makes_text:
        return "capability: makes no text"
    if backend.protocol == "anthropic" and features.endpoint not in anthropic.PATHS:
        return f"capability: offers {anthropic.OFFERED} only"
    window = backend.context_window
    if window is not None:
        limit = features.completion_limit or 0
        length = features.at_once + limit
        if length > window:
            return f"context: about {length} tokens do not fit into {window}"
    return None


def _expected(features: Features, settings: RoutingSettings) -> int:
    """How many tokens the answer is expected to have."""
    if not features.needs.isdisjoint(NO_TEXT):
        return 0
    limit, usual = features.completion_limit, settings.completion_tokens
    return limit if limit and limit < usual else usual


def _option(
    tier: str, group: Group, features: Features, completion: int, settings: RoutingSettings, groups: Groups
) -> Option:
    zones = by_preference(group, settings)
    answering = _answering(zones, group, groups)
    # What a backend that is down would cost says nothing; where all are, the forwarder will say so.
    first = answering or zones[0]
    cost = first.cost(features.prompt_tokens, completion)
    route = group.route if zones is group.zones else spread(group.route, group, zones)
    return Option(tier, group.targets, route, first, group.quality, cost, answering is not None)


def _answering(zones: Sequence[Group], group: Group, groups: Groups) -> Group | None:
    """Those that are not known to be down, of the first zone that has any, else of the canaries; None: all are down."""
    for zone in zones:
        for target in zone.targets:
            if target.up is False:
                break
        else:
            return zone
        up = tuple([target for target in zone.targets if target.up is not False])
        if up:
            return groups.of(up)
    up = tuple([target for target in group.canaries if target.up is not False])
    return groups.of(up) if up else None


def described(refused: Mapping[str, str]) -> str:
    """The refusals in one line."""
    return "; ".join(f"{tier}: {reason}" for tier, reason in refused.items())
