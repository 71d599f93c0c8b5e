"""A client's fault gets a 4xx in the API's shape, whatever it is, and never reaches a backend when malformed."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.gateway.running import RunningGateway
from tests.gateway.upstream import FakeUpstream

CHAT = "/v1/chat/completions"


def error_of(body: bytes) -> dict[str, object]:
    """The error object, checked for its shape."""
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "Traceback" not in error["message"]
    return dict(error)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": "tiny", "messages": [',
        b'{"model": "tiny"} trailing',
        b"[]",
        b'"text"',
        b"null",
        b'{"model": "tiny", "prompt": "\xff\xfe"}',
        b'{"model\xff": 1}',
        b'{"model": "tiny", "prompt": "\xed\xa0\x80"}',
        b'{"model": "tiny", "n": 01}',
        b'{"model": "tiny", "n": NaN}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b"\xef\xbb\xbf{}",
        '{"model": "tiny"}'.encode("utf-16"),
    ],
    ids=lambda body: repr(body[:24]),
)
def test_malformed_json_is_400(gateway: RunningGateway, upstream: FakeUpstream, body: bytes) -> None:
    status, headers, answer = gateway.post(CHAT, body)
    assert status == 400
    assert error_of(answer)["code"] == "invalid_json"
    assert headers["content-type"] == "application/json"
    assert not upstream.books.requests


@pytest.mark.parametrize("stream", [1, "true", "yes", [], 0.0])
def test_stream_of_a_wrong_type_is_400(gateway: RunningGateway, upstream: FakeUpstream, stream: object) -> None:
    status, _, body = gateway.post(CHAT, {"model": "tiny", "messages": [], "stream": stream})
    assert (status, error_of(body)["param"]) == (400, "stream")
    assert not upstream.books.requests
    assert gateway.post(CHAT, {"model": "tiny", "messages": [], "stream": None})[0] == 200


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "x"])
def test_compressed_body_is_415(gateway: RunningGateway, upstream: FakeUpstream, encoding: str) -> None:
    # Also one that is JSON as it stands: unpacked, it might be another.
    status, headers, answer = gateway.post(CHAT, {"model": "tiny", "messages": []}, content_encoding=encoding)
    assert (status, headers["accept-encoding"]) == (415, "identity")
    assert error_of(answer)["code"] == "unsupported_encoding"
    assert not upstream.books.requests
    assert gateway.post(CHAT, {"model": "tiny", "messages": []}, content_encoding="identity")[0] == 200


@pytest.mark.parametrize("name", ["Model", "MODEL", "max_toKens", "meſſages"])
def test_a_field_that_some_servers_take_for_another_is_400(
    gateway: RunningGateway, upstream: FakeUpstream, name: str
) -> None:
    status, _, answer = gateway.post(CHAT, {"model": "tiny", name: "dear"})
    assert status == 400
    assert error_of(answer)["code"] == "invalid_field"
    assert not upstream.books.requests
    assert gateway.post(CHAT, {"model": "tiny", "messages": [], "chatTemplate": "Model", "é": 1})[0] == 200


@pytest.mark.parametrize("model", [1, ["tiny"], {"a": 1}, True])
def test_model_of_a_wrong_type_is_400(gateway: RunningGateway, model: object) -> None:
    status, _, body = gateway.post(CHAT, {"model": model})
    assert status == 400
    assert error_of(body)["param"] == "model"


@pytest.mark.parametrize("path", ["/v1/tokenmill/route", "/tokenmill/route"])
def test_the_dry_run_asks_no_model_where_nothing_is_routed_either(
    gateway: RunningGateway, upstream: FakeUpstream, path: str
) -> None:
    before = len(upstream.books.requests)
    status, _, body = gateway.post(path, {"model": "tiny", "messages": []})
    assert (status, error_of(body)["code"]) == (404, "not_found")
    assert len(upstream.books.requests) == before


@pytest.mark.parametrize("name", ["content-type", "content-encoding"])
def test_a_body_is_said_to_be_read_in_one_way_only(gateway: RunningGateway, upstream: FakeUpstream, name: str) -> None:
    before = len(upstream.books.requests)
    body = b'{"model": "tiny", "messages": []}'
    twice = f"{name}: identity\r\n{name}: deflate\r\ncontent-length: {len(body)}\r\n\r\n"
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{twice}"
    assert f"two headers `{name}`".encode() in gateway.raw(head.encode() + body)
    assert len(upstream.books.requests) == before


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
def test_no_client_changes_an_engine(gateway: RunningGateway, upstream: FakeUpstream, path: str) -> None:
    before = len(upstream.books.requests)
    status, _, body = gateway.post(path, {"model": "tiny", "lora_name": "a", "lora_path": "/b"})
    assert (status, error_of(body)["code"]) == (404, "not_found")
    assert len(upstream.books.requests) == before


@pytest.mark.parametrize("model", ["nobody", "", "x" * 100_000, "a\r\nb", "\u0000", "../../etc"])
def test_unknown_model_is_404(gateway: RunningGateway, model: str) -> None:
    status, _, body = gateway.post(CHAT, {"model": model})
    assert status == 404
    assert error_of(body)["code"] == "model_not_found"
    assert len(body) < 1000


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", CHAT, 405, "POST, OPTIONS"),
        ("DELETE", CHAT, 405, "POST, OPTIONS"),
        ("POST", "/v1/models", 405, "GET, HEAD, OPTIONS"),
        ("POST", "/v1/models/tiny", 405, "GET, HEAD, OPTIONS"),
        ("POST", "/health", 405, "GET, HEAD, OPTIONS"),
        ("PUT", "/metrics", 405, "GET, HEAD, OPTIONS"),
        ("GET", "/v1/nothing", 404, None),
        ("GET", "/", 404, None),
        ("POST", "/", 404, None),
        ("POST", "/admin", 404, None),
        ("POST", "/v1/../admin", 404, None),
        ("POST", "/v1/%2e%2e/admin", 404, None),
        ("POST", "/v1//admin", 404, None),
        ("POST", "/v1/a%0d%0ab", 404, None),
        ("GET", "/v1/models/", 404, None),
    ],
)
def test_wrong_path_or_method(
    gateway: RunningGateway, upstream: FakeUpstream, method: str, path: str, status: int, allow: str | None
) -> None:
    got, headers, body = gateway.send(method, path, b'{"model": "tiny"}')
    assert got == status
    assert headers.get("allow") == allow
    error_of(body)
    assert not upstream.books.requests


def test_head_and_options(gateway: RunningGateway) -> None:
    status, headers, body = gateway.send("HEAD", "/v1/models")
    assert (status, body) == (200, b"")
    assert int(headers["content-length"]) > 0
    status, headers, body = gateway.send("OPTIONS", CHAT)
    assert (status, headers["allow"], body) == (204, "POST, OPTIONS", b"")


def test_too_long_body_is_413(gateway: RunningGateway, upstream: FakeUpstream) -> None:
    body = b'{"model": "tiny", "prompt": "' + b"x" * 9_000_000 + b'"}'
    status, _, answer = gateway.post(CHAT, body)
    assert status == 413
    assert error_of(answer)["code"] == "request_too_large"
    head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 99000000000\r\n\r\n"
    assert gateway.raw(head).startswith(b"HTTP/1.1 413 ")
    chunked = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
    chunk = b"%x\r\n" % 1_000_000 + b"x" * 1_000_000 + b"\r\n"
    assert gateway.raw(chunked + chunk * 9 + b"0\r\n\r\n").startswith(b"HTTP/1.1 413 ")
    assert not upstream.books.requests


def test_expect_continue_is_answered_before_the_body(gateway: RunningGateway) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\nconnection: close\r\ncontent-length: "
    assert gateway.raw(head + b"99000000000\r\n\r\n").startswith(b"HTTP/1.1 413 ")
    body = b'{"model": "tiny", "prompt": "a"}'
    answer = gateway.raw(head + b"%d\r\n\r\n" % len(body), body, pause_s=0.1)
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 ")
    # To HTTP/1.0 that would be the answer.
    answer = gateway.raw(head.replace(b"/1.1", b"/1.0") + b"%d\r\n\r\n" % len(body), body, pause_s=0.1)
    assert answer.startswith(b"HTTP/1.1 200 ")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.binary(max_size=200)
    | json_values.map(lambda value: json.dumps(value).encode())
    | st.fixed_dictionaries({"model": st.just("tiny")}, optional={"stream": json_values, "messages": json_values}).map(
        lambda value: json.dumps(value).encode()
    )
)
def test_no_body_makes_the_gateway_fail(gateway: RunningGateway, body: bytes) -> None:
    status, _, answer = gateway.post(CHAT, body)
    assert status < 500
    if status >= 400:
        error_of(answer)
