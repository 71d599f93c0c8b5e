"""Escalation through a real worker: a sure answer is given as it came, an unsure one is never shown."""

import json
import math
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection, IncompleteRead
from typing import Any

import pytest
from aiohttp import web

from tests.gateway.running import RunningGateway, wait_until
from tests.gateway.upstream import Books, FakeUpstream
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.money import Prices
from tokenmill.engine.gateway.router.settings import EscalationSettings, RoutingSettings
from tokenmill.engine.gateway.settings import Settings

SURE, UNSURE = {"logprob": -0.01}, {"logprob": -3.0}
CHEAP, DEAR = Prices(10_000, 10_000, 10_000), Prices(1_000_000, 1_000_000, 1_000_000)


class Pair:
    """A small and a large model, and a gateway that asks the small one first."""

    def __init__(self, gateway: Settings | None = None, **settings: Any) -> None:
        self.small, self.large = FakeUpstream(("small",)).start(), FakeUpstream(("large",)).start()
        escalation = EscalationSettings("utility", "reasoning", 0.5, **settings)
        self.gateway = RunningGateway(
            Backend("small", self.small.url, "utility", ("small",), prices=CHEAP, quality=0.9,
                    capabilities=("logprobs",)),
            Backend("large", self.large.url, "reasoning", ("large",), prices=DEAR, quality=0.95,
                    capabilities=("logprobs",)),
            settings=gateway or Settings(probe_interval_s=0.1, breaker_failures=10_000),
            routing=RoutingSettings(escalation=escalation),
        )  # fmt: skip

    def ask(self, act: Any, **more: Any) -> tuple[int, dict[str, str], bytes]:
        self.small.books, self.large.books = Books(), Books()
        headers = more.pop("headers", {})
        body = {"model": "auto", "messages": [{"role": "user", "content": "hi"}], "act": act, **more}
        return self.gateway.post("/v1/chat/completions", body, **headers)

    def close(self) -> None:
        self.small.stop()
        self.large.stop()


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    built = Pair()
    with built.gateway:
        yield built
    built.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_sure_answer_is_given(pair: Pair, stream: bool) -> None:
    status, headers, body = pair.ask({"small": SURE}, stream=stream)
    assert status == 200
    assert (headers["x-tokenmill-tier"], headers["x-tokenmill-escalated"]) == ("utility", "false")
    assert float(headers["x-tokenmill-confidence"]) == pytest.approx(0.99, abs=0.001)
    assert not pair.large.books.requests
    sent = json.loads(pair.small.books.requests[0][2])
    assert sent["logprobs"] is True
    assert b'"logprob":' not in body.replace(b" ", b""), "the client did not ask for them"
    if not stream:
        assert json.loads(body)["choices"][0]["logprobs"] is None
        assert json.loads(body)["choices"][0]["message"]["content"] == "word " * 5


def test_the_threshold_itself_is_sure_enough(pair: Pair) -> None:
    assert math.exp(math.log(0.5)) == 0.5
    _, headers, _ = pair.ask({"small": {"logprob": math.log(0.5)}})
    assert (headers["x-tokenmill-confidence"], headers["x-tokenmill-escalated"]) == ("0.5000", "false")


def test_an_escalation_is_counted_from_the_first_tier_to_the_other(pair: Pair) -> None:
    pair.ask({"small": UNSURE, "large": {}})
    counted = b'tokenmill_escalations_total{tier="utility",to="reasoning"} '
    wait_until(lambda: counted in pair.gateway.get("/metrics")[2])


@pytest.mark.parametrize("stream", [False, True])
def test_an_unsure_answer_is_never_shown(pair: Pair, stream: bool) -> None:
    status, headers, body = pair.ask({"small": UNSURE, "large": {"chunks": 7}}, stream=stream, max_tokens=9)
    assert status == 200
    assert (headers["x-tokenmill-tier"], headers["x-tokenmill-escalated"]) == ("reasoning", "true")
    assert headers["x-tokenmill-reason"].startswith("escalated from utility")
    assert (len(pair.small.books.requests), len(pair.large.books.requests)) == (1, 1)
    sent = json.loads(pair.large.books.requests[0][2])
    assert (sent["model"], sent.get("logprobs")) == ("large", None)
    assert body == pair.large.books.sent[0]
    assert b"small" not in body


def test_what_is_asked_for_is_kept_byte_for_byte(pair: Pair) -> None:
    for stream in (False, True):
        _, headers, body = pair.ask({"small": SURE}, stream=stream, logprobs=True)
        assert headers["x-tokenmill-escalated"] == "false"
        assert body == pair.small.books.sent[0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("said", [{"logprobs": 1}, {"logprobs": "true"}, {"logprobs": True, "top_logprobs": 2}])
def test_however_it_is_asked_for_it_is_kept(pair: Pair, stream: bool, said: dict[str, Any]) -> None:
    _, headers, body = pair.ask({"small": SURE}, stream=stream, **said)
    assert headers["x-tokenmill-confidence"] == "0.9900"
    assert body == pair.small.books.sent[0]
    sent = json.loads(pair.small.books.requests[0][2])
    assert {name: sent[name] for name in said} == said


def test_what_a_backend_would_refuse_is_not_made_right(pair: Pair) -> None:
    """`top_logprobs` without `logprobs` is an error of the request, which the backend shall say."""
    _, headers, _ = pair.ask({"small": SURE}, top_logprobs=2)
    assert "logprobs" not in json.loads(pair.small.books.requests[0][2])
    assert "x-tokenmill-confidence" not in headers
    for nothing in ({"top_logprobs": 0}, {"logprobs": None}, {"logprobs": False}, {"logprobs": 0}):
        _, headers, body = pair.ask({"small": SURE}, **nothing)
        assert headers["x-tokenmill-confidence"] == "0.9900"
        assert json.loads(body)["choices"][0]["logprobs"] is None


def test_a_released_stream_holds_every_event(pair: Pair) -> None:
    _, _, body = pair.ask({"small": {**SURE, "chunks": 40}}, stream=True)
    events = [json.loads(line[6:]) for line in body.split(b"\n\n") if line.startswith(b"data: {")]
    assert [event["choices"][0]["delta"]["content"] for event in events] == [f"w{n} " for n in range(40)]
    assert body.endswith(b"data: [DONE]\n\n")


def raw_stream(logprob: float) -> dict[str, Any]:
    """A stream whose last event has no empty line behind it."""
    choices = [{"index": 0, "delta": {"content": f"w{number} "}, "logprobs": {"content": [{"logprob": logprob}]}}
               for number in range(2)]  # fmt: skip
    body = "\n\n".join("data: " + json.dumps({"choices": [choice]}) for choice in choices)
    return {"status": 200, "body": body, "headers": {"content-type": "text/event-stream"}}


def test_a_stream_that_ends_within_its_last_event_is_judged_and_cleaned(pair: Pair) -> None:
    _, headers, body = pair.ask({"small": raw_stream(-0.01), "large": {}}, stream=True)
    assert headers["x-tokenmill-confidence"] == "0.9900"
    assert b"w1 " in body
    assert b'"logprob"' not in body
    one = {**raw_stream(-3.0), "body": raw_stream(-3.0)["body"].split("\n\n")[1]}
    for unsure in (raw_stream(-3.0), one):
        _, headers, body = pair.ask({"small": unsure, "large": {}}, stream=True)
        assert (headers["x-tokenmill-escalated"], body) == ("true", pair.large.books.sent[0])
    said = {**one, "body": 'data: {"error": {"message": "dead"}}'}
    _, headers, body = pair.ask({"small": said, "large": {}}, stream=True)
    assert (headers["x-tokenmill-tier"], body) == ("reasoning", pair.large.books.sent[0])


@pytest.mark.parametrize("failing", [{"error": {"message": "dead"}}, {"cut_after": 0}, {"cut_head": True}])
def test_a_second_stream_that_begins_with_a_failure_gives_the_first_answer(pair: Pair, failing: dict[str, Any]) -> None:
    _, headers, body = pair.ask({"small": UNSURE, "large": {**failing, "chunks": 0}}, stream=True)
    assert (headers["x-tokenmill-tier"], headers["x-tokenmill-escalated"]) == ("utility", "false")
    assert b"w4 " in body
    assert b"dead" not in body


def test_the_better_tier_failing_gives_the_first_answer(pair: Pair) -> None:
    for stream in (False, True):
        for large in ({"status": 503, "body": "busy"}, {"status": 400, "body": "no"}, {"cut_after": 0}):
            status, headers, body = pair.ask({"small": UNSURE, "large": large}, stream=stream)
            assert (status, headers["x-tokenmill-tier"]) == (200, "utility")
            assert headers["x-tokenmill-escalated"] == "false"
            assert (b"w4 " if stream else b"word ") in body


def test_the_first_tier_failing_asks_the_other(pair: Pair) -> None:
    for small in ({"status": 503, "body": "busy"}, {"cut_after": 0}):
        status, headers, _ = pair.ask({"small": small, "large": {}})
        assert (status, headers["x-tokenmill-tier"]) == (200, "reasoning")
        assert (len(pair.small.books.requests), len(pair.large.books.requests)) == (1, 1)


def test_where_both_tiers_fail_the_first_ones_error_goes_back_as_its_own(pair: Pair) -> None:
    for large in ({"status": 503, "body": "full"}, {"status": 400, "body": "no"}, {"cut_after": 0}):
        status, headers, body = pair.ask({"small": {"status": 503, "body": "busy"}, "large": large})
        assert (status, headers["x-tokenmill-backend"]) == (503, "small")
        assert json.loads(body)["error"]["message"] == "busy"
        assert (len(pair.small.books.requests), len(pair.large.books.requests)) == (1, 1)


def test_an_error_of_the_first_tier_passes(pair: Pair) -> None:
    status, _, body = pair.ask({"small": {"status": 422, "body": '{"error": {"message": "no"}}'}})
    assert (status, json.loads(body)["error"]["message"]) == (422, "no")
    assert (len(pair.small.books.requests), len(pair.large.books.requests)) == (1, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_for_the_first_tier_goes_to_the_other(pair: Pair, stream: bool) -> None:
    too_long = {"status": 400, "body": '{"error": {"message": "no", "code": "context_length_exceeded"}}'}
    status, headers, _ = pair.ask({"small": too_long, "large": {}}, stream=stream)
    assert (status, headers["x-tokenmill-tier"]) == (200, "reasoning")
    assert (len(pair.small.books.requests), len(pair.large.books.requests)) == (1, 1)


def test_no_probabilities_no_judgement(pair: Pair) -> None:
    _, headers, _ = pair.ask({"small": {}})
    assert headers["x-tokenmill-escalated"] == "false"
    assert "x-tokenmill-confidence" not in headers


def test_money_and_shape_may_forbid_it(pair: Pair) -> None:
    for more in ({"headers": {"x-tokenmill-max-cost": "0.00000001"}}, {"n": 2}, {"tools": [{"type": "function"}]}):
        _, headers, _ = pair.ask({"small": UNSURE, "large": {}}, **more)
        assert headers.get("x-tokenmill-escalated") is None


@pytest.mark.parametrize("logprob", [SURE, UNSURE, {}])
@pytest.mark.parametrize(
    "failing", [{"cut_after": 3}, {"cut_head": True}, {"chunks": 3, "error": {"message": "dead", "code": 500}}]
)
def test_a_stream_that_fails_while_it_is_held_is_never_shown(pair: Pair, failing: Any, logprob: Any) -> None:
    small = {**logprob, **failing}
    status, headers, body = pair.ask({"small": small, "large": {}}, stream=True)
    assert (status, headers["x-tokenmill-tier"], body) == (200, "reasoning", pair.large.books.sent[0])
    assert headers["x-tokenmill-reason"].startswith("failed over from utility")
    assert "x-tokenmill-escalated" not in headers
    for large in ({"status": 503, "body": "busy"}, {"cut_after": 0}, {"cut_head": True}):
        status, headers, body = pair.ask({"small": small, "large": large}, stream=True)
        assert headers["content-type"] == "application/json"
        error = json.loads(body)["error"]
        expected = (500, "dead") if "error" in failing else (502, None) if "cut_after" in failing else (503, None)
        assert (status, error["message"] if expected[1] else None) == expected


def test_an_error_in_a_held_stream_that_is_the_requests_passes(pair: Pair) -> None:
    for error, status in (({"message": "no", "code": 400}, 400), ({"message": "no", "code": "odd"}, 502)):
        got, _, body = pair.ask({"small": {"error": error}, "large": {"status": 500, "body": "busy"}}, stream=True)
        assert (got, json.loads(body)["error"]) == (status, error)
        assert bool(pair.large.books.requests) is (status == 502)


def test_a_stream_that_is_silent_while_it_is_held_is_given_up() -> None:
    built = Pair(gateway=Settings(probe_interval_s=0.1, read_timeout_s=0.5))
    with built.gateway:
        _, headers, body = built.ask({"small": {**SURE, "interval_s": 30}, "large": {}}, stream=True)
        assert (headers["x-tokenmill-tier"], body) == ("reasoning", built.large.books.sent[0])
        status, _, body = built.ask({"small": {**SURE, "interval_s": 30}, "large": {"delay_s": 30}}, stream=True)
        assert (status, json.loads(body)["error"]["code"]) == (504, "timeout")
    built.close()


def test_the_beginning_decides_where_only_it_is_held() -> None:
    built = Pair(hold_tokens=4)
    with built.gateway:
        act = {"small": {**SURE, "chunks": 12, "interval_s": 0.05}}
        _, headers, body = built.ask(act, stream=True)
        assert headers["x-tokenmill-escalated"] == "false"
        assert b"w11 " in body
        _, headers, body = built.ask({"small": {**UNSURE, "chunks": 400, "interval_s": 0.02}, "large": {}}, stream=True)
        assert headers["x-tokenmill-escalated"] == "true"
        assert body == built.large.books.sent[0]
        assert not built.small.books.sent, "the first stream was broken off"
        endless = {"chunks": 60_000, "interval_s": 0.02}
        act = {"small": {**UNSURE, **endless}, "large": endless}
        body = {"model": "auto", "messages": [], "act": act, "stream": True}
        with closing(HTTPConnection("127.0.0.1", built.gateway.port)) as connection:
            connection.request("POST", "/v1/chat/completions", json.dumps(body))
            assert connection.getresponse().read(100)
            wait_until(lambda: built.small.books.cancelled == 2)  # at once, not when the second one ends
            assert built.large.books.cancelled == 0
        wait_until(lambda: built.large.books.cancelled == 1)
    built.close()


def test_the_allowance_ends_the_holding() -> None:
    built = Pair(allowance_s=0.4)
    with built.gateway:
        for sureness in (SURE, UNSURE):
            small = {**sureness, "chunks": 8, "interval_s": 0.2}
            _, headers, body = built.ask({"small": small, "large": {}}, stream=True)
            assert (headers["x-tokenmill-tier"], headers["x-tokenmill-escalated"]) == ("utility", "false")
            assert all(f"w{number} ".encode() in body for number in range(8)), "it is released as it is"
            assert not built.large.books.requests
        with pytest.raises(IncompleteRead):  # what breaks then has been shown
            built.ask({"small": {**SURE, "interval_s": 0.2, "cut_after": 4}, "large": {}}, stream=True)
    built.close()


class Unwilling(FakeUpstream):
    """Refuses requests for log probabilities."""

    status = 400

    async def _answer(self, request: web.Request, raw: bytes) -> web.StreamResponse:
        if json.loads(raw).get("logprobs"):
            return web.json_response({"error": {"message": "logprobs are not supported"}}, status=self.status)
        return await super()._answer(request, raw)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("refused", [400, 422])
def test_no_client_sees_that_what_only_the_gateway_asked_for_is_refused(stream: bool, refused: int) -> None:
    built = Pair()
    built.small.stop()
    unwilling = Unwilling(("small",), built.small.port)
    unwilling.status = refused
    built.small = unwilling.start()
    with built.gateway:
        status, headers, body = built.ask({"small": {}, "large": {}}, stream=stream)
        assert (status, headers["x-tokenmill-tier"], headers["x-tokenmill-escalated"]) == (200, "utility", "false")
        assert body == built.small.books.sent[0]
        assert ["logprobs" in json.loads(raw) for _, _, raw in built.small.books.requests] == [True, False]
        status, _, body = built.ask({"small": {}, "large": {}}, stream=stream, logprobs=True)
        assert (status, json.loads(body)["error"]["message"]) == (refused, "logprobs are not supported")
        assert len(built.small.books.requests) == 1
    built.close()


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_is_escalated_after_the_allowance(stream: bool) -> None:
    built = Pair(allowance_s=0.2)
    with built.gateway:
        for slow in ({"delay_s": 0.5}, {"head_s": 0.5}) if stream else ({"delay_s": 0.5},):
            _, headers, body = built.ask({"small": {**UNSURE, **slow}, "large": {}}, stream=stream)
            assert (headers["x-tokenmill-tier"], headers["x-tokenmill-escalated"]) == ("utility", "false")
            assert (b"w4 " if stream else b"word ") in body
            assert not built.large.books.requests
    built.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_second_tier_that_is_too_slow_is_given_up(stream: bool) -> None:
    built = Pair(allowance_s=1.5)
    with built.gateway:
        for large in ({"delay_s": 29}, {"head_s": 29}) if stream else ({"delay_s": 29},):
            _, headers, body = built.ask({"small": UNSURE, "large": large}, stream=stream)
            assert (headers["x-tokenmill-tier"], headers["x-tokenmill-escalated"]) == ("utility", "false")
            assert (b"w4 " if stream else b"word ") in body
            wait_until(lambda: built.large.books.cancelled == 1)
            assert (built.large.books.open, len(built.large.books.requests)) == (0, 1)
    built.close()
