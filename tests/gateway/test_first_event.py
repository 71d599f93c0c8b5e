"""Streams that begin with an error, whose status was 200 already: like that error's status, as nothing has gone out."""

import asyncio
import json
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from aiohttp import web

from tests.gateway.running import RunningGateway, wait_until
from tests.gateway.upstream import Books, FakeUpstream
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.settings import Settings

CHAT = "/v1/chat/completions"
#: What servers send for a failure that is theirs, or passes: vLLM, SGLang, LiteLLM, OpenRouter, TGI, OpenAI, Anthropic.
PASSING = (
    'data: {"error": {"message": "died", "type": "InternalServerError", "param": null, "code": 500}}\n\n',
    'data: {"error":{"object":"error","message":"The request queue is full.","type":"x","code":503}}\n\n',
    'data: {"error": {"message": "no", "type": "None", "param": "None", "code": "500"}}\n\ndata: [DONE]\n\n',
    'data: {"id":"1","choices":[],"error":{"code":502,"message":"gone"}}\n\n',
    'data: {"error":"Model is overloaded","error_type":"overloaded"}\r\n\r\n',
    'data: {"error":{"message":"sorry","type":"server_error","param":null,"code":null}}\n\n',
    'event: error\ndata: {"type":"error","code":"server_error","message":"no","param":null,"sequence_number":0}\n\n',
    'event: response.failed\ndata: {"type":"response.failed","response":{"error":{"code":"rate_limit_exceeded"}}}\n\n',
    'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}\n\n',
    'data: {"error": {"code": 500}}',
)
#: What keeps a connection alive and says nothing; with an error that came together with it.
PINGED = (
    ': PROCESSING\n\ndata: {"id":"1","choices":[],"error":{"code":502,"message":"gone"}}\n\n',
    'event: ping\ndata: {"type": "ping"}\n\nevent: error\ndata: {"type":"error","error":{"type":"api_error"}}\n\n',
)
#: The request's fault, nothing that is known, or no error at all.
OTHERS = (
    'data: {"error": {"message": "bad", "type": "BadRequestError", "param": null, "code": 400}}\n\n',
    'data: {"error": {"message": "odd", "type": "odd", "code": "odd"}}\n\n',
    'event: error\ndata: {"type":"error","error":{"type":"invalid_request_error","message":"bad"}}\n\n',
    'event: response.created\ndata: {"type":"response.created","response":{"id":"r","error":null}}\n\n',
    'data: {"type":"response.created","response":{"id":"r","error":null}}\n\n',
    'data: {"choices":[{"delta":{"content":"error"}}],"error":null}\n\n',
    'data: {"choices":[{"delta":{"content":"\\"error\\": {\\"code\\": 500}"}}]}\n\n',
    'data: {"choices":[]}\n\ndata: {"error": {"message": "later", "code": 500}}\n\n',
    'data: "error"\n\n',
    'data: {"error": 500}\n\n',
    ": only a comment\n\n",
    "event: ping\ndata: {}\n\n",
    "no events at all",
    "",
    "\n",
)


class Pieces(FakeUpstream):
    """Sends what `act` says in pieces of so many bytes, and then, if it is to, keeps silent."""

    async def _answer(self, request: web.Request, raw: bytes) -> web.StreamResponse:
        asked = json.loads(raw)
        act = asked["act"].get(asked["model"])
        if act is None:
            return await super()._answer(request, raw)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        text = act["text"].encode()
        size = act.get("size") or len(text) or 1
        for start in range(0, len(text), size):
            await response.write(text[start : start + size])
        if act.get("hangs"):
            await self.released.wait()
        await response.write_eof()
        return response

    async def _start(self) -> None:
        self.released = asyncio.Event()
        await super()._start()


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[FakeUpstream, FakeUpstream, RunningGateway]]:
    first, other = Pieces().start(), FakeUpstream().start()
    settings = Settings(probe_interval_s=0.1, breaker_failures=10_000, retry_ratio=1.0, fallbacks={"t": ("u",)})
    backends = Backend("first", first.url, "t", ("tiny",)), Backend("other", other.url, "u", ("other",))
    with RunningGateway(*backends, settings=settings) as gateway:
        yield first, other, gateway
    for server in (first, other):
        server.stop()


@pytest.mark.parametrize(
    ("text", "size"), [*((text, 0) for text in PASSING + PINGED), *((text, 1) for text in PASSING)]
)
def test_it_goes_on_elsewhere(servers: tuple[FakeUpstream, FakeUpstream, RunningGateway], text: str, size: int) -> None:
    _, other, gateway = servers
    body = {"model": "t", "stream": True, "act": {"tiny": {"text": text, "size": size}, "other": {}}}
    status, headers, answer = gateway.post(CHAT, body)
    assert (status, headers.get("x-tokenmill-fallback"), answer) == (200, "u", other.books.sent[-1])


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("text", OTHERS)
def test_it_comes_as_it_is(servers: tuple[FakeUpstream, FakeUpstream, RunningGateway], text: str, size: int) -> None:
    _, _, gateway = servers
    body = {"model": "t", "stream": True, "act": {"tiny": {"text": text, "size": size}, "other": {}}}
    status, headers, answer = gateway.post(CHAT, body)
    assert (status, headers.get("x-tokenmill-fallback"), answer) == (200, None, text.encode())


@pytest.mark.parametrize("text", PASSING)
def test_it_comes_as_it_is_where_nobody_does_better(
    servers: tuple[FakeUpstream, FakeUpstream, RunningGateway], text: str
) -> None:
    _, _, gateway = servers
    body = {"model": "t", "stream": True, "act": {"tiny": {"text": text}, "other": {"status": 500}}}
    status, headers, answer = gateway.post(CHAT, body)
    assert (status, headers["content-type"], answer) == (200, "text/event-stream", text.encode())


def test_of_one_that_took_over_it_is_no_answer_whatever_it_says(
    servers: tuple[FakeUpstream, FakeUpstream, RunningGateway],
) -> None:
    _, _, gateway = servers
    for text in OTHERS[:3]:
        other = {"status": 200, "body": text, "headers": {"content-type": "text/event-stream"}}
        body = {"model": "t", "stream": True, "act": {"tiny": {"text": PASSING[0]}, "other": other}}
        status, headers, answer = gateway.post(CHAT, body)
        assert (status, headers.get("x-tokenmill-fallback"), answer) == (200, None, PASSING[0].encode())


def test_its_backend_is_left_when_another_answers(
    servers: tuple[FakeUpstream, FakeUpstream, RunningGateway],
) -> None:
    first, _, gateway = servers
    first.books = Books()
    act: Any = {"tiny": {"text": PASSING[0], "hangs": True}, "other": {"chunks": 3, "interval_s": 0.5}}
    body = json.dumps({"model": "t", "stream": True, "act": act}).encode()
    asked = urllib.request.Request(gateway.url + CHAT, body, {"content-type": "application/json"})  # noqa: S310
    with closing(urllib.request.urlopen(asked, timeout=30)) as stream:  # noqa: S310
        assert stream.readline().startswith(b"data: ")
        wait_until(lambda: first.books.cancelled == 1)
        assert b'tokenmill_outstanding_requests{backend="first",tier="t"} 0.0' in gateway.get("/metrics")[2]


def test_it_opens_the_circuit() -> None:
    first = Pieces().start()
    settings = Settings(probe_interval_s=0.1, breaker_failures=3, breaker_cooldown_s=30)
    with RunningGateway(Backend("first", first.url, "t", ("tiny",)), settings=settings) as gateway:
        for text in (OTHERS[0], *PASSING[:3]):
            body = {"model": "t", "stream": True, "act": {"tiny": {"text": text}}}
            assert gateway.post(CHAT, body)[::2] == (200, text.encode())
        assert gateway.post(CHAT, body)[0] == 503
    first.stop()
