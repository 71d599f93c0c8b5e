"""The router under governance: soft limits route down, keys bound the tiers, escalated requests are charged twice."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.running import RunningGateway, wait_until
from tests.gateway.upstream import FakeUpstream
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.governance import bounds
from tokenmill.engine.gateway.governance.options import Options, digest
from tokenmill.engine.gateway.money import Prices
from tokenmill.engine.gateway.router.settings import EscalationSettings, RoutingSettings
from tokenmill.engine.gateway.settings import Settings

MASTER = "a master key of some length"
CHEAP, DEAR = Prices(10_000_000, 10_000_000, 10_000_000), Prices(500_000_000, 500_000_000, 500_000_000)


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[FakeUpstream, FakeUpstream]]:
    small, large = FakeUpstream(("small",)).start(), FakeUpstream(("large",)).start()
    yield small, large
    small.stop()
    large.stop()


@pytest.fixture(scope="module")
def gateway(pair: tuple[FakeUpstream, FakeUpstream], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with running(pair, tmp_path_factory.mktemp("books") / "books.sqlite") as made:
        yield made


def running(
    pair: tuple[FakeUpstream, FakeUpstream],
    store: Path,
    allowance_s: float = 30.0,
    models: tuple[tuple[str, ...], tuple[str, ...]] = (("small",), ("large",)),
) -> RunningGateway:
    """A gateway that asks the small model first."""
    backends = (
        Backend("small", pair[0].url, "utility", models[0], prices=CHEAP, quality=0.6, capabilities=("logprobs",)),
        Backend("large", pair[1].url, "reasoning", models[1], prices=DEAR, quality=0.9),
    )
    routing = RoutingSettings(escalation=EscalationSettings("utility", "reasoning", 0.5, allowance_s=allowance_s))
    options = Options(str(store), digest(MASTER), completion_bound=50)
    settings = Settings(default_model="auto")
    return RunningGateway(*backends, settings=settings, governance=options, key=MASTER, routing=routing)


def post(gateway: RunningGateway, path: str, body: Any, key: str = MASTER, **headers: str) -> tuple[int, Any, Any]:
    status, found, raw = gateway.post(path, body, authorization=f"Bearer {key}", **headers)
    return status, found, json.loads(raw)


def ask(gateway: RunningGateway, key: str, **more: Any) -> tuple[int, Any, Any]:
    headers = more.pop("headers", {})
    body = {"model": "auto", "messages": [{"role": "user", "content": "What is it?"}], "max_tokens": 10, **more}
    return post(gateway, "/v1/chat/completions", body, key, **headers)


def new_key(gateway: RunningGateway, **fields: Any) -> str:
    status, _, made = post(gateway, "/key/generate", fields)
    assert status == 200, made
    return str(made["key"])


def spent(gateway: RunningGateway, key: str) -> float:
    status, _, raw = gateway.send("GET", f"/key/info?key={key}", None, {"authorization": f"Bearer {MASTER}"})
    assert status == 200, raw
    return float(json.loads(raw)["info"]["spend"])


def test_an_escalated_request_is_charged_for_both_answers(
    gateway: RunningGateway, pair: tuple[FakeUpstream, FakeUpstream]
) -> None:
    key = new_key(gateway)
    before = [(one.books.prompt_tokens, one.books.completion_tokens) for one in pair]
    status, headers, _ = ask(gateway, key, act={"small": {"logprob": -3.0}, "large": {}})
    assert (status, headers["x-tokenmill-escalated"]) == (200, "true")
    used = [
        (one.books.prompt_tokens - prompt, one.books.completion_tokens - completion)
        for one, (prompt, completion) in zip(pair, before, strict=True)
    ]
    micro_cents = sum(price.cost(prompt, 0, completion) for price, (prompt, completion) in
                      zip((CHEAP, DEAR), used, strict=True))  # fmt: skip
    assert all(prompt and completion for prompt, completion in used)
    wait_until(lambda: spent(gateway, key) == pytest.approx(micro_cents / 1e8, rel=1e-9))
    # Each answer is a row of its own, with its own tier, and sums by whatever column agree.
    first, then = used
    expected = {
        "utility": (0, *first, CHEAP.cost(first[0], 0, first[1])),
        "reasoning": (1, *then, DEAR.cost(then[0], 0, then[1])),
    }
    assert summed(gateway, key, "tier") == expected
    assert summed(gateway, key, "backend") == {"small": expected["utility"], "large": expected["reasoning"]}
    assert set(summed(gateway, key, "kind")) == {"answer", "escalated-from"}
    total = tuple(map(sum, zip(*expected.values(), strict=True)))
    assert total[0] == 1
    for column in ("key", "team", "organisation", "outcome", "day"):
        assert list(summed(gateway, key, column).values()) == [total], column


@pytest.mark.parametrize("stream", [False, True])
def test_a_second_tier_that_is_given_up_is_charged_at_its_bound(
    pair: tuple[FakeUpstream, FakeUpstream], tmp_path: Path, stream: bool
) -> None:
    asked = {"act": {"small": {"logprob": -3.0}, "large": {"delay_s": 29}}, "stream": stream}
    with running(pair, tmp_path / "books.sqlite", allowance_s=1.5) as gateway:
        key = new_key(gateway, max_budget=sum(bounds_of(**asked)) / 1e8)
        body = {"model": "auto", "messages": [{"role": "user", "content": "What is it?"}], "max_tokens": 10, **asked}
        status, headers, _ = gateway.post("/v1/chat/completions", body, authorization=f"Bearer {key}")
        assert (status, headers["x-tokenmill-escalated"]) == (200, "false")
        wait_until(lambda: spent(gateway, key) > 0)
        kinds = summed(gateway, key, "kind")
        assert {kind: row[-1] for kind, row in kinds.items() if kind != "answer"} == {"failed": bounds_of(**asked)[1]}
        assert spent(gateway, key) * 1e8 == pytest.approx(sum(row[-1] for row in kinds.values()))


def test_a_stream_that_breaks_while_it_is_held_and_the_tier_that_takes_over_are_paid(
    gateway: RunningGateway, pair: tuple[FakeUpstream, FakeUpstream]
) -> None:
    asked = {"act": {"small": {"logprob": -0.01, "cut_after": 3}, "large": {}}, "stream": True}
    key = new_key(gateway, max_budget=sum(bounds_of(**asked)) / 1e8)
    body = {"model": "auto", "messages": [{"role": "user", "content": "What is it?"}], "max_tokens": 10, **asked}
    status, headers, _ = gateway.post("/v1/chat/completions", body, authorization=f"Bearer {key}")
    assert (status, headers["x-tokenmill-tier"]) == (200, "reasoning")
    wait_until(lambda: spent(gateway, key) > 0)
    assert set(summed(gateway, key, "kind")) == {"answer", "failed"}
    assert 0 < spent(gateway, key) * 1e8 <= sum(bounds_of(**asked))


def summed(gateway: RunningGateway, key: str, column: str) -> dict[str, tuple[int, ...]]:
    """The ledger's sums of one key: value of the column to (requests, prompt, completion, micro-cents)."""
    headers = {"authorization": f"Bearer {MASTER}"}
    identity = json.loads(gateway.send("GET", f"/key/info?key={key}", None, headers)[2])["info"]["key_name"]
    found = json.loads(gateway.send("GET", f"/admin/ledger?by={column}&key={identity}", None, headers)[2])["rows"]
    return {
        row[column]: (row["requests"], row["prompt_tokens"], row["completion_tokens"], row["cost"]) for row in found
    }


def test_a_key_bounds_the_tiers(gateway: RunningGateway) -> None:
    key = new_key(gateway, models=["auto", "utility"])
    status, headers, _ = ask(gateway, key, headers={"x-tokenmill-quality": "0.9"}, act={"small": {"logprob": -3.0}})
    assert (status, headers["x-tokenmill-tier"]) == (200, "utility")
    assert "x-tokenmill-escalated" not in headers
    assert ask(gateway, key, model="large")[0] == 403
    assert ask(gateway, new_key(gateway, models=["small"]))[0] == 403


def test_a_tier_gives_a_key_the_models_of_its_list_alone(tmp_path: Path) -> None:
    small, large = FakeUpstream(("dear", "small")).start(), FakeUpstream(("vast", "large")).start()
    with running((small, large), tmp_path / "books.sqlite", models=(("dear", "small"), ("vast", "large"))) as gateway:
        key = new_key(gateway, models=["auto", "large", "small"])
        unsure = {"small": {"logprob": -3.0}, "large": {}}
        for act, expected in ((unsure, "large"), ({"small": {"logprob": -0.01}}, "small"),
                              ({"small": {"status": 500}, "large": {}}, "large")):  # fmt: skip
            status, _, answer = ask(gateway, key, act=act)
            assert (status, answer["model"]) == (200, expected)
        bearer = {"authorization": f"Bearer {key}"}
        question = {"messages": [{"role": "user", "content": "hi"}], "act": {"small": {"logprob": -0.01}}}
        assert gateway.post("/v1/chat/completions", question, **bearer)[0] == 200
        named = [json.loads(raw)["model"] for one in (small, large) for _, _, raw in one.books.requests]
        assert set(named) == {"small", "large"}
    small.stop()
    large.stop()


def test_a_keys_metadata_confines_it_without_a_section(gateway: RunningGateway) -> None:
    key = new_key(gateway, metadata={"zones": ["cloud"]})
    status, _, body = ask(gateway, key)
    assert (status, body["error"]["code"]) == (403, "residency")
    assert ask(gateway, key, model="small")[0] == 403


def test_the_dry_run_needs_a_key_and_costs_nothing(gateway: RunningGateway) -> None:
    key = new_key(gateway)
    asked = {"model": "auto", "messages": [{"role": "user", "content": "hi"}]}
    status, _, body = post(gateway, "/v1/tokenmill/route", asked, key)
    assert (status, body["decision"]["tier"]) == (200, "utility")
    assert spent(gateway, key) == 0
    assert gateway.post("/v1/tokenmill/route", asked, authorization="Bearer sk-wrong")[0] == 401
    status, _, body = post(gateway, "/v1/tokenmill/route", {**asked, "model": "large"}, key)
    assert (status, [one["backend"] for one in body["backends"]]) == (200, ["large"])
    for model in ("large", "reasoning"):
        bound = new_key(gateway, models=["auto", "utility"])
        status, _, body = post(gateway, "/v1/tokenmill/route", {**asked, "model": model}, bound)
        assert (status, body["error"]["code"]) == (403, "model_not_allowed")


HARD = "Prove it step by step, explain why it must hold, compare both proofs and design an algorithm. " * 5


def bounds_of(**more: Any) -> tuple[int, int]:
    """(small's, large's) price of the bound of what `ask` sends, in micro-cents."""
    body = {"model": "auto", "messages": [{"role": "user", "content": "What is it?"}], "max_tokens": 10, **more}
    tokens = len(json.dumps(body)) + bounds.TEMPLATE_TOKENS + body["max_tokens"]
    return 10 * tokens, 500 * tokens


@pytest.mark.parametrize("text", ["What is it?", HARD])
def test_a_budget_takes_away_only_what_it_cannot_pay(
    gateway: RunningGateway, pair: tuple[FakeUpstream, FakeUpstream], text: str
) -> None:
    for act in ({"small": {"logprob": -3.0}}, {"small": {"status": 503, "body": "{}"}}):
        asked = {"messages": [{"role": "user", "content": text}], "act": act}
        small, large = bounds_of(**asked)
        before = len(pair[1].books.requests)
        status, headers, _ = ask(gateway, new_key(gateway, max_budget=(large - 1) / 1e8), **asked)
        assert status == (200 if "logprob" in act["small"] else 503)
        assert headers["x-tokenmill-tier"] == "utility"
        reason = headers["x-tokenmill-reason"]
        assert "are left of the budget of the key, too little for reasoning" in reason
        assert "failed over" not in reason and "reasoning manages" not in reason
        assert "x-tokenmill-escalated" not in headers
        assert len(pair[1].books.requests) == before, "nobody is asked who is not reserved for"
        status, _, body = ask(gateway, new_key(gateway, max_budget=(small - 1) / 1e8), **asked)
        assert (status, body["error"]["code"]) == (429, "insufficient_quota")
        assert f"may cost ${small / 1e8:.8g}" in body["error"]["message"]


def test_a_budget_for_one_answer_is_none_for_two(
    gateway: RunningGateway, pair: tuple[FakeUpstream, FakeUpstream]
) -> None:
    unsure, failing = {"act": {"small": {"logprob": -3.0}}}, {"act": {"small": {"status": 503, "body": "{}"}}}
    small, large = bounds_of(**unsure)
    status, headers, _ = ask(gateway, new_key(gateway, max_budget=(small + large) / 1e8), **unsure)
    assert (status, headers["x-tokenmill-escalated"]) == (200, "true")
    status, headers, _ = ask(gateway, new_key(gateway, max_budget=(small + large - 1) / 1e8), **unsure)
    assert (status, headers["x-tokenmill-tier"]) == (200, "utility")
    assert "x-tokenmill-escalated" not in headers
    small, large = bounds_of(**failing)
    status, headers, _ = ask(gateway, new_key(gateway, max_budget=large / 1e8), **failing)
    assert (status, headers["x-tokenmill-tier"]) == (200, "reasoning"), "it may still take over after an error"


def test_a_narrowed_budget_holds_at_once(gateway: RunningGateway, pair: tuple[FakeUpstream, FakeUpstream]) -> None:
    asked = {"messages": [{"role": "user", "content": HARD}]}
    small, large = bounds_of(**asked)
    limit = 12 * small
    assert limit < large
    key = new_key(gateway, max_budget=limit / 1e8)
    before = [(one.books.prompt_tokens, one.books.completion_tokens) for one in pair]
    with ThreadPoolExecutor(8) as clients:
        statuses = list(clients.map(lambda _: ask(gateway, key, **asked)[0], range(100)))
    used = [
        (one.books.prompt_tokens - prompt, one.books.completion_tokens - completion)
        for one, (prompt, completion) in zip(pair, before, strict=True)
    ]
    assert set(statuses) == {200, 429}
    assert used[1] == (0, 0)
    true_cost = CHEAP.cost(used[0][0], 0, used[0][1])
    assert 0 < true_cost <= limit
    wait_until(lambda: spent(gateway, key) == pytest.approx(true_cost / 1e8, rel=1e-9))


def test_past_the_soft_limit_cheaper_tiers_go_first(gateway: RunningGateway) -> None:
    key = new_key(gateway, max_budget=10.0, soft_budget=0.00000001)
    asked = {"messages": [{"role": "user", "content": HARD}], "act": {"small": {"logprob": -3.0}}}
    status, headers, _ = ask(gateway, key, **asked)
    assert (status, headers["x-tokenmill-tier"]) == (200, "reasoning")

    def routed_down() -> bool:
        status, headers, _ = ask(gateway, key, **asked)
        assert status == 200
        down = bool(headers["x-tokenmill-tier"] == "utility")
        assert not down or "soft limit is passed" in headers["x-tokenmill-reason"]
        assert not down or "x-tokenmill-escalated" not in headers
        return down

    wait_until(routed_down)
