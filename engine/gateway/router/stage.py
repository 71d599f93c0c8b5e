"""The router: turns a request's model into the routes it takes, and says why.

`auto` (or whatever the configuration calls it) is routed by the six criteria; a tier's name or a concrete model stays
what it is. In every case nearer zones come first, and the answer's headers say where it came from:
`x-tokenmill-tier`, `x-tokenmill-backend`, `x-tokenmill-version`, `x-tokenmill-reason`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs

import msgspec
import orjson

from tokenmill.engine.gateway.api_error import JSON, ApiError, quote
from tokenmill.engine.gateway.decision import Decision
from tokenmill.engine.gateway.fallback import fitting
from tokenmill.engine.gateway.heads import sentence
from tokenmill.engine.gateway.hints import hints_of, strip
from tokenmill.engine.gateway.openapi import DRY_RUN
from tokenmill.engine.gateway.pace import share
from tokenmill.engine.gateway.paths import usual
from tokenmill.engine.gateway.pipeline import Exchange, Handler, Reply
from tokenmill.engine.gateway.portfolio import Portfolio, Route, Target
from tokenmill.engine.gateway.router.burst import by_preference, spread
from tokenmill.engine.gateway.router.classifier import bundled, complexity
from tokenmill.engine.gateway.router.criteria import Question, ranked, reasons
from tokenmill.engine.gateway.router.features import features_of
from tokenmill.engine.gateway.router.groups import Groups
from tokenmill.engine.gateway.router.observed import Observed
from tokenmill.engine.gateway.router.options import Option, described, fit, options_of
from tokenmill.engine.gateway.router.outcomes import OutcomeLog
from tokenmill.engine.gateway.router.rules import Matcher
from tokenmill.engine.gateway.router.settings import RoutingSettings
from tokenmill.engine.gateway.sensitivity.clearance import clearance_of
from tokenmill.engine.gateway.sensitivity.stages import Audit, log_decision, refusal, subject_of, told

#: Longest reason in a response header.
_LONGEST_REASON = 400


class Router:
    """Chooses routes.

    Args:
        portfolio: All backends.
        settings: The configuration.
        outcomes: Logs how they ended; None: no log.
        audit: Told when a request is refused because nobody who may see it can serve it.
    """

    name = "router"

    def __init__(
        self,
        portfolio: Portfolio,
        settings: RoutingSettings,
        outcomes: OutcomeLog | None = None,
        audit: Audit = log_decision,
    ) -> None:
        self._portfolio = portfolio
        # Each worker sees its own requests alone.
        settings = replace(settings, burst_queue=share(settings.burst_queue, portfolio.settings.workers))
        self._settings = settings
        self._outcomes = outcomes
        self._audit = audit
        self._weights = settings.weights or bundled()
        self._rules = Matcher(settings.rules)
        self._observed = Observed()
        self._groups = Groups(portfolio, settings.name)

    async def handle(self, exchange: Exchange, proceed: Handler) -> Reply:
        """See `pipeline.Stage`."""
        strip(exchange)
        wanted = self._portfolio.settings.default_model if exchange.model is None else exchange.model
        if exchange.endpoint == DRY_RUN:
            exchange.endpoint = _endpoint(exchange.query)
            return self._dry_run(exchange, wanted)
        if wanted == self._settings.name:
            self._decide(exchange)
        else:
            hints_of(exchange)  # a hint that cannot be meant is refused for every model alike
            exchange.routes = self._named(exchange)
        exchange.on_end(self._observed.learn)
        reply = await proceed(exchange)
        _explain(reply, exchange)
        return reply

    def _decide(self, exchange: Exchange) -> None:
        question, options = self._question(exchange)
        if not options:
            raise self._nobody(exchange, question)
        order = ranked(question, options)
        decision = self._decision(question, order)
        exchange.decision = decision
        exchange.routes = [option.route for option in order]
        if self._outcomes is not None:
            log, values, hard = self._outcomes, question.features.values, question.complexity
            exchange.on_end(lambda ended: log.add(ended, values, hard))

    def _question(self, exchange: Exchange) -> tuple[Question, list[Option]]:
        features = features_of(exchange)
        hints = hints_of(exchange)
        clearance, principal = clearance_of(exchange), exchange.principal
        options, refused = options_of(self._portfolio, features, clearance, principal, self._settings, self._groups)
        question = Question(
            features,
            hints,
            complexity(features.values, self._weights),
            self._rules.first(features),
            bool(principal and principal.soft_limit_reached),
            clearance,
            self._settings,
            refused,
            self._observed,
        )
        return question, options

    def _decision(self, question: Question, order: Sequence[Option]) -> Decision:
        return Decision(
            order[0].tier,
            tuple([option.tier for option in order]),
            tuple(question.refused.items()),
            reasons(question, order),
            tuple([option.cost for option in order]),
            self._escalation(question, order),
        )

    def _escalation(self, question: Question, order: Sequence[Option]) -> str | None:
        """The tier that takes over where the chosen one's answer is not confident enough; None: none may."""
        settings = self._settings.escalation
        features = question.features
        if settings is None or order[0].tier != settings.first or question.over_soft_limit:
            return None
        if features.endpoint != "/v1/chat/completions" or features.several or "tools" in features.needs:
            return None
        stable = [target for part in order[0].route.parts for target in part]
        if not any("logprobs" in target.backend.capabilities for target in stable or order[0].targets):
            return None
        for option in order[1:]:
            if option.tier == settings.then:
                most = question.hints.max_cost
                return settings.then if most is None or order[0].cost + option.cost <= most else None
        return None

    def _named(self, exchange: Exchange) -> list[Route]:
        """The routes of what was asked for by name, the nearest zones first."""
        of, settings = self._groups.of, self._settings
        routes = []
        for route in fitting(self._portfolio.routes(exchange.model, exchange.principal), exchange):
            group = of(route.targets)
            routes.append(spread(route, group, by_preference(group, settings)))
        return routes

    def _nobody(self, exchange: Exchange, question: Question) -> ApiError:
        kept_away = [tier for tier, reason in question.refused.items() if reason.startswith("sensitivity")]
        able = [target for tier in kept_away for target in fit(self._portfolio.tiers[tier], question.features)[0]]
        if able and question.clearance is not None:
            zones = ", ".join(sorted({target.backend.zone for target in able}))
            self._audit(
                "residency.refuse", subject_of(exchange), {**told(exchange, question.clearance), "offered": zones}
            )
            return refusal(question.clearance, zones)
        if not question.refused:
            return ApiError(403, "This key's list of models names no tier that can answer.", code="model_not_allowed")
        return ApiError(400, f"No tier can take this request: {described(question.refused)}.", code="no_tier")

    def _dry_run(self, exchange: Exchange, wanted: str | None) -> Reply:
        """Explains without asking any model; the body is that of the request in question."""
        question, options = self._question(exchange)
        clearance, decision, refused = question.clearance, None, question.refused
        if wanted == self._settings.name:
            order = ranked(question, options)
            routes: Sequence[Route] = [option.route for option in order]
            decision = self._decision(question, order) if order else None
        else:
            named = self._named(exchange)
            routes = named if clearance is None else clearance.narrow(named)
            lost = _tiers(named) - _tiers(routes)
            refused = dict.fromkeys(sorted(lost), f"sensitivity: {clearance.why}") if clearance else {}
        answer: dict[str, Any] = {
            "object": "tokenmill.route",
            "endpoint": exchange.endpoint,
            "model": wanted,
            "features": {name: round(value, 4) for name, value in question.features.values.items()},
            "complexity": round(question.complexity, 4),
            "prompt_tokens": question.features.prompt_tokens,
            "sensitivity": clearance.described() if clearance else None,
            "decision": None if decision is None else {**msgspec.to_builtins(decision), "cost": decision.cost},
            "reason": _reason(decision) if routes else None,
            "refused": refused,
            "backends": [_shown(target, route) for route in routes for target in _in_turn(route)],
        }
        return Reply(200, [JSON], orjson.dumps(answer))


def _tiers(routes: Sequence[Route]) -> set[str]:
    return {target.backend.tier for route in routes for target in route.targets}


def _in_turn(route: Route) -> Sequence[Target]:
    """A route's backends, canaries last."""
    return [*(target for part in route.parts for target in part), *route.canaries]


def _shown(target: Target, route: Route) -> dict[str, Any]:
    backend = target.backend
    return {
        "tier": backend.tier,
        "backend": backend.name,
        "zone": backend.zone,
        "canary": target.canary,
        "after": route.after or None,
    }


def _endpoint(query: bytes) -> str:
    """The path of the request in question, as it is served here.

    Raises:
        ApiError: 400 where it is none.
    """
    path = parse_qs(query.decode("latin-1")).get("endpoint", ["/v1/chat/completions"])[0]
    if not path.startswith("/"):
        raise ApiError(
            400,
            f"`endpoint` is {quote(path, 40)!r}; give a path, e.g. /v1/embeddings.",
            code="invalid",
            param="endpoint",
        )
    return usual(path)[0]


def _reason(decision: Decision | None) -> str:
    if decision is None:
        return "asked for by name"
    return "; ".join([f"{one.criterion}: {one.verdict}" for one in decision.reasons])


def _explain(reply: Reply, exchange: Exchange) -> None:
    """Says in the answer's headers where it came from and why."""
    target, decision = exchange.target, exchange.decision
    if target is None:
        return
    reason = _reason(decision)
    if decision is not None and target.backend.tier != decision.tier:
        escalated = (exchange.notes.get("escalation") or {}).get("escalated")
        reason = f"{'escalated' if escalated else 'failed over'} from {decision.tier}; {reason}"
    reply.headers = [
        *reply.headers,
        *target.headers,
        (b"x-tokenmill-reason", sentence(reason)[:_LONGEST_REASON].encode()),
    ]
