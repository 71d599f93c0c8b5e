"""Traces: ids reach the backend, spans follow the conventions, prompts stay out of them."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from pydantic import ValidationError

from tests.gateway.upstream import FakeUpstream
from tokenmill.engine.gateway.api_error import Headers
from tokenmill.engine.gateway.app import Gateway
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.observability.section import Observability
from tokenmill.engine.gateway.observability.traces import Traces, attributes, operation_of
from tokenmill.engine.gateway.pipeline import Call, Exchange, Reply, Usage
from tokenmill.engine.gateway.portfolio import Portfolio, Target
from tokenmill.engine.gateway.request import ANSWER, ON_HANGUP
from tokenmill.engine.gateway.routing import ResolveModel
from tokenmill.engine.gateway.settings import Settings

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


async def served(upstream: FakeUpstream, traces: Traces, body: bytes, headers: Headers) -> int:
    """One request through a gateway with this stage; returns the status."""
    portfolio = Portfolio([Backend("a", upstream.url, "utility", models=("tiny",))], Settings())
    gateway = Gateway(portfolio, [traces, ResolveModel(portfolio)], [traces])
    await gateway.start()
    sent: list[Any] = []
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Any:
        return next(messages, None) or await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"",
        "headers": [(b"content-type", b"application/json"), *headers], "client": ("127.0.0.1", 1),
        ON_HANGUP: lambda _tell: None,
        ANSWER: lambda *_: False,
    }  # fmt: skip
    await gateway(scope, receive, send)
    await gateway.stop()
    return int(sent[0]["status"])


def spans_of(upstream: FakeUpstream, body: bytes, headers: Headers, share: float = 1.0) -> list[Any]:
    exporter = InMemorySpanExporter()
    traces = Traces("http://unused", share, exporter)
    assert asyncio.run(served(upstream, traces, body, headers)) == 200
    return list(exporter.get_finished_spans())


def test_a_span_continues_the_callers_trace_and_the_backend_is_told(upstream: FakeUpstream) -> None:
    header = f"00-{TRACE}-{PARENT}-01".encode()
    secret = b'{"model": "tiny", "messages": [{"role": "user", "content": "my secret"}]}'
    (span,) = spans_of(upstream, secret, [(b"traceparent", header)])
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    told = upstream.books.requests[-1][1]["traceparent"]
    assert told == f"00-{TRACE}-{span.context.span_id:016x}-01"
    assert span.name == "chat tiny"
    attributes = dict(span.attributes)
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "tiny",
        "gen_ai.provider.name": "openai",
        "gen_ai.usage.output_tokens": 5,
        "http.response.status_code": 200,
        "tokenmill.tier": "utility",
        "tokenmill.backend": "a",
        "tokenmill.outcome": "ok",
    }
    assert {name: attributes[name] for name in expected} == expected
    assert attributes["gen_ai.usage.input_tokens"] > 0
    assert "secret" not in span.to_json()
    assert span.end_time > span.start_time


def test_a_span_says_which_model_answered_and_what_was_cached() -> None:
    backend = Backend("a", "http://127.0.0.1:9", "utility", models=("tiny",), model_names={"tiny": "org/tiny-7b"})
    target = Target(backend, Settings())
    exchange = Exchange("/v1/chat/completions", [], b"", body=None, model="auto", request_id="r", forward=[])
    exchange.target, exchange.status = target, 200
    exchange.started, exchange.first_chunk_at = 1.0, 1.5
    exchange.calls = [Call(target, "tiny", Usage(10, 4, 5, exact=True, written=3), 200)]
    names = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
    found = attributes(exchange, "chat")
    assert {name for name in found if name.startswith("gen_ai.")} <= names
    expected = {
        "gen_ai.request.model": "auto",
        "gen_ai.request.stream": True,
        "gen_ai.response.model": "org/tiny-7b",
        "gen_ai.response.time_to_first_chunk": 0.5,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.cache_creation.input_tokens": 3,
    }
    assert {name: found[name] for name in expected} == expected
    exchange.status = 503
    assert "gen_ai.response.model" not in attributes(exchange, "chat")


def test_ids_of_responses_name_no_spans() -> None:
    paths = ("/v1/responses", "/v1/responses/resp_1", "/v1/responses/resp_2/cancel", "/v1/audio/speech")
    assert [operation_of(path) for path in paths] == ["chat", "stored_response", "stored_response", "audio/speech"]


@pytest.mark.parametrize(("header", "passed"), [(f"00-{TRACE}-{PARENT}-01".encode(), "a=b"), (b"garbage", None)])
def test_what_others_noted_of_a_trace_goes_on_with_it_alone(
    upstream: FakeUpstream, header: bytes, passed: str | None
) -> None:
    spans_of(upstream, b'{"model": "tiny"}', [(b"tracestate", b"a=b"), (b"traceparent", header)])
    assert upstream.books.requests[-1][1].get("tracestate") == passed


@pytest.mark.parametrize("header", [b"", b"garbage", b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-01", b"ff-x"])
def test_a_bad_traceparent_begins_a_new_trace(upstream: FakeUpstream, header: bytes) -> None:
    (span,) = spans_of(upstream, b'{"model": "tiny"}', [(b"traceparent", header)])
    assert span.parent is None and span.context.trace_id != 0


def test_who_is_not_sampled_is_not_recorded_but_passed_on(upstream: FakeUpstream) -> None:
    assert spans_of(upstream, b'{"model": "tiny"}', [], share=0.0) == []
    assert upstream.books.requests[-1][1]["traceparent"].endswith("-00")
    assert spans_of(upstream, b'{"model": "tiny"}', [(b"traceparent", f"00-{TRACE}-{PARENT}-00".encode())]) == []


class Stuck(SpanExporter):
    """Takes a batch and is not done with it until it is told to end."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """See OpenTelemetry."""
        self.ended.wait(60)
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        """See OpenTelemetry."""
        self.ended.set()


def test_a_silent_collector_keeps_no_worker_from_ending(upstream: FakeUpstream) -> None:
    traces = Traces("http://unused", 1.0, Stuck())
    assert asyncio.run(asyncio.wait_for(served(upstream, traces, b'{"model": "tiny"}', []), 20)) == 200


def test_a_failed_request_is_an_error(upstream: FakeUpstream) -> None:
    exporter = InMemorySpanExporter()
    body = b'{"model": "tiny", "act": {"status": 500, "body": "broken"}}'
    assert asyncio.run(served(upstream, Traces("http://unused", 1.0, exporter), body, [])) == 500
    (span,) = exporter.get_finished_spans()
    assert not span.status.is_ok
    assert span.attributes is not None and span.attributes["error.type"] == "failed"


def test_the_stage_itself_asks_nothing_of_the_reply() -> None:
    """It returns what the stages below gave it, the same object."""
    exchange = Exchange("/v1/x", [], b"", body=None, model=None, request_id="r", forward=[])
    reply = Reply(200)

    async def below(_exchange: Exchange) -> Reply:
        return reply

    traces = Traces("http://unused", 0.0, InMemorySpanExporter())
    assert asyncio.run(traces.handle(exchange, below)) is reply
    asyncio.run(traces.stop())


@pytest.mark.parametrize(
    "address",
    ["http://me:hunter2@collector:4318/v1/traces", "http://me:hunter2/x@collector", "ftp://me:hunter2@c", "me"],
)
def test_an_address_that_is_none_is_refused_and_a_password_in_it_not_told(address: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Observability(traces=address)
    told = refused.value.errors()[0]["msg"]
    assert "is not http(s)://host[:port]/path" in told
    assert "hunter2" not in told
    assert ("'me'" in told) is (address == "me")


def test_an_address_of_traces_may_have_an_at_in_its_path() -> None:
    assert Observability(traces="http://collector:4318/@me").traces is not None
