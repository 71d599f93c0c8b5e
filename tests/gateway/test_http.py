"""HTTP/1.1 itself: keep-alive, pipelining, smuggling, oversized and slow heads."""

import json
import socket
import time
from collections.abc import Iterator

import pytest

from tests.gateway.running import RunningGateway, read_all
from tests.gateway.upstream import FakeUpstream
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.protocol import MOST_FIELDS
from tokenmill.engine.gateway.settings import Settings

BODY = json.dumps({"model": "tiny", "messages": []}).encode()
POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\n"
CLOSE = b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def impatient(shared_upstream: FakeUpstream) -> Iterator[RunningGateway]:
    settings = Settings(header_timeout_s=0.3, body_timeout_s=0.3, max_header_bytes=4096, probe_interval_s=0.1)
    with RunningGateway(Backend("a", shared_upstream.url, "utility"), settings=settings) as running:
        yield running


def test_keep_alive_and_pipelining(gateway: RunningGateway, upstream: FakeUpstream) -> None:
    one = POST + b"content-length: %d\r\n\r\n" % len(BODY) + BODY
    answer = gateway.raw(one * 3 + CLOSE)
    assert answer.count(b"HTTP/1.1 200 OK") == 4
    assert len(upstream.books.requests) == 3


def test_chunked_body_arrives_whole(gateway: RunningGateway, upstream: FakeUpstream) -> None:
    chunked = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"
    answer = gateway.raw(POST + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n" + chunked)
    assert answer.startswith(b"HTTP/1.1 200 ")
    _, headers, body = upstream.books.requests[0]
    assert body == BODY
    assert headers["content-length"] == str(len(BODY))
    assert "transfer-encoding" not in headers


@pytest.mark.parametrize(
    "head",
    [
        b"content-length: %d\r\ntransfer-encoding: chunked\r\n" % len(BODY),
        b"transfer-encoding: chunked\r\ncontent-length: 4\r\n",
        b"content-length: 4\r\ncontent-length: %d\r\n" % len(BODY),
        b"content-length: +5\r\n",
        b"content-length: -1\r\n",
        b"content-length: 5, 5\r\n",
        b"transfer-encoding: xchunked\r\n",
        b"transfer-encoding : chunked\r\n",
        b"transfer-encoding: chunked, identity\r\n",
        b"x: a\r\n b: folded\r\ncontent-length : 5\r\n",
        b"x: a\x00b\r\n",
    ],
)
def test_ambiguous_framing_is_refused(gateway: RunningGateway, upstream: FakeUpstream, head: bytes) -> None:
    answer = gateway.raw(POST + head + b"\r\n" + BODY + CLOSE)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1") == 1
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"
    assert not upstream.books.requests


@pytest.mark.parametrize(
    "garbage",
    [
        *(b"\x16\x03\x01\x02\x00\x01", b"hello\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"),
        *(b"CONNECT a:80 HTTP/1.1\r\nhost: a:80\r\n\r\n", b"CONNECT /v1/models HTTP/1.1\r\nhost: a\r\n\r\nGET"),
    ],
)
def test_what_is_not_http_is_refused(gateway: RunningGateway, garbage: bytes) -> None:
    assert gateway.raw(garbage).startswith(b"HTTP/1.1 400 ")


def test_oversized_head_is_431(impatient: RunningGateway, upstream: FakeUpstream) -> None:
    whole = b"GET /health HTTP/1.1\r\nhost: a\r\nx-big: " + b"x" * 5000 + b"\r\n\r\n"
    answer = impatient.raw(whole)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "headers_too_large"
    assert impatient.raw(b"GET /" + b"a" * 5000).startswith(b"HTTP/1.1 431 ")
    long_body = POST + b"connection: close\r\ncontent-length: 50000\r\n\r\n" + BODY + b" " * (50_000 - len(BODY))
    assert impatient.raw(long_body).startswith(b"HTTP/1.1 200 ")
    assert len(upstream.books.requests) == 1


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
def test_a_request_that_asks_for_another_protocol_is_answered_with_its_body(
    gateway: RunningGateway, upstream: FakeUpstream, apart: bool, protocol: bytes
) -> None:
    # Java's client asks for HTTP/2 so, in its first request.
    head = POST + b"connection: Upgrade, HTTP2-Settings\r\nupgrade: %b\r\nhttp2-settings: AAMA\r\n" % protocol
    head += b"content-length: %d\r\n\r\n" % len(BODY)
    rest = BODY + POST + b"content-length: %d\r\n\r\n" % len(BODY) + BODY + CLOSE
    answer = gateway.raw(*([head, rest] if apart else [head + rest]), pause_s=0.05)
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert [body for _, _, body in upstream.books.requests] == [BODY, BODY]
    assert not {"upgrade", "http2-settings", "connection"} & upstream.books.requests[0][1].keys()


def test_trailers_are_no_headers(gateway: RunningGateway, upstream: FakeUpstream) -> None:
    chunked = b"%x\r\n%b\r\n0\r\nauthorization: Bearer late\r\ncontent-type: text/plain\r\n\r\n" % (len(BODY), BODY)
    answer = gateway.raw(POST + b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n" + chunked)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert not {"authorization", "content-type"} & upstream.books.requests[0][1].keys()


@pytest.mark.parametrize(
    ("first", "more"),
    [(b"", b"x: y\r\n" * 500), (b"", b"x" * 3000), (b"x: ", b"y" * 3000)],
    ids=["trailers", "a name", "a value"],
)
def test_endless_trailers_are_431(impatient: RunningGateway, upstream: FakeUpstream, first: bytes, more: bytes) -> None:
    head = POST + b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n" % (len(BODY), BODY)
    answer = impatient.raw(head, first + more, more, pause_s=0.05)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert not upstream.books.requests


def test_http_1_0_gets_no_chunks(gateway: RunningGateway, upstream: FakeUpstream) -> None:
    body = json.dumps({"model": "tiny", "stream": True, "messages": []}).encode()
    head = POST.replace(b"1.1", b"1.0") + b"connection: keep-alive\r\ncontent-length: %d\r\n\r\n" % len(body)
    lines, _, stream = gateway.raw(head + body).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in lines
    assert b"connection: close" in lines
    assert stream == upstream.books.sent[0]


def test_too_many_headers_are_431(gateway: RunningGateway, upstream: FakeUpstream) -> None:
    # What sets of names come to is remembered: nobody may fill the memory with long ones.
    head = POST + b"".join(b"x-%d: 1\r\n" % number for number in range(MOST_FIELDS))
    answer = gateway.raw(head + b"content-length: %d\r\n\r\n" % len(BODY) + BODY)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert answer.count(b"HTTP/1.1") == 1
    assert not upstream.books.requests


def test_slow_head_is_closed(impatient: RunningGateway) -> None:
    for start in (b"", b"GET /health HTTP/1.1\r\nx-slow: "):
        began = time.monotonic()
        assert impatient.raw(start) == b""
        assert time.monotonic() - began < 5


def test_slow_second_head_is_closed(impatient: RunningGateway) -> None:
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=5) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\nGET /hea")
        assert read_all(connection).count(b"HTTP/1.1 200") == 1


def test_slow_body_is_408(impatient: RunningGateway, upstream: FakeUpstream) -> None:
    answer = impatient.raw(POST + b"content-length: 50\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert not upstream.books.requests


def test_truncated_body_reaches_nobody(gateway: RunningGateway, upstream: FakeUpstream) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
        connection.sendall(POST + b"content-length: 500\r\n\r\n" + BODY)
    assert gateway.get("/health")[0] == 200
    assert not upstream.books.requests
