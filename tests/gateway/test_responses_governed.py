"""Responses of a backend with Anthropic's API are charged, routed and redacted like its chat completions."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.gateway.anthropic_upstream import THOUGHTS, FakeAnthropic
from tests.gateway.governance.governed import Governed, governing
from tests.gateway.running import RunningGateway, wait_until
from tests.gateway.test_responses_bridge import backend
from tests.gateway.upstream import FakeUpstream
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.governance.accounts import Limits
from tokenmill.engine.gateway.money import Prices
from tokenmill.engine.gateway.router.settings import RoutingSettings
from tokenmill.engine.gateway.sensitivity.settings import SensitivitySettings
from tokenmill.engine.gateway.settings import Settings

PATH, CHAT = "/v1/responses", "/v1/chat/completions"
#: A prompt token is 3 micro-cents, a cached one 1, a generated one 7, a written one 4, one kept for an hour 6.
PRICES = Prices(3_000_000, 1_000_000, 7_000_000, 4_000_000, 6_000_000)
MAIL = "bob.smith@example.com"


@pytest.fixture(scope="module")
def governed(claude: FakeAnthropic, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Governed]:
    place = str(tmp_path_factory.mktemp("books") / "gateway.db")
    with governing(place, backend(claude, prices=PRICES)) as running:
        yield running


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_it_is_charged_like_a_chat_completion(governed: Governed, streamed: bool, cached: bool) -> None:
    rows = []
    part = {"text": "hello", **({"cache_control": {"type": "ephemeral", "ttl": "1h"}} if cached else {})}
    items, messages = ([{"role": "user", "content": [{"type": kind, **part}]}] for kind in ("input_text", "text"))
    for path, body in ((PATH, {"input": items}), (CHAT, {"messages": messages})):
        identity, key = governed.key()
        status, headers, raw = governed.ask(key, {"model": "claude", "stream": streamed, **body}, path)
        assert status == 200
        assert headers["x-request-id"]
        assert (b"usage" in raw) == (path == PATH or not streamed)
        if path == PATH:
            assert (b'"cache_write_tokens":2' in raw) == cached
        wait_until(lambda identity=identity: governed.ledger(identity))
        rows += governed.ledger(identity)
    assert rows[0] == rows[1]
    assert (rows[0].prompt, rows[0].cached, rows[0].completion, rows[0].exact) == (12, 3, 5, True)
    # Two tokens are written into the cache for an hour.
    assert rows[0].cost == (7 * 3 + 2 * 6 if cached else 9 * 3) + 3 * 1 + 5 * 7


def test_a_budget_holds(governed: Governed, claude: FakeAnthropic) -> None:
    _, key = governed.key(Limits(hard_limit=100))
    before = len(claude.books.requests)
    status, _, raw = governed.ask(key, {"model": "claude", "input": "hello", "stream": True}, PATH)
    error = json.loads(raw)["error"]
    assert (status, error["code"]) == (429, "insufficient_quota")
    assert len(claude.books.requests) == before


def test_what_is_refused_costs_nothing(governed: Governed) -> None:
    identity, key = governed.key(Limits(hard_limit=10_000_000))
    assert governed.ask(key, {"model": "claude", "input": "hello", "store": True}, PATH)[0] == 400
    wait_until(lambda: not governed.account(identity).reserved)
    assert governed.account(identity).spent == 0


@pytest.fixture(scope="module")
def tiers(claude: FakeAnthropic) -> Iterator[RunningGateway]:
    """A small model that is asked first, and the larger one."""
    small = FakeUpstream(("small",)).start()
    cheap = Backend("small", small.url, "utility", ("small",), prices=Prices(1, 1, 1), quality=0.95)
    # The fake upstream's own field, `act`, has no counterpart there.
    dear = backend(claude, prices=PRICES, quality=0.95, zone="cloud", drop_unknown=True)
    policy = SensitivitySettings({"contact": "redact"})
    settings = Settings(probe_interval_s=0.1, breaker_failures=10_000)
    with RunningGateway(cheap, dear, settings=settings, routing=RoutingSettings(), sensitivity=policy) as gateway:
        yield gateway
    small.stop()


def asked(gateway: RunningGateway, text: str, small: dict[str, Any], **more: Any) -> tuple[dict[str, str], Any]:
    """(headers, response) of a request that the small model treats so; of a stream the last event's response."""
    body = {"model": "auto", "input": text, "act": {"small": small}, **more}
    status, headers, raw = gateway.post(PATH, body)
    assert status == 200, raw
    if not more.get("stream"):
        return headers, json.loads(raw)
    return headers, json.loads(raw.removesuffix(b"\n\n").split(b"data: ")[-1])["response"]


@pytest.mark.parametrize("streamed", [False, True])
def test_the_better_tier_answers_where_the_first_one_fails(tiers: RunningGateway, streamed: bool) -> None:
    headers, response = asked(tiers, "hello", {"status": 500}, stream=streamed)
    assert response["output"][0]["content"][0]["text"] == "You said hello"
    assert (headers["x-tokenmill-tier"], headers["x-tokenmill-backend"]) == ("cloud", "frontier")


@pytest.mark.parametrize("streamed", [False, True])
def test_what_only_the_first_tier_can_do_goes_there_alone(
    tiers: RunningGateway, claude: FakeAnthropic, streamed: bool
) -> None:
    before = len(claude.books.requests)
    body = {"model": "auto", "input": "hello", "stream": streamed, "act": {"small": {"status": 503, "body": "busy"}}}
    status, _, raw = tiers.post(PATH, {**body, "store": True})
    assert (status, json.loads(raw)["error"]["message"]) == (503, "busy")
    assert len(claude.books.requests) == before


@pytest.mark.parametrize("streamed", [False, True])
def test_redacted_data_comes_back(tiers: RunningGateway, claude: FakeAnthropic, streamed: bool) -> None:
    claude.says = "{text}"  # cut behind five characters: within the placeholder
    text, instructions = f"ab {MAIL} cd", f"For {MAIL}."
    try:
        body = {"model": "claude", "input": text, "instructions": instructions, "stream": streamed}
        status, _, raw = tiers.post(PATH, body)
    finally:
        claude.says = FakeAnthropic.says
    assert status == 200
    asked = claude.books.requests[-1][2].decode()
    assert MAIL not in asked
    assert "[EMAIL_1]" in asked
    said = raw.decode()
    assert "EMAIL_1" not in said
    if not streamed:
        response = json.loads(raw)
    else:
        events = [json.loads(part.split("data: ")[1]) for part in said.removesuffix("\n\n").split("\n\n")]
        deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
        assert "".join(deltas) == text
        assert [event["text"] for event in events if event["type"] == "response.output_text.done"] == [text]
        assert events[0]["response"]["instructions"] == instructions
        response = events[-1]["response"]
    assert response["output"][0]["content"][0]["text"] == text
    assert response["instructions"] == instructions


def test_events_count_on_where_a_texts_end_is_kept_back(tiers: RunningGateway, claude: FakeAnthropic) -> None:
    """What may be a placeholder's begin until the text is done goes out in an event of its own."""
    claude.says = "{text} [EMA"
    try:
        status, _, raw = tiers.post(PATH, {"model": "claude", "input": f"ab {MAIL}", "stream": True})
    finally:
        claude.says = FakeAnthropic.says
    assert status == 200
    events = [json.loads(part.split("data: ")[1]) for part in raw.decode().removesuffix("\n\n").split("\n\n")]
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert ("".join(deltas), deltas[-1]) == (f"ab {MAIL} [EMA", "[EMA")
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


@pytest.mark.parametrize("encrypted", [False, True])
def test_thoughts_go_back_where_data_are_redacted(
    tiers: RunningGateway, claude: FakeAnthropic, encrypted: bool
) -> None:
    """`encrypted_content` is what no search can read: it keeps the next turn on the premises, `signature` does not."""
    tool = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}
    said: list[Any] = [{"role": "user", "content": f"hello {MAIL}"}]
    body = {"model": "claude", "tools": [tool], "reasoning": {"effort": "low"},
            "include": ["reasoning.encrypted_content"] if encrypted else []}  # fmt: skip
    _, _, raw = tiers.post(PATH, {**body, "input": said})
    said += [*json.loads(raw)["output"], {"type": "function_call_output", "call_id": "toolu_1", "output": "sunny"}]
    status, _, raw = tiers.post(PATH, {**body, "input": said})
    assert status == (403 if encrypted else 200), raw
    if not encrypted:
        assert json.loads(claude.books.requests[-1][2])["messages"][1]["content"][:2] == THOUGHTS
