"""The backends as they are now: who serves which model, who is up, how busy each is."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tokenmill.engine.gateway.api_error import ApiError, Headers, model_not_found, unavailable
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.breaker import Breaker
from tokenmill.engine.gateway.event_tokens import EventTokens
from tokenmill.engine.gateway.heads import sentence
from tokenmill.engine.gateway.pace import Pace, share
from tokenmill.engine.gateway.principal import Principal
from tokenmill.engine.gateway.router.settings import AUTO
from tokenmill.engine.gateway.settings import Settings
from tokenmill.engine.gateway.upstream import Origin

#: What must have happened before a route is taken; see `Route`.
After = Literal["", "error", "context", "policy"]
#: `Route.why` of a route that the configuration names as another's fallback.
FALLBACK = "fallback"
#: `Target.reason` before anything is known of a backend.
NOT_PROBED = "not probed yet"


class Target:
    """The state of one backend.

    Attributes:
        backend: What it is.
        outstanding: Requests of this process that are open at it now.
        most_open: This process's part of its `max_concurrency`; None: any number.
        up: What the last probe or outcome said; None before the first.
        models: Public names of the models it serves, as far as known.
        context_window: Most tokens of a prompt and its answer, as configured or as its own list says; None: unknown.
        canary: The share of its tier's requests that it gets, and no more; changed by `Portfolio.set_canary`.
        pace: What it was sent in the last minute.
        origin: Where its connections go.
        longest_silence_s: How long it may be silent while it has a request.
        reason: Why it is down, for people.
        headers: What an answer says of it: tier, name, and version where it states one.
    """

    def __init__(self, backend: Backend, settings: Settings) -> None:
        self.backend = backend
        self.outstanding = 0
        self.most_open = share(backend.max_concurrency, settings.workers)
        self.up: bool | None = None
        self.catalog = None
        self.canary = backend.canary
        self.pace = Pace(
            share(backend.requests_per_minute, settings.workers), share(backend.tokens_per_minute, settings.workers)
        )
        self.longest_silence_s = backend.read_timeout_s or settings.read_timeout_s
        self.origin = Origin.of(backend.root, backend.has_version, backend.read_timeout_s)
        self.reason = NOT_PROBED
        self.headers: Headers = [
            (b"x-tokenmill-tier", backend.tier.encode()),
            (b"x-tokenmill-backend", backend.name.encode()),
        ]
        if backend.version:
            self.headers.append((b"x-tokenmill-version", sentence(backend.version).encode()))
        self._settings = settings
        self._breakers: dict[str | None, Breaker] = {}
        self._event_tokens: dict[str | None, EventTokens] = {}

    @property
    def catalog(self) -> dict[str, dict[str, Any]] | None:
        """Model objects of its `/v1/models` by id; None until it was asked with success."""
        return self._catalog

    @catalog.setter
    def catalog(self, listed: dict[str, dict[str, Any]] | None) -> None:
        self._catalog = listed
        prefix = self.backend.prefix
        # Some list hundreds, and every request asks for these.
        self.models: tuple[str, ...] = self.backend.models or tuple([prefix + name for name in listed or ()])
        self._first = self.backend.upstream_model(self.models[0]) if self.models else None
        self.context_window = self.backend.context_window or _longest(listed or {})

    def own_model(self, model: str | None) -> str | None:
        """The backend's own name of a public model, for None of its first; None: it is not known yet."""
        return self.backend.upstream_model(model) if model else self._first

    def breaker(self, model: str | None) -> Breaker:
        """The circuit of one model here, whichever of its names, or its tier's (None), it is asked by."""
        name = self.own_model(model)
        found = self._breakers.get(name)
        if found is None:
            found = Breaker(self._settings.breaker_failures, self._settings.breaker_cooldown_s)
            self._breakers[name] = found
        return found

    def event_tokens(self, model: str | None) -> EventTokens:
        """What an event of one model's streams holds here; the model as for `breaker`."""
        name = self.own_model(model)
        found = self._event_tokens.get(name)
        if found is None:
            found = self._event_tokens[name] = EventTokens()
        return found

    def open_circuits(self) -> list[str]:
        """The backend's own names of models that nobody asks of it at the moment, because it failed them."""
        return [model or "any" for model, breaker in list(self._breakers.items()) if breaker.wait_s() > 0]

    def has_room(self) -> bool:
        """Whether its limits on concurrency and per minute admit one more request."""
        limit = self.most_open
        return (limit is None or self.outstanding < limit) and self.pace.allows()

    def answers(self, model: str | None, key: str | None = None) -> bool:
        """Whether it is not known to be down, nor its circuit for this model open for this key; it may be full."""
        return self.up is not False and self.breaker(model).wait_s(key) <= 0

    def mark_up(self) -> None:
        """It answered."""
        self.up = True
        self.reason = ""

    def mark_down(self, reason: str) -> None:
        """It cannot be reached. Where no probe would ever mark it up again, the circuit breaker alone decides."""
        if self.backend.health_path is not None:
            self.up = False
        self.reason = reason

    @property
    def ready(self) -> bool:
        """Whether it is known to be up, or is trusted unasked."""
        return self.up is True or (self.up is None and self.backend.health_path is None)


@dataclass(frozen=True)
class Route:
    """One way to serve a request: any of `targets` will do, with `model` as the model's public name.

    Attributes:
        targets: The backends, all equal but for weight and load.
        model: The model; None: the request names none, or a tier, and each backend uses its first.
        why: The reason, for the response header and the log.
        after: What must have happened before it is taken; empty: nothing. `error`: those before it cannot serve or
            have failed; `context`: the prompt is too long for them; `policy`: they do not answer such content.
        parts: The backends that are no canaries, in parts of which each is asked where those before it can take
            nothing; not given: one part.
        canaries: The others; each has a share of what is sent this way, whichever part that goes to.
    """

    targets: tuple[Target, ...]
    model: str | None
    why: str = "model"
    after: After = ""
    parts: tuple[tuple[Target, ...], ...] = ()
    canaries: tuple[Target, ...] = field(init=False)

    def __post_init__(self) -> None:
        canaries = tuple([target for target in self.targets if target.canary is not None])
        object.__setattr__(self, "canaries", canaries)
        if not self.parts:
            stable = tuple([target for target in self.targets if target not in canaries]) if canaries else self.targets
            object.__setattr__(self, "parts", (stable,))

    def only(self, targets: tuple[Target, ...]) -> "Route":
        """The same with some of its backends."""
        kept = [tuple([target for target in part if target in targets]) for part in self.parts]
        return Route(targets, self.model, self.why, self.after, tuple([part for part in kept if part]))


class Portfolio:
    """All backends, indexed by model and by tier.

    Args:
        backends: The configuration.
        settings: For breakers and messages.
    """

    def __init__(self, backends: Iterable[Backend], settings: Settings) -> None:
        self.settings = settings
        self.targets: tuple[Target, ...] = tuple(Target(backend, settings) for backend in backends)
        self._routes: dict[str, Route] = {}
        #: Model names that stand for a choice among tiers; listed with the models.
        self.virtual: tuple[str, ...] = ()
        self.index()

    def index(self) -> None:
        """Computes the routes anew; call it when a catalog changed."""
        by_tier: dict[str, list[Target]] = {}
        by_model: dict[str, list[Target]] = {}
        for target in self.targets:
            by_tier.setdefault(target.backend.tier, []).append(target)
            for model in target.models:
                by_model.setdefault(model, []).append(target)
        self.tiers: dict[str, tuple[Target, ...]] = {tier: _in_use(found) for tier, found in by_tier.items()}
        routes = {tier: Route(found, None, "tier") for tier, found in self.tiers.items()}
        routes.update((model, Route(_in_use(found), model)) for model, found in by_model.items())
        self._routes = routes
        chat = [tier for tier, found in self.tiers.items() if any(target.backend.makes_text for target in found)]
        #: Its backends that can be asked without a model's name.
        self._sole: tuple[Target, ...] = ()
        if len(chat) == 1:
            targets = self.tiers[chat[0]]
            self._sole = tuple([target for target in targets if target.backend.makes_text and target.models])

    def replace(self, backends: Iterable[Backend]) -> None:
        """Takes a new configuration; unchanged backends keep their state, requests under way are not disturbed."""
        known = {target.backend.name: target for target in self.targets}
        kept: list[Target] = []
        for backend in backends:
            target = known.get(backend.name)
            kept.append(target if target and target.backend == backend else Target(backend, self.settings))
        self.targets = tuple(kept)
        self.index()

    def set_canary(self, name: str, share: float | None) -> None:
        """Changes the share of a canary at once: 0 rolls it back, None makes it a backend like the others.

        Raises:
            KeyError: no backend has this name.
        """
        target = {target.backend.name: target for target in self.targets}[name]
        if target.canary != share:
            target.canary = share
            self.index()  # what is a canary stands apart in every route

    def routes(self, model: str | None, principal: Principal | None = None) -> Sequence[Route]:
        """Where a request for `model` may go, before any policy; the last ones when the first cannot serve it.

        Args:
            model: What it asks for.
            principal: Who asks: nothing falls back to what he may not ask for.

        Raises:
            ApiError: 404 for a model that nobody serves; 503 while a backend's models are not known yet;
                400 for a request without a model where there is no default.
        """
        wanted = model if model is not None else self.settings.default_model
        if wanted is None:
            if len(self.tiers) == 1:
                (targets,) = self.tiers.values()
                return (Route(targets, None, "sole tier"),)
            raise ApiError(400, "`model` is missing; GET /v1/models lists the choices.", code="missing", param="model")
        route = self._routes.get(wanted)
        if route is None and wanted == AUTO and not self.virtual:
            route = self._only_choice(principal)
        if route is not None:
            return (route, *self._fallbacks(route, principal))
        unknown = [target for target in self.targets if not target.backend.models and target.catalog is None]
        if unknown:
            names = ", ".join(target.backend.name for target in unknown)
            raise unavailable(f"The models of {names} are not known yet; try again soon.", self.settings.retry_after_s)
        raise model_not_found(wanted)

    def _only_choice(self, principal: Principal | None) -> Route | None:
        """What `auto` stands for where nothing is routed; None: there is a choice, or nothing for this key."""
        sole = self._sole
        if not sole:
            return None
        if principal is None or principal.may_ask_for(sole[0].backend.tier) or set(principal.models or ()) <= {AUTO}:
            return Route(sole, None, "sole tier")
        model, serving = next(listed(principal, sole), (None, ()))
        return Route(serving, model, "sole tier") if serving else None

    def _fallbacks(self, route: Route, principal: Principal | None) -> Iterator[Route]:
        """Where a request goes when none of the route's backends can serve it, or does."""
        settings = self.settings
        if not (settings.fallbacks or settings.context_window_fallbacks or settings.content_policy_fallbacks):
            return
        tiers = dict.fromkeys(target.backend.tier for target in route.targets)
        configured: tuple[tuple[After, Mapping[str, tuple[str, ...]]], ...] = (
            ("error", settings.fallbacks),
            ("context", settings.context_window_fallbacks),
            ("policy", settings.content_policy_fallbacks),
        )
        for after, named in configured:
            for other in dict.fromkeys(other for tier in tiers for other in named.get(tier, ())):
                targets = () if other in tiers else self.tiers.get(other, ())
                if principal is None or principal.may_ask_for(other):
                    if targets:
                        yield Route(targets, None, FALLBACK, after)
                    continue
                for model, serving in listed(principal, targets):
                    yield Route(serving, model, FALLBACK, after)

    def models(self) -> list[dict[str, Any]]:
        """The merged model list in the order of the configuration; a backend's own objects stay as they are."""
        found: dict[str, dict[str, Any]] = {}
        for target in self.targets:
            catalog = target.catalog or {}
            for model in target.models:
                if model not in found:
                    known = catalog.get(target.backend.upstream_model(model))
                    found[model] = {**known, "id": model} if known else self._described(model, target.backend)
        for name in self.virtual:
            found[name] = {"id": name, "object": "model", "created": _STARTED, "owned_by": "tokenmill"}
        return list(found.values())

    def _described(self, model: str, backend: Backend) -> dict[str, Any]:
        return {"id": model, "object": "model", "created": _STARTED, "owned_by": backend.tier}

    def unready_tiers(self) -> dict[str, str]:
        """Tiers without a backend that is up, with the reasons."""
        return {
            tier: "; ".join(f"{target.backend.name}: {target.reason}" for target in targets)
            for tier, targets in self.tiers.items()
            if not any(target.ready for target in targets)
        }


def of_tier(routes: Iterable[Route], tier: str) -> list[Target]:
    """The backends of one tier on some routes."""
    return [target for route in routes for target in route.targets if target.backend.tier == tier]


def _longest(listed: Mapping[str, Mapping[str, Any]]) -> int | None:
    """The most that any of some models says of its window; None: one says nothing."""
    windows = [model.get("max_model_len") for model in listed.values()]
    known = [window for window in windows if isinstance(window, int) and window > 0]
    return max(known) if known and len(known) == len(windows) else None


def _in_use(targets: Sequence[Target]) -> tuple[Target, ...]:
    """The backends without canaries that are rolled back: nothing is sent there, nothing reserved at their price.

    Where there are no others, all: a refusal names them.
    """
    return tuple([target for target in targets if target.canary != 0]) or tuple(targets)


def listed(principal: Principal, targets: Sequence[Target]) -> Iterator[tuple[str, tuple[Target, ...]]]:
    """Of a key's list of models each that some backends serve, and those that do; in the order of the list."""
    offered = (model for target in targets for model in target.models if principal.may_ask_for(model))
    for model in dict.fromkeys((*(principal.models or ()), *offered)):
        serving = tuple([target for target in targets if model in target.models])
        if serving:
            yield model, serving


_STARTED = int(time.time())
