"""What goes through the gateway comes out unchanged, in both directions."""

import json

import pytest

from tests.gateway.running import RunningGateway
from tests.gateway.upstream import FakeUpstream
from tokenmill.engine.gateway.backends import Backend

CHAT = "/v1/chat/completions"


def test_request_bytes_are_forwarded_unchanged(gateway: RunningGateway, upstream: FakeUpstream) -> None:
    body = (
        b'{ "model" :\t"tiny", "messages": [], "f\\u00fcr": "\xc3\xbc", "big": 1e400, "n": 1.50, "j": {"b":1, "a":2} }'
    )
    assert gateway.post(CHAT + "?a=b&c=%2F", body)[0] == 200
    path, _, seen = upstream.books.requests[0]
    assert seen == body
    assert path == CHAT + "?a=b&c=%2F"


def test_large_body_is_forwarded_unchanged(gateway: RunningGateway, upstream: FakeUpstream) -> None:
    body = json.dumps({"model": "tiny", "prompt": "größe " * 500_000}, ensure_ascii=False).encode()
    assert gateway.post("/v1/completions", body)[0] == 200
    assert upstream.books.requests[0][2] == body
    assert upstream.books.requests[0][1]["content-length"] == str(len(body))


def test_answer_is_returned_unchanged(gateway: RunningGateway, upstream: FakeUpstream) -> None:
    status, headers, body = gateway.post(CHAT, {"model": "tiny", "messages": []})
    assert status == 200
    assert body == upstream.books.sent[0]
    assert headers["x-custom"] == "kept"
    assert headers["content-type"].startswith("application/json")


@pytest.mark.parametrize("act", [{"chunks": 50}, {"chunks": 4, "interval_s": 0.02}, {"chunks": 0}])
def test_stream_bytes_are_equal(gateway: RunningGateway, upstream: FakeUpstream, act: dict[str, float]) -> None:
    ask = {"model": "tiny", "messages": [], "stream": True, "stream_options": {"include_usage": True}, "act": act}
    status, headers, body = gateway.post(CHAT, ask)
    assert status == 200
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert body == upstream.books.sent[0]
    assert body.endswith(b"data: [DONE]\n\n")


def test_headers_that_matter_reach_the_backend(gateway: RunningGateway, upstream: FakeUpstream) -> None:
    gateway.raw(
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 16\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer abc\r\nX-Custom: 1\r\nX-Custom: 2\r\nTE: trailers\r\nAccept-Encoding: gzip\r\n"
        b'Connection: close, X-Private\r\nX-Private: of this connection\r\n\r\n{"model":"tiny"}'
    )
    headers = upstream.books.requests[0][1]
    assert headers["authorization"] == "Bearer abc"
    assert headers["x-custom"] == "2"  # a dictionary keeps the last of two
    assert headers["content-type"] == "application/json"
    assert headers["accept-encoding"] == "identity"
    assert headers["host"] == f"127.0.0.1:{upstream.port}"
    assert not {"x-private", "te", "connection"} & set(headers)


def test_request_id_is_kept_or_made(gateway: RunningGateway, upstream: FakeUpstream) -> None:
    ask = {"model": "tiny", "messages": []}
    _, headers, _ = gateway.post(CHAT, ask, x_request_id="mine-1")
    assert headers["x-request-id"] == "mine-1"
    _, headers, _ = gateway.post(CHAT, ask)
    assert len(headers["x-request-id"]) == 32
    assert [headers["x-request-id"] for _, headers, _ in upstream.books.requests] == ["mine-1", headers["x-request-id"]]
    _, headers, _ = gateway.post(CHAT, ask, x_request_id="x" * 500)
    assert len(headers["x-request-id"]) == 32
    act = {"status": 200, "body": "{}", "headers": {"x-request-id": "theirs", "content-type": "application/json"}}
    _, headers, _ = gateway.post(CHAT, {**ask, "act": act}, x_request_id="mine-2")
    assert headers["x-request-id"] == "mine-2"
    assert headers["x-upstream-request-id"] == "theirs"


@pytest.mark.parametrize(
    "path", ["/v1/embeddings", "/v1/rerank", "/rerank", "/score", "/v1/future/thing", "/v2/rerank"]
)
def test_other_paths_pass_through(gateway: RunningGateway, upstream: FakeUpstream, path: str) -> None:
    assert gateway.post(path, {"model": "tiny", "input": "a"})[0] == 200
    assert upstream.books.requests[0][0] == path


@pytest.mark.parametrize(
    ("prefix", "path"),
    [
        ("/v1", "/v1/completions"),
        ("", "/v1/completions"),
        ("/llm", "/llm/v1/completions"),
        ("/v1/proxy/v1/", "/v1/proxy/v1/completions"),
        ("/v1beta/openai/", "/v1beta/openai/completions"),
        ("/api/paas/v4", "/api/paas/v4/completions"),
        ("/vnext", "/vnext/v1/completions"),
    ],
)
def test_a_path_follows_a_prefix_that_names_a_version(upstream: FakeUpstream, prefix: str, path: str) -> None:
    backend = Backend("a", upstream.url.removesuffix("/v1") + prefix, "t", ("tiny",), health_path=None)
    with RunningGateway(backend) as running:
        assert running.post("/v1/completions?a=b", {"model": "tiny"})[0] == 200
        assert running.post("/rerank", {"model": "tiny"})[0] == 200
    asked = [path for path, _, _ in upstream.books.requests]
    assert asked == [path + "?a=b", prefix.rstrip("/").removesuffix("/v1") + "/rerank"]


def test_form_goes_to_the_tier_of_its_model(gateway: RunningGateway, upstream: FakeUpstream) -> None:
    form = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n\x00\xff\r\n'
        b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n%s\r\n--b--\r\n'
    )
    kind = {"content-type": "multipart/form-data; boundary=b"}
    assert gateway.send("POST", "/v1/audio/transcriptions", form % b"tiny", kind)[0] == 200
    assert upstream.books.requests[0][2] == form % b"tiny"
    assert gateway.send("POST", "/v1/audio/transcriptions", form % b"nobody", kind)[0] == 404


def test_tier_name_and_renamed_model_become_the_backends_own(gateway: RunningGateway, upstream: FakeUpstream) -> None:
    for name in ("utility", "tiny"):
        gateway.post(CHAT, b'{"messages": [ ], "model":"%s","x":1.0}' % name.encode())
    seen = [request[2] for request in upstream.books.requests]
    assert seen == [b'{"messages":[ ],"model":"tiny","x":1.0}', b'{"messages": [ ], "model":"tiny","x":1.0}']


def test_missing_model_means_the_sole_tiers(gateway: RunningGateway, upstream: FakeUpstream) -> None:
    assert gateway.post(CHAT, b'{"messages":[]}')[0] == 200
    assert upstream.books.requests[0][2] == b'{"messages":[]}'


@pytest.mark.parametrize("status", [400, 401, 422, 429, 500, 503])
def test_backends_own_error_is_untouched(gateway: RunningGateway, upstream: FakeUpstream, status: int) -> None:
    body = '{"error":  {"message": "no", "type": "BadRequestError", "param": null, "code": 400}, "extra": 1}'
    act = {"status": status, "body": body, "headers": {"content-type": "application/json", "x-why": "because"}}
    got, headers, answer = gateway.post(CHAT, {"model": "org/nested/name", "messages": [], "act": act})
    assert (got, answer) == (status, body.encode())
    assert headers["x-why"] == "because"
    assert len(upstream.books.requests) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"detail": "Not Found"}', "Not Found"),
        ('{"detail": [{"loc": ["body"], "msg": "wrong"}]}', '[{"loc":["body"],"msg":"wrong"}]'),
        ("Internal trouble", "Internal trouble"),
        ("", "The backend answered with status 404 and no text."),
    ],
)
def test_errors_without_error_object_get_one(
    gateway: RunningGateway, upstream: FakeUpstream, body: str, message: str
) -> None:
    del upstream
    act = {"status": 404, "body": body, "headers": {"content-type": "application/json"}}
    status, _, answer = gateway.post(CHAT, {"model": "tiny", "messages": [], "act": act})
    parsed = json.loads(answer)
    assert status == 404
    assert parsed["error"] == {"message": message, "type": "not_found_error", "param": None, "code": None}
    if body.startswith("{"):
        assert parsed["detail"] == json.loads(body)["detail"]


def test_an_error_that_is_compressed_stays_as_it_is(gateway: RunningGateway, upstream: FakeUpstream) -> None:
    del upstream
    act = {"status": 400, "body": "not really gzip", "headers": {"content-encoding": "gzip"}}
    status, headers, answer = gateway.post(CHAT, {"model": "tiny", "messages": [], "act": act})
    assert (status, headers["content-encoding"], answer) == (400, "gzip", b"not really gzip")


@pytest.mark.parametrize("status", [301, 304, 307])
def test_a_redirect_sends_the_client_nowhere(gateway: RunningGateway, upstream: FakeUpstream, status: int) -> None:
    act = {"status": status, "headers": {"location": f"{upstream.url}/elsewhere"}}
    got, headers, answer = gateway.post(CHAT, {"model": "tiny", "messages": [], "act": act})
    assert (got, json.loads(answer)["error"]["code"]) == (502, "upstream_redirect")
    assert "location" not in headers
    assert len(upstream.books.requests) == 1


def test_what_a_backend_says_of_its_host_is_none_of_the_gateways(
    gateway: RunningGateway, upstream: FakeUpstream
) -> None:
    del upstream
    said = {
        "set-cookie": "tokenmill_session=theirs; Path=/dashboard",
        "alt-svc": 'h3=":443"; ma=86400',
        "strict-transport-security": "max-age=31536000; includeSubDomains",
        "nel": '{"report_to": "theirs"}',
        "report-to": '{"group": "theirs"}',
        "clear-site-data": '"*"',
        "refresh": "0; url=https://elsewhere.example",
        "location": "https://elsewhere.example",
        "x-accel-redirect": "/internal/secrets",
        "x-sendfile": "/etc/passwd",
    }
    kept = {"x-accel-buffering": "no", "retry-after": "7", "openai-processing-ms": "12", "cf-ray": "8"}
    act = {"status": 200, "body": "{}", "headers": {"content-type": "application/json", **said, **kept}}
    for stream in (False, True):
        headers = gateway.post(CHAT, {"model": "tiny", "messages": [], "stream": stream, "act": act})[1]
        assert not said.keys() & headers.keys()
        assert kept.items() <= headers.items()


def test_models_are_the_backends_own_objects(gateway: RunningGateway) -> None:
    status, _, body = gateway.get("/v1/models")
    listed = json.loads(body)
    assert status == 200
    assert [model["id"] for model in listed["data"]] == ["tiny", "org/nested/name"]
    assert listed["data"][0] == {"id": "tiny", "object": "model", "owned_by": "fake", "max_model_len": 4096}
    assert json.loads(gateway.get("/v1/models/org/nested/name")[2])["id"] == "org/nested/name"
    assert json.loads(gateway.get("/v1/models/org%2Fnested%2Fname")[2])["id"] == "org/nested/name"
    assert gateway.get("/v1/models/none")[0] == 404
