"""What a request needs of its budgets at most, and what is left of its routes where a budget cannot pay for all.

A budget that refuses a request says what it has left. Backends at which the request's bound costs more are taken out of
its routes, and so is the tier that takes over from an unsure answer where both answers together cost more. The rest is
reserved anew, in full. Nobody is asked whom the routes do not hold, so nothing is sent that is not reserved.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import msgspec

from tokenmill.engine.gateway.decision import Decision, Reason
from tokenmill.engine.gateway.governance.bounds import Bound
from tokenmill.engine.gateway.governance.budgets import Refusal
from tokenmill.engine.gateway.money import dollars
from tokenmill.engine.gateway.pipeline import Exchange
from tokenmill.engine.gateway.portfolio import Route, Target, of_tier

#: The most that a request can use at a backend.
BoundAt = Callable[[Target], Bound]
#: Reasons that hold whichever tier is chosen: they say what was taken away.
_OF_EVERY_TIER = frozenset({"sensitivity", "context"})


class Need(NamedTuple):
    """The most that a request can use: micro-cents, prompt tokens, completion tokens."""

    amount: int
    prompt: int
    completion: int


def need(exchange: Exchange, bound_at: BoundAt) -> Need:
    """That of the dearest of its routes; where another tier may take over, of the first and that one together."""
    routes, decision = exchange.routes, exchange.decision
    whole = _dearest(
        routes[0].targets if len(routes) == 1 else [target for route in routes for target in route.targets], bound_at
    )
    if decision is None or decision.escalation is None:
        return whole
    first = _dearest(of_tier(routes, decision.tier), bound_at)
    then = _dearest(of_tier(routes, decision.escalation), bound_at)
    return Need(*[max(one, this + that) for one, this, that in zip(whole, first, then, strict=True)])


def narrow(exchange: Exchange, bound_at: BoundAt, refused: Refusal) -> Refusal | None:
    """Takes out what the budget that refused the request cannot pay.

    Args:
        exchange: Its routes and decision are changed.
        bound_at: What it can use where.
        refused: What was answered to its reservation.

    Returns:
        None where something is left to be reserved; else the refusal, with what the cheapest backend would cost.
    """
    if refused.limit != "budget":
        return refused
    left = refused.allowed - refused.used
    costs = {target: _cost(target, bound_at) for route in exchange.routes for target in route.targets}
    kept = [rest for route in exchange.routes if (rest := _affordable(route, costs, left)) is not None]
    if not any(route.after in ("", "error") for route in kept):
        return refused._replace(asked=min(costs.values()))
    exchange.routes = kept
    decision = exchange.decision
    if decision is not None:
        exchange.decision = decision = _without(decision, exchange, refused, left)
        if decision.escalation is not None and need(exchange, bound_at).amount > left:
            exchange.decision = msgspec.structs.replace(decision, escalation=None)
    return None


def _dearest(targets: Iterable[Target], bound_at: BoundAt) -> Need:
    """The most over some backends, each figure for itself."""
    amount = prompt = completion = 0
    for target in targets:
        bound = bound_at(target)
        amount = max(amount, target.backend.prices.bound(*bound))
        prompt = max(prompt, bound.prompt)
        completion = max(completion, bound.completion)
    return Need(amount, prompt, completion)


def _cost(target: Target, bound_at: BoundAt) -> int:
    return target.backend.prices.bound(*bound_at(target))


def _affordable(route: Route, costs: dict[Target, int], left: int) -> Route | None:
    """The route without its backends that cost more than what is left; None: nobody is left, or canaries alone."""
    fit = tuple([target for target in route.targets if costs[target] <= left])
    if len(fit) == len(route.targets):
        return route
    rest = route.only(fit)
    return rest if any(rest.parts) or (fit and not any(route.parts)) else None


def _without(decision: Decision, exchange: Exchange, refused: Refusal, left: int) -> Decision:
    """The decision among the tiers that are left, with what the budget has to say about it."""
    kept = {target.backend.tier for route in exchange.routes for target in route.targets}
    costs = {tier: cost for tier, cost in zip(decision.candidates, decision.costs, strict=True) if tier in kept}
    gone = [tier for tier in decision.candidates if tier not in kept]
    if not gone:
        return decision
    candidates = tuple(costs)
    shown = f"${dollars(left):.8g} are left of the budget of the {refused.account.kind}"
    verdict = f"{shown}, too little for {', '.join(gone)}"
    others = decision.reasons
    if candidates[0] != decision.tier:
        others = tuple(reason for reason in others if reason.criterion in _OF_EVERY_TIER)
    escalates = candidates[0] == decision.tier and decision.escalation in kept
    return Decision(
        candidates[0],
        candidates,
        (*decision.refused, *((tier, f"budget: {shown}") for tier in gone)),
        (Reason("cost", verdict), *others),
        tuple(costs.values()),
        decision.escalation if escalates else None,
    )
