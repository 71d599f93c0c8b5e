"""The router in a real worker: each of the six criteria decides, and says so."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.gateway.running import RunningGateway
from tests.gateway.upstream import Books, FakeUpstream
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.money import Prices
from tokenmill.engine.gateway.router.settings import RoutingSettings, Rule
from tokenmill.engine.gateway.sensitivity.settings import SensitivitySettings

EASY = "What is the capital of France?"
HARD = (
    "Prove step by step that the derivative of x^2 is 2x, explain why the limit exists, compare the proof with the one "
    "by infinitesimals, and design an algorithm that must check it without floating point. "
) * 3
CHEAP, DEAR = Prices(10_000_000, 10_000_000, 20_000_000), Prices(300_000_000, 300_000_000, 900_000_000)


class Factory:
    """Upstreams by name, and a gateway in front of them."""

    def __init__(self) -> None:
        self.small, self.large, self.cloud, self.embed = (
            FakeUpstream((name,)).start() for name in ("small", "large", "vast", "embed")
        )
        self.gateway = RunningGateway(
            Backend("small", self.small.url, "utility", prices=CHEAP, context_window=4000, quality=0.6,
                    capabilities=("logprobs",)),
            Backend("large", self.large.url, "reasoning", prices=DEAR, context_window=64_000, quality=0.9,
                    version="2026-05\N{GREEK SMALL LETTER BETA}\n2", capabilities=("tools", "json", "vision")),
            Backend("vast", self.cloud.url, "frontier", prices=Prices(900_000_000, 900_000_000, 2_000_000_000),
                    zone="cloud", quality=0.97, capabilities=("tools", "json", "vision")),
            Backend("embed", self.embed.url, "embedding", prices=CHEAP, quality=0.9, capabilities=("embeddings",)),
            routing=RoutingSettings(rules=(Rule(matches="(?i)^translate", tier="reasoning"),)),
            sensitivity=SensitivitySettings(),
        )  # fmt: skip

    def ask(self, text: str = EASY, path: str = "/v1/chat/completions", model: str | None = "auto", **more: Any) -> Any:
        headers = more.pop("headers", {})
        body = {"model": model, "messages": [{"role": "user", "content": text}], **more}
        return self.gateway.post(path, body, **headers)

    def tier(self, *arguments: Any, **more: Any) -> tuple[str, str]:
        status, headers, body = self.ask(*arguments, **more)
        assert status == 200, body
        return headers["x-tokenmill-tier"], headers["x-tokenmill-reason"]

    def explained(self, *arguments: Any, **more: Any) -> Any:
        status, _, body = self.ask(*arguments, path="/v1/tokenmill/route", **more)
        assert status == 200, body
        return json.loads(body)

    def close(self) -> None:
        for upstream in (self.small, self.large, self.cloud, self.embed):
            upstream.stop()


@pytest.fixture(scope="module")
def factory() -> Iterator[Factory]:
    built = Factory()
    with built.gateway:
        yield built
    built.close()


def test_complexity_decides(factory: Factory) -> None:
    tier, reason = factory.tier(EASY)
    assert tier == "utility"
    assert "complexity: looks" in reason
    tier, reason = factory.tier(HARD)
    assert tier != "utility"
    assert "complexity: looks" in reason


def test_the_quality_asked_for_decides(factory: Factory) -> None:
    assert factory.tier(EASY, headers={"x-tokenmill-quality": "0.85"})[0] == "reasoning"
    tier, reason = factory.tier(EASY, headers={"x-tokenmill-quality": "0.95"})
    assert tier == "frontier"
    assert "quality: frontier reaches 0.97 of the asked 0.95" in reason
    assert factory.tier(HARD, headers={"x-tokenmill-quality": "0.1"})[0] == "utility"
    assert factory.tier(EASY, metadata={"tokenmill_quality": "0.85"})[0] == "reasoning"
    tier, reason = factory.tier(EASY, headers={"x-tokenmill-quality": "1"})
    assert tier == "frontier"
    assert "comes nearest" in reason


def test_the_cost_decides(factory: Factory) -> None:
    most = factory.explained(HARD, headers={"x-tokenmill-quality": "0.9"})["decision"]["cost"] / 1e8
    tier, reason = factory.tier(HARD, headers={"x-tokenmill-max-cost": str(most / 2)})
    assert tier == "utility"
    assert "within the stated" in reason
    tier, reason = factory.tier(HARD, headers={"x-tokenmill-max-cost": "0"})
    assert tier == "utility"
    assert "the least, although above" in reason
    assert "cost: about $" in factory.tier(EASY)[1]


def test_context_length_decides(factory: Factory) -> None:
    tier, reason = factory.tier("word " * 5000, headers={"x-tokenmill-quality": "0.1"})
    assert tier == "reasoning"
    assert "context: about" in reason
    assert "too many for utility" in reason
    assert factory.tier(EASY, max_tokens=5000, headers={"x-tokenmill-quality": "0.1"})[0] == "reasoning"


def test_sensitivity_decides(factory: Factory) -> None:
    factory.cloud.books = Books()
    wanted = {"x-tokenmill-quality": "0.95"}
    tier, reason = factory.tier("My card is 4111 1111 1111 1111.", headers=wanted)
    assert tier == "reasoning"
    assert "sensitivity: it holds credit_card: stays in on-premises" in reason
    tier, reason = factory.tier(EASY, headers={**wanted, "x-tokenmill-sensitivity": "private"})
    assert tier == "reasoning"
    assert not factory.cloud.books.requests


def test_latency_decides(factory: Factory) -> None:
    slow = {"small": {"delay_s": 0.4}}
    for _ in range(3):
        factory.tier(EASY, stream=True, act=slow)
        factory.tier(EASY, stream=True, headers={"x-tokenmill-quality": "0.85"})
        factory.tier(EASY, stream=True, headers={"x-tokenmill-quality": "0.95"})
    assert factory.tier(EASY)[0] == "utility"
    tier, reason = factory.tier(EASY, headers={"x-tokenmill-latency": "fast"})
    assert tier in ("reasoning", "frontier")
    assert "latency: fast: first token expected of" in reason
    assert factory.tier(EASY, headers={"x-tokenmill-latency": "interactive"})[0] == "utility", "half a second will do"
    assert factory.tier(EASY, headers={"x-tokenmill-latency": "batch"})[0] == "utility"


def test_capabilities_are_hard(factory: Factory) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    picture = [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]
    assert factory.tier(EASY, tools=tools, headers={"x-tokenmill-quality": "0.1"})[0] == "reasoning"
    status, headers, _ = factory.gateway.post(
        "/v1/chat/completions", {"model": "auto", "messages": [{"role": "user", "content": picture}]}
    )
    assert (status, headers["x-tokenmill-tier"]) == (200, "reasoning")
    status, headers, _ = factory.gateway.post("/v1/embeddings", {"model": "auto", "input": "a text"})
    assert (status, headers["x-tokenmill-tier"]) == (200, "embedding")
    status, _, body = factory.ask(EASY, path="/v1/rerank")
    assert status == 400
    assert "needs rerank" in json.loads(body)["error"]["message"]


def test_a_rule_goes_before_the_classifier(factory: Factory) -> None:
    tier, reason = factory.tier("Translate: good morning")
    assert tier == "reasoning"
    assert "rule 1 names reasoning" in reason


def test_names_stay_what_they_are(factory: Factory) -> None:
    for model, tier in (("small", "utility"), ("utility", "utility"), ("large", "reasoning")):
        status, headers, _ = factory.ask(HARD, model=model)
        assert (status, headers["x-tokenmill-tier"]) == (200, tier)
        assert headers["x-tokenmill-reason"] == "asked for by name"
    assert factory.ask(EASY, model="nothing")[0] == 404
    listed = json.loads(factory.gateway.get("/v1/models")[2])["data"]
    assert "auto" in [model["id"] for model in listed]


def test_an_answer_says_which_version_gave_it(factory: Factory) -> None:
    _, headers, _ = factory.ask(EASY, model="large")
    assert headers["x-tokenmill-version"] == "2026-05 2", "one line of ASCII"
    assert "x-tokenmill-version" not in factory.ask(EASY, model="small")[1]


def test_what_the_gateway_says_is_said_by_no_backend(factory: Factory) -> None:
    """A backend that is a gateway itself says the same of its own tiers."""
    inner = {f"x-tokenmill-{name}": "inner" for name in ("tier", "backend", "reason", "escalated", "cost", "version")}
    act = {"status": 200, "body": "{}", "headers": {**inner, "x-own": "kept", "content-type": "application/json"}}
    status, headers, _ = factory.ask(EASY, act={"small": act})
    assert (status, headers["x-tokenmill-tier"], headers["x-own"]) == (200, "utility", "kept")
    assert "inner" not in headers.values()


def test_the_dry_run_asks_nobody(factory: Factory) -> None:
    for upstream in (factory.small, factory.large, factory.cloud):
        upstream.books = Books()
    said = factory.explained("My card is 4111 1111 1111 1111.")
    assert said["decision"]["tier"] == "utility"
    assert "frontier" in said["refused"]
    assert said["sensitivity"]["kinds"] == {"credit_card": 1}
    assert [one["zone"] for one in said["backends"]] == ["on-premises", "on-premises"]
    assert "4111" not in json.dumps(said)
    said = factory.gateway.post("/v1/tokenmill/route?endpoint=/v1/embeddings", {"model": "auto", "input": "a"})
    assert json.loads(said[2])["decision"]["tier"] == "embedding"
    assert not any(upstream.books.requests for upstream in (factory.small, factory.large, factory.cloud))


def test_the_dry_run_goes_where_the_request_itself_would(factory: Factory) -> None:
    card = "My card is 4111 1111 1111 1111."
    for model, text in (("auto", EASY), ("auto", HARD), ("small", HARD), ("utility", HARD), ("vast", EASY),
                        ("frontier", EASY), ("small", card)):  # fmt: skip
        said = factory.explained(text, model=model)
        status, headers, _ = factory.ask(text, model=model)
        assert status == 200
        assert (said["model"], said["backends"][0]["tier"]) == (model, headers["x-tokenmill-tier"])
        assert said["backends"][0]["backend"] == headers["x-tokenmill-backend"]
        assert said["reason"] == headers["x-tokenmill-reason"]
        assert (said["decision"] is None) == (model != "auto")
    said = factory.explained(card, model="vast")
    assert (said["backends"], said["reason"], list(said["refused"])) == ([], None, ["frontier"])
    assert factory.ask(card, model="vast")[0] == 403
    for model in ("nothing", None):
        status, _, body = factory.ask(EASY, model=model, path="/v1/tokenmill/route")
        assert (status, body) == (404 if model else 400, factory.ask(EASY, model=model)[2])


def test_the_dry_run_knows_every_name_of_a_path(factory: Factory) -> None:
    body = {"model": "auto", "input": "a"}
    for path in ("/v1/embeddings", "/embeddings", "%2Fv1%2Fembeddings", "/openai/v1/embeddings",
                 "/openai/deployments/auto/embeddings"):  # fmt: skip
        said = json.loads(factory.gateway.post(f"/v1/tokenmill/route?endpoint={path}", body)[2])
        assert (said["endpoint"], said["decision"]["tier"]) == ("/v1/embeddings", "embedding")
        real = path.replace("%2F", "/")
        assert factory.gateway.post(real, body)[1]["x-tokenmill-tier"] == "embedding"
    status, _, raw = factory.gateway.post("/v1/tokenmill/route?endpoint=v1/embeddings", body)
    assert (status, json.loads(raw)["error"]["param"]) == (400, "endpoint")


def test_hints_are_checked_and_their_headers_end_here(factory: Factory) -> None:
    for name, value in (("quality", "2"), ("quality", "high"), ("latency", "soon"), ("max-cost", "nan"),
                        ("max-cost", "1_0"), ("quality", ""), ("quality", "0,5")):  # fmt: skip
        status, _, body = factory.ask(EASY, headers={f"x-tokenmill-{name}": value})
        assert status == 400
        assert json.loads(body)["error"]["code"] == "invalid_hint"
    nested = [[[1]]]
    status, _, body = factory.ask(EASY, metadata={"tokenmill_quality": nested})
    assert (status, "'a list or object'" in json.loads(body)["error"]["message"]) == (400, True)
    factory.small.books = Books()
    factory.tier(EASY, headers={"x-tokenmill-latency": "batch"}, metadata={"tokenmill_latency": "batch"})
    _, headers, raw = factory.small.books.requests[-1]
    assert not [name for name in headers if name.startswith("x-tokenmill")]
    assert json.loads(raw)["metadata"] == {"tokenmill_latency": "batch"}
    assert json.loads(raw)["model"] == "small"


def test_what_is_called_private_anywhere_is_private(factory: Factory) -> None:
    """`public` says nothing, so it takes nothing back, in whichever place and order it stands."""
    factory.cloud.books = Books()
    private, public = {"tokenmill_sensitivity": "private"}, {"tokenmill_sensitivity": "public"}
    for metadata, header in ((private, "public"), (public, "private"), (private, None), ({}, "private")):
        headers = {} if header is None else {"x-tokenmill-sensitivity": header}
        assert factory.ask(EASY, model="vast", metadata=metadata, headers=headers)[0] == 403
    body = b'{"model":"vast","messages":[]}'
    for first, second in (("private", "public"), ("public", "private")):
        answer = factory.gateway.raw(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n"
            b"x-tokenmill-sensitivity: %b\r\nx-tokenmill-sensitivity: %b\r\n\r\n%b"
            % (len(body), first.encode(), second.encode(), body)
        )
        assert answer.startswith(b"HTTP/1.1 403")
    assert not factory.cloud.books.requests
    assert factory.ask(EASY, model="vast", metadata=public, headers={"x-tokenmill-sensitivity": "public"})[0] == 200


def test_hints_that_are_nested_too_deeply_are_the_clients_fault(factory: Factory) -> None:
    found = set()
    for levels in range(900, 1000):
        metadata = b'{"tokenmill_x":%b%b}' % (b"[" * levels, b"]" * levels)
        raw = b'{"model":"auto","messages":[{"role":"user","content":"hi"}],"metadata":%b}' % metadata
        status, _, answer = factory.gateway.post("/v1/chat/completions", raw)
        found.add((status, b"nested too deeply" in answer))
    assert found == {(200, False), (400, True)}


def test_another_tier_takes_over_when_the_first_fails(factory: Factory) -> None:
    tier, reason = factory.tier(EASY, act={"small": {"status": 503, "body": "busy"}})
    assert tier == "reasoning"
    assert reason.startswith("failed over from utility")


def test_what_the_client_calls_private_stays_also_where_nothing_is_searched() -> None:
    near, far = FakeUpstream(("near",)).start(), FakeUpstream(("far",)).start()
    backends = (
        Backend("near", near.url, "utility", ("near",), quality=0.3),
        Backend("far", far.url, "reasoning", ("far",), quality=0.9, zone="cloud"),
    )
    for routing in (RoutingSettings(), None):
        near.books, far.books = Books(), Books()
        with RunningGateway(*backends, routing=routing) as gateway:
            wish = {"x-tokenmill-sensitivity": "private", "x-tokenmill-quality": "0.9"}
            body: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
            for model in ("far", "reasoning"):
                status, _, refused = gateway.post("/v1/chat/completions", {"model": model, **body}, **wish)
                assert (status, json.loads(refused)["error"]["code"]) == (403, "residency")
            said = {"metadata": {"tokenmill_sensitivity": "private", "tokenmill_quality": 0.9}}
            model = "near" if routing is None else "auto"
            assert gateway.post("/v1/chat/completions", {"model": model, **body}, **wish)[0] == 200
            assert gateway.post("/v1/chat/completions", {"model": model, **body, **said})[0] == 200
            assert (len(near.books.requests), len(far.books.requests)) == (2, 0)
            assert gateway.post("/v1/chat/completions", {"model": "far", **body})[0] == 200
    near.stop()
    far.stop()
