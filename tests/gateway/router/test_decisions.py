"""Decisions of the router itself: budgets, keys, zones, bursts, what is logged of them."""

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.gateway.running import RunningGateway
from tests.gateway.upstream import Books, FakeUpstream
from tokenmill.engine.gateway.api_error import ApiError
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.balance import Balancer
from tokenmill.engine.gateway.body import Body
from tokenmill.engine.gateway.money import MICRO_CENTS_PER_DOLLAR, Prices
from tokenmill.engine.gateway.pipeline import Exchange, Reply
from tokenmill.engine.gateway.portfolio import Portfolio
from tokenmill.engine.gateway.principal import Principal
from tokenmill.engine.gateway.router.outcomes import OutcomeLog
from tokenmill.engine.gateway.router.settings import EscalationSettings, RoutingSettings
from tokenmill.engine.gateway.router.stage import Router
from tokenmill.engine.gateway.sensitivity.clearance import NOTE, Clearance
from tokenmill.engine.gateway.settings import Settings

HARD = "Prove the theorem step by step, explain why it must hold, compare both proofs and design an algorithm. " * 4


def backend(name: str, tier: str, price: int, quality: float, **more: Any) -> Backend:
    prices = Prices(price, price, price)
    return Backend(name, "http://127.0.0.1:9", tier, (name,), prices=prices, quality=quality, **more)


def routed(
    backends: Sequence[Backend] | Portfolio,
    settings: RoutingSettings | None = None,
    text: str = HARD,
    principal: Principal | None = None,
    clearance: Clearance | None = None,
    model: str = "auto",
    endpoint: str = "/v1/chat/completions",
    **more: Any,
) -> Exchange:
    """An exchange after the router."""
    payload = json.dumps({"model": model, "messages": [{"role": "user", "content": text}], **more}).encode()
    exchange = Exchange(endpoint, [], payload, body=Body(payload), model=model, request_id="r", forward=[])
    exchange.principal = principal
    if clearance is not None:
        exchange.notes[NOTE] = clearance

    async def last(_: Exchange) -> Reply:
        return Reply(200)

    portfolio = backends if isinstance(backends, Portfolio) else Portfolio(backends, Settings())
    router = Router(portfolio, settings or RoutingSettings())
    asyncio.run(router.handle(exchange, last))
    return exchange


TWO = (backend("small", "utility", 1_000, 0.3), backend("large", "reasoning", 100_000, 0.9))


def order(exchange: Exchange) -> list[str]:
    return [target.backend.name for route in exchange.routes for target in route.targets]


def test_a_soft_limit_routes_down() -> None:
    assert order(routed(TWO)) == ["large", "small"]
    poor = routed(TWO, principal=Principal("k", soft_limit_reached=True))
    assert order(poor) == ["small", "large"]
    assert poor.decision is not None
    assert "soft limit is passed" in next(one.verdict for one in poor.decision.reasons if one.criterion == "cost")
    # What the client states goes before it.
    stated = routed(TWO, principal=Principal("k", soft_limit_reached=True), metadata={"tokenmill_quality": 0.8})
    assert order(stated) == ["large", "small"]


def test_of_tiers_that_cost_the_same_the_better_goes_first() -> None:
    alike = (backend("good", "utility", 1_000, 0.8), backend("better", "reasoning", 1_000, 0.9))
    assert order(routed(alike, text="Hello.")) == ["better", "good"]


def test_a_key_is_held_to_its_regions() -> None:
    there = (
        backend("eu", "t", 1, 0.9, region="eu"),
        backend("us", "t", 1, 0.9, region="us"),
        backend("nowhere", "t", 1, 0.9),
        backend("far", "other", 1, 0.9, region="us"),
    )
    portfolio = Portfolio(there, Settings())
    for regions, seen in (({"eu"}, ["eu"]), ({"eu", "us"}, ["eu", "us"]), ({"uk"}, [])):
        clearance = Clearance(regions=frozenset(regions))
        narrowed = clearance.narrow(portfolio.routes("t"))
        assert [target.backend.name for route in narrowed for target in route.targets] == seen
        if seen:
            assert set(order(routed(portfolio, clearance=clearance))) == {*seen, *({"far"} if "us" in regions else ())}
        else:
            with pytest.raises(ApiError) as caught:
                routed(portfolio, clearance=clearance)
            assert (caught.value.status, "region uk" in caught.value.message) == (403, True)


def test_a_key_is_held_to_its_models() -> None:
    assert order(routed(TWO, principal=Principal("k", models=("auto", "utility")))) == ["small"]
    assert order(routed(TWO, principal=Principal("k", models=("auto", "large")))) == ["large"]
    assert order(routed(TWO, principal=Principal("k", models=("auto",)))) == ["large", "small"]
    assert order(routed(TWO, principal=Principal("k", models=("auto", "larg*")))) == ["large"]
    assert order(routed(TWO, principal=Principal("k", models=("*",)))) == ["large", "small"]
    with pytest.raises(ApiError) as refused:
        routed(TWO, principal=Principal("k", models=("auto", "other")))
    assert (refused.value.status, refused.value.code) == (403, "model_not_allowed")


def test_a_tier_is_asked_for_a_model_that_the_keys_list_holds() -> None:
    several = replace(TWO[0], models=("dear", "small", "tiny"))
    tier = [several, replace(several, name="other", models=("dear", "tiny")), TWO[1]]
    portfolio = Portfolio(tier, Settings())

    def asked(*models: str) -> list[tuple[str | None, list[str]]]:
        exchange = routed(portfolio, principal=Principal("k", models=models))
        assert exchange.routes is not None
        return [(route.model, [target.backend.name for target in route.targets]) for route in exchange.routes]

    assert asked("auto", "small", "tiny") == [("small", ["small"])]
    assert asked("auto", "tiny", "small") == [("tiny", ["small", "other"])]
    assert asked("auto", "t*y") == [("tiny", ["small", "other"])]
    assert asked("small", "auto", "large") == [("large", ["large"]), ("small", ["small"])]
    assert asked("auto", "small", "utility") == asked("auto", "util*") == [(None, ["small", "other"])]
    assert asked("auto") == asked("*") == [(None, ["large"]), (None, ["small", "other"])]
    portfolio.replace([replace(several, models=("dear", "tiny")), *tier[1:]])
    assert asked("auto", "small", "tiny") == [("tiny", ["small", "other"])]


def test_nobody_who_may_see_it_is_a_refusal() -> None:
    away = [backend("vast", "frontier", 1, 0.9, zone="cloud")]
    with pytest.raises(ApiError) as refused:
        routed(away, clearance=Clearance(action="stay", zones=frozenset({"on-premises"}), why="it holds iban"))
    assert (refused.value.status, refused.value.code) == (403, "residency")
    assert "it holds iban" in refused.value.message


def test_among_equals_the_cheapest_goes_first() -> None:
    three = [backend("a", "a", 3_000_000, 0.9), backend("b", "b", 1_000_000, 0.9), backend("c", "c", 2_000_000, 0.9)]
    exchange = routed(three)
    assert order(exchange) == ["b", "c", "a"]
    assert exchange.decision is not None
    assert exchange.decision.candidates == ("b", "c", "a")


MIXED = (
    backend("cloud", "t", 1, 0.9, zone="cloud"),
    backend("edge", "t", 1, 0.9, zone="edge"),
    backend("here", "t", 1, 0.9, max_concurrency=2),
)


def test_what_is_down_is_neither_counted_nor_preferred() -> None:
    free, dear = backend("free", "utility", 0, 0.9), backend("dear", "utility", 5 * 10**9, 0.9)
    portfolio = Portfolio([free, dear, backend("other", "reasoning", 10**9, 0.9)], Settings())
    exchange = routed(portfolio)
    assert exchange.decision is not None
    assert (exchange.decision.tier, exchange.decision.cost) == ("utility", 0)
    portfolio.targets[0].mark_down("connection refused")
    exchange = routed(portfolio)
    assert exchange.decision is not None
    assert exchange.decision.tier == "reasoning", "the free one is down, and the dear one is dearer"
    portfolio.targets[2].mark_down("connection refused")
    exchange = routed(portfolio)
    assert exchange.decision is not None
    assert exchange.decision.candidates == ("utility", "reasoning")


def test_nearer_zones_go_first() -> None:
    assert order(routed(MIXED)) == ["here", "edge", "cloud"]
    assert order(routed(MIXED, RoutingSettings(burst=False))) == ["here"]
    kept = Clearance(action="stay", zones=frozenset({"edge", "on-premises"}))
    assert order(routed(MIXED, clearance=kept)) == ["here", "edge"]


@pytest.mark.parametrize("model", ["auto", "t", "m"])
@pytest.mark.parametrize(("stable", "canary"), [("on-premises", "cloud"), ("cloud", "on-premises"), ("edge", "edge")])
def test_a_canarys_share_is_of_all_zones(model: str, stable: str, canary: str) -> None:
    old = Backend("old", "http://127.0.0.1:9", "t", ("m",), zone=stable)  # type: ignore[arg-type] # a word of three
    new = Backend("new", "http://127.0.0.1:9", "t", ("m",), zone=canary, canary=0.2)  # type: ignore[arg-type]
    for settings in (RoutingSettings(), RoutingSettings(burst=False), RoutingSettings(burst_queue=1)):
        portfolio = Portfolio([old, new], Settings())
        exchange = routed(portfolio, settings, model=model)
        (route,) = exchange.routes
        counts = Counter(Balancer().choose(route, exchange) for _ in range(4000))
        assert abs(counts[portfolio.targets[1]] / 4000 - 0.2) < 0.04
        assert counts.total() == counts[portfolio.targets[0]] + counts[portfolio.targets[1]]


def test_a_canary_where_the_request_may_not_go_gets_none() -> None:
    portfolio = Portfolio([backend("here", "t", 1, 0.9), backend("new", "t", 1, 0.9, zone="cloud", canary=1.0)],
                          Settings())  # fmt: skip
    kept = Clearance(action="stay", zones=frozenset({"on-premises"}))
    exchange = routed(portfolio, clearance=kept)
    assert order(exchange) == ["here"]
    assert {Balancer().choose(route, exchange) for route in exchange.routes} == {portfolio.targets[0]}
    named = routed(portfolio, model="t")
    (route,) = kept.narrow(named.routes)
    assert Balancer().choose(route, named) is portfolio.targets[0]


def test_what_a_canary_costs_does_not_decide() -> None:
    exchange = routed([backend("old", "t", 1_000_000, 0.9, zone="cloud"),
                       backend("new", "t", 9_000_000, 0.9, canary=0.1)], text="hi")  # fmt: skip
    assert exchange.decision is not None
    assert 0 < exchange.decision.cost < 400, "at the stable one's price, although the canary is nearer"


def test_workers_share_the_queue_from_which_others_take_over() -> None:
    two = [backend("here", "t", 1, 0.9), backend("away", "t", 1, 0.9, zone="cloud")]
    for workers, first in ((1, "here"), (2, "away"), (8, "away")):
        portfolio = Portfolio(two, Settings(workers=workers))
        portfolio.targets[0].outstanding = 2
        assert order(routed(portfolio, RoutingSettings(burst_queue=4)))[0] == first
        portfolio.targets[0].outstanding = 0
        assert order(routed(portfolio, RoutingSettings(burst_queue=4)))[0] == "here"


def test_escalation_is_planned_only_where_it_may_happen() -> None:
    able = (
        backend("small", "utility", 1_000, 0.9, capabilities=("logprobs",)),
        backend("large", "reasoning", 100_000, 0.95),
    )
    settings = RoutingSettings(escalation=EscalationSettings("utility", "reasoning", 0.5))

    def planned(*backends: Backend, **more: Any) -> str | None:
        decision = routed(backends or able, settings, "hi", **more).decision
        assert decision is not None
        return decision.escalation

    assert planned() == "reasoning"
    assert planned(n=2) is None
    assert planned(*TWO) is None
    assert planned(principal=Principal("k", soft_limit_reached=True)) is None
    assert planned(principal=Principal("k", models=("auto", "utility"))) is None
    far = (able[0], backend("large", "reasoning", 100_000, 0.95, zone="cloud"))
    assert planned(*far) == "reasoning"
    assert planned(*far, clearance=Clearance(action="stay", zones=frozenset({"on-premises"}))) is None


def test_both_answers_of_an_escalation_are_within_the_stated_cost() -> None:
    dear = (
        backend("small", "utility", 10**9, 0.9, capabilities=("logprobs",)),
        backend("large", "reasoning", 2 * 10**9, 0.95),
    )
    settings = RoutingSettings(escalation=EscalationSettings("utility", "reasoning", 0.5))
    found = routed(dear, settings, "hi").decision
    assert found is not None
    both = sum(found.costs)
    for most, then in ((both, "reasoning"), (both - 1, None)):
        stated = {"tokenmill_max_cost": most / MICRO_CENTS_PER_DOLLAR}
        decision = routed(dear, settings, "hi", metadata=stated).decision
        assert decision is not None
        assert (decision.costs, decision.escalation) == (found.costs, then)


@pytest.mark.parametrize("queue", [None, 2])
def test_overflow_bursts_to_the_cloud_and_only_then(queue: int | None) -> None:
    here, cloud = FakeUpstream(("m",)).start(), FakeUpstream(("m",)).start()
    near = Backend("here", here.url, "t", ("m",), max_concurrency=4 if queue is None else None, quality=0.9)
    away = Backend("cloud", cloud.url, "t", ("m",), zone="cloud", quality=0.9)
    settings = RoutingSettings(burst_queue=queue)
    most = queue or 4
    with RunningGateway(near, away, routing=settings) as gateway:

        def ask(_: int) -> int:
            body = {"model": "auto", "messages": [{"role": "user", "content": "hi"}], "act": {"delay_s": 0.5}}
            return gateway.post("/v1/chat/completions", body)[0]

        assert [ask(number) for number in range(3)] == [200] * 3
        assert (len(here.books.requests), len(cloud.books.requests)) == (3, 0)
        here.books, cloud.books = Books(), Books()
        with ThreadPoolExecutor(most + 3) as clients:
            assert list(clients.map(ask, range(most + 3))) == [200] * (most + 3)
        assert here.books.most_open == most
        assert len(cloud.books.requests) == 3
    here.stop()
    cloud.stop()


def test_outcomes_are_logged_without_text(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.jsonl"

    async def run() -> None:
        log = OutcomeLog(path)
        router = Router(Portfolio(TWO, Settings()), RoutingSettings(), log)
        await log.start()
        for number in range(5):
            payload = json.dumps({"messages": [{"role": "user", "content": f"the secret plan {number}"}]}).encode()
            exchange = Exchange("/v1/chat/completions", [], payload, body=Body(payload), model="auto",
                                request_id=f"r{number}", forward=[])  # fmt: skip

            async def last(one: Exchange) -> Reply:
                one.status, one.outcome = 200, "ok"
                return Reply(200)

            await router.handle(exchange, last)
            exchange.notes["escalation"] = {"confidence": 0.25, "escalated": True}
            exchange.end()
        await log.stop()

    asyncio.run(run())
    lines = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    assert [line["id"] for line in lines] == ["r0", "r1", "r2", "r3", "r4"]
    assert lines[0]["features"]["bias"] == 1
    assert (lines[0]["confidence"], lines[0]["escalated"], lines[0]["status"]) == (0.25, True, 200)
    assert "secret" not in path.read_text()


FULL = """
import asyncio, resource, sys
from pathlib import Path
from tokenmill.engine.gateway.pipeline import Exchange
from tokenmill.engine.gateway.router.outcomes import OutcomeLog

log = OutcomeLog(Path(sys.argv[1]))

async def end(count):
    for _ in range(count):
        log.add(Exchange("/x", [], b"", body=None, model="auto", request_id="r", forward=[]), {}, 0.5)
    await log._write()

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
asyncio.run(end(20))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
asyncio.run(end(3))
"""


def test_a_line_that_a_full_disk_cuts_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "log"
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=True)
    assert "cannot be written" in done.stderr
    *before, cut, first, second, third = path.read_text().splitlines()
    assert 0 < len(before) < 20
    assert cut.startswith('{"id":"r"')
    assert len(cut) < len(before[0])
    assert [json.loads(line)["id"] for line in (*before, first, second, third)] == ["r"] * (len(before) + 3)


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        log = OutcomeLog(tmp_path / "no folder" / "log")
        payload = b'{"messages": []}'
        exchange = Exchange("/v1/chat/completions", [], payload, body=Body(payload), model="auto", request_id="r",
                            forward=[])  # fmt: skip
        log.add(exchange, {}, 0.5)
        await log.stop()

    asyncio.run(run())
    assert "cannot be written" in caplog.text
