"""What is left of a request's routes where a budget cannot pay for all of them."""

from typing import Any

import pytest

from tests.gateway.governance.test_bounds import exchange
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.decision import Decision, Reason
from tokenmill.engine.gateway.governance.accounts import Account, Limits
from tokenmill.engine.gateway.governance.bounds import Bound
from tokenmill.engine.gateway.governance.budgets import Refusal
from tokenmill.engine.gateway.governance.narrowing import Need, narrow, need
from tokenmill.engine.gateway.money import Prices
from tokenmill.engine.gateway.pipeline import Exchange
from tokenmill.engine.gateway.portfolio import Route, Target
from tokenmill.engine.gateway.settings import Settings

TEAM = Account("search", "team", None, "Search", Limits(), 0, 0, 0, None)
LATENCY, COST = Reason("latency", "fast"), Reason("cost", "the least")
CONTEXT = Reason("context", "too long for small")


def backend(name: str, price: int, tier: str | None = None, **more: Any) -> Target:
    """One at which 1 token costs so many micro-cents."""
    prices = Prices(price * 1_000_000, price * 1_000_000, price * 1_000_000)
    return Target(Backend(name, "http://b", tier or name, ("m",), prices=prices, **more), Settings())


def bound_at(_: Target) -> Bound:
    return Bound(6, 4)


def asking(*routes: Route, escalation: str | None = None) -> Exchange:
    """A request of the router's with these routes, each of a tier."""
    asked = exchange("/v1/chat/completions", {})
    asked.routes = list(routes)
    tiers = tuple(route.targets[0].backend.tier for route in routes)
    reasons = (LATENCY, CONTEXT)
    asked.decision = Decision(
        tiers[0], tiers, (("vision", "capability"),), reasons, (1, 2, 3)[: len(tiers)], escalation
    )
    return asked


def refused(left: int) -> Refusal:
    """That of a budget with so much left."""
    return Refusal("budget", TEAM, 1000, 1000 - left, 999, None)


def names(asked: Exchange) -> list[str]:
    return [target.backend.name for route in asked.routes for target in route.targets]


def test_the_dearest_is_needed_and_both_where_one_takes_over() -> None:
    routes = [Route((backend("small", 1), backend("other", 3, "small")), "m"), Route((backend("large", 5),), "m")]
    assert need(asking(*routes), bound_at) == Need(50, 6, 4)
    assert need(asking(*routes, escalation="large"), bound_at) == Need(30 + 50, 12, 8)
    dearer = [*routes, Route((backend("vast", 9),), "m")]
    assert need(asking(*dearer, escalation="large"), bound_at) == Need(90, 12, 8)
    asked = asking(*routes)
    asked.decision = None
    assert need(asked, bound_at) == Need(50, 6, 4)


def test_only_what_cannot_be_paid_is_taken_away() -> None:
    routes = [Route((backend("small", 1), backend("other", 3, "small")), "m"), Route((backend("large", 5),), "m")]
    for left, kept in ((50, ["small", "other", "large"]), (49, ["small", "other"]), (30, ["small", "other"]),
                       (29, ["small"]), (10, ["small"])):  # fmt: skip
        asked = asking(*routes)
        assert narrow(asked, bound_at, refused(left)) is None
        assert names(asked) == kept
    final = narrow(asking(*routes), bound_at, refused(9))
    assert final == refused(9)._replace(asked=10)
    rate = Refusal("tokens", TEAM, 5, 0, 10, None)
    assert narrow(asking(*routes), bound_at, rate) is rate


def test_a_decision_says_what_was_taken_away() -> None:
    large, small = Route((backend("large", 5),), "m"), Route((backend("small", 1),), "m")
    asked = asking(large, small)
    assert narrow(asked, bound_at, refused(20)) is None
    decision = asked.decision
    assert decision is not None
    shown = "$2e-07 are left of the budget of the team"
    assert (decision.tier, decision.candidates, decision.costs) == ("small", ("small",), (2,))
    assert decision.refused == (("vision", "capability"), ("large", f"budget: {shown}"))
    # What was said of the tier that is gone is not said of another.
    assert decision.reasons == (Reason("cost", f"{shown}, too little for large"), CONTEXT)
    asked = asking(small, large)
    assert narrow(asked, bound_at, refused(20)) is None
    assert asked.decision is not None
    assert asked.decision.reasons == (Reason("cost", f"{shown}, too little for large"), LATENCY, CONTEXT)
    assert (asked.decision.tier, asked.decision.escalation) == ("small", None)


@pytest.mark.parametrize(("left", "takes_over"), [(60, "large"), (59, None), (50, None), (49, None)])
def test_a_tier_takes_over_where_both_answers_can_be_paid(left: int, takes_over: str | None) -> None:
    asked = asking(Route((backend("small", 1),), "m"), Route((backend("large", 5),), "m"), escalation="large")
    assert narrow(asked, bound_at, refused(left)) is None
    assert asked.decision is not None
    assert asked.decision.escalation == takes_over
    assert names(asked) == (["small", "large"] if left >= 50 else ["small"])
    assert need(asked, bound_at).amount <= left


@pytest.mark.parametrize(("prices", "left", "takes_over"), [((1, 5, 9), 60, "then"), ((9, 1, 5), 60, None)])
def test_whoever_takes_over_does_so_only_from_the_tier_that_was_chosen(
    prices: tuple[int, ...], left: int, takes_over: str | None
) -> None:
    tiers = ("first", "then", "other")
    routes = [Route((backend(tier, price),), "m") for tier, price in zip(tiers, prices, strict=True)]
    asked = asking(*routes, escalation="then")
    assert narrow(asked, bound_at, refused(left)) is None
    assert asked.decision is not None
    assert len(names(asked)) == 2
    assert asked.decision.escalation == takes_over


def test_canaries_alone_do_not_take_the_others_place() -> None:
    """Unless nobody else was there."""
    cheap = backend("canary", 1, "t", version="2", canary=0.1)
    asked = asking(Route((backend("stable", 5, "t"), cheap), "m"))
    assert narrow(asked, bound_at, refused(20)) == refused(20)._replace(asked=10)
    asked = asking(Route((backend("dear", 5, "t", version="2", canary=0.1), cheap), "m"))
    assert narrow(asked, bound_at, refused(20)) is None
    assert names(asked) == ["canary"]
    assert narrow(asked, bound_at, refused(9)) == refused(9)._replace(asked=10)


def test_what_only_follows_a_trouble_is_not_enough() -> None:
    """A fallback for prompts that are too long is taken after nobody; one for errors stands in."""
    dear = Route((backend("small", 5),), "m")
    asked = asking(dear, Route((backend("long", 1),), "m", after="context"))
    assert narrow(asked, bound_at, refused(20)) == refused(20)._replace(asked=10)
    asked = asking(dear, Route((backend("other", 1),), "m", after="error"))
    assert narrow(asked, bound_at, refused(20)) is None
    assert names(asked) == ["other"]
