"""The tiers that may answer a request, and why the others may not: the hard constraints, which nothing overrules."""

from collections.abc import Mapping
from dataclasses import dataclass

from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.portfolio import Portfolio, Target
from tokenmill.engine.gateway.principal import Principal
from tokenmill.engine.gateway.router.burst import by_preference
from tokenmill.engine.gateway.router.features import Features
from tokenmill.engine.gateway.router.observed import Observed
from tokenmill.engine.gateway.router.settings import RoutingSettings
from tokenmill.engine.gateway.sensitivity.clearance import Clearance

#: A backend with one of these makes no text.
_NO_TEXT = frozenset({"embeddings", "rerank"})


@dataclass(frozen=True)
class Option:
    """A tier that may answer.

    Attributes:
        tier: Its name.
        targets: Its backends that may see and can serve the request.
        quality: Share of requests that it answers well; 0 where nobody says.
        cost: Expected cost at the backend that would be asked first, in micro-cents.
        first_token_s: Expected time to the first token there; 0 where none was seen yet, infinite when it is full.
        up: Whether any of them is not known to be down.
    """

    tier: str
    targets: tuple[Target, ...]
    quality: float
    cost: int
    first_token_s: float
    up: bool = True


def options_of(
    portfolio: Portfolio,
    features: Features,
    clearance: Clearance | None,
    principal: Principal | None,
    settings: RoutingSettings,
    observed: Observed,
) -> tuple[list[Option], dict[str, str]]:
    """(the tiers that may answer, tier to reason of the others).

    Args:
        portfolio: All tiers.
        features: What the request needs.
        clearance: What it may do; None: anything.
        principal: Whose it is; None: anybody's.
        settings: For the expected length of answers and the order of zones.
        observed: For times to the first token.
    """
    found: list[Option] = []
    refused: dict[str, str] = {}
    for tier, targets in portfolio.tiers.items():
        kept = targets
        if clearance is not None:
            kept = tuple(target for target in targets if clearance.admits(target))
            if not kept:
                refused[tier] = f"sensitivity: {clearance.why}"
                continue
        reasons = {target: _unfit(target.backend, features) for target in kept}
        kept = tuple(target for target in kept if reasons[target] is None)
        if not kept:
            refused[tier] = next(iter(reasons.values())) or ""
        elif not _allowed(tier, kept, principal, settings.name):
            refused[tier] = "key: its models do not include this tier"
        else:
            found.append(_option(tier, kept, features, settings, observed))
    return found, refused


def _unfit(backend: Backend, features: Features) -> str | None:
    """Why a backend cannot answer; None: it can."""
    lacking = features.needs.difference(backend.capabilities)
    if lacking:
        return f"capability: needs {', '.join(sorted(lacking))}"
    if features.needs.isdisjoint(_NO_TEXT) and not _NO_TEXT.isdisjoint(backend.capabilities):
        return "capability: makes no text"
    if backend.protocol == "anthropic" and features.endpoint != "/v1/chat/completions":
        return "capability: offers chat completions only"
    length = features.prompt_tokens + (features.completion_limit or 0)
    window = backend.context_window
    if window is not None and length > window:
        return f"context: about {length} tokens do not fit into {window}"
    return None


def _allowed(tier: str, targets: tuple[Target, ...], principal: Principal | None, name: str) -> bool:
    """Whether a key's list of models holds the tier or a model of it; one with the router's name alone holds all."""
    if principal is None or principal.models is None:
        return True
    models = set(principal.models) - {name}
    return not models or tier in models or any(models & set(target.models) for target in targets)


def _option(
    tier: str, targets: tuple[Target, ...], features: Features, settings: RoutingSettings, observed: Observed
) -> Option:
    groups = by_preference(targets, settings)
    answering = [tuple(target for target in group if target.up is not False) for group in groups]
    # What a backend that is down would cost says nothing; where all are, the forwarder will say so.
    first = next((group for group in answering if group), groups[0])
    expected = min(features.completion_limit or settings.completion_tokens, settings.completion_tokens)
    completion = 0 if features.needs & _NO_TEXT else expected
    cost = min(target.backend.prices.cost(features.prompt_tokens, 0, completion) for target in first)
    wait = min(observed.first_token_s(target) if target.has_room() else float("inf") for target in first)
    quality = min(target.backend.quality or 0.0 for target in targets)
    return Option(tier, targets, quality, cost, wait, any(answering))


def described(refused: Mapping[str, str]) -> str:
    """The refusals in one line."""
    return "; ".join(f"{tier}: {reason}" for tier, reason in refused.items())
