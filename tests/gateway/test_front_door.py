"""What happens before a request is understood: who may send a long body, how slowly, to which paths, with which key."""

import json
import socket
import time
from collections.abc import Iterator

import openai
import pytest

from tests.gateway.governance.governed import CHAT, MASTER_KEY, options
from tests.gateway.running import RunningGateway, read_all
from tests.gateway.upstream import FakeUpstream
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.settings import Settings

BODY = json.dumps({"model": "tiny", "messages": []}).encode()


@pytest.fixture(scope="module")
def door(shared_upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    store = tmp_path_factory.mktemp("door") / "gateway.db"
    backend = Backend("a", shared_upstream.url, "utility", api_key="the-backends-own")
    settings = Settings(probe_interval_s=0.1, body_timeout_s=0.5)
    with RunningGateway(backend, settings=settings, governance=options(str(store)), key=MASTER_KEY) as gateway:
        yield gateway


def head(key: str, *more: str) -> bytes:
    """The head of a chat completion."""
    lines = (f"POST {CHAT} HTTP/1.1", "host: a", f"authorization: Bearer {key}", *more)
    return "".join(line + "\r\n" for line in lines).encode() + b"\r\n"


@pytest.mark.parametrize("framing", ["content-length: 60000000", "transfer-encoding: chunked"])
def test_nobody_has_a_long_body_read(door: RunningGateway, framing: str) -> None:
    for expects in ((), ("expect: 100-continue",)):
        with socket.create_connection(("127.0.0.1", door.port), timeout=10) as connection:
            connection.sendall(head("sk-nobody", framing, *expects))
            # It has not sent anything of the body, and gets its answer.
            assert connection.recv(65_536).startswith(b"HTTP/1.1 401 ")


def test_an_answer_before_the_body_leaves_a_connection_in_order(door: RunningGateway, upstream: FakeUpstream) -> None:
    long = b"x" * 3_000_000
    refused = head("sk-nobody", f"content-length: {len(long)}") + long
    served = head(MASTER_KEY, f"content-length: {len(BODY)}", "connection: close") + BODY
    answer = door.raw(refused + served)
    assert (answer.count(b"HTTP/1.1 401 "), answer.count(b"HTTP/1.1 200 ")) == (1, 1)
    assert len(upstream.books.requests) == 1


def test_a_body_that_does_not_come_is_408(door: RunningGateway, upstream: FakeUpstream) -> None:
    answer = door.raw(head(MASTER_KEY, f"content-length: {len(BODY)}"))
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"paused" in answer
    assert not upstream.books.requests


def test_a_body_that_drips_is_408(door: RunningGateway, upstream: FakeUpstream) -> None:
    with socket.create_connection(("127.0.0.1", door.port), timeout=20) as connection:
        connection.sendall(head(MASTER_KEY, f"content-length: {len(BODY) + 1000}") + BODY)
        connection.settimeout(0.1)
        answer = b""
        for _ in range(200):  # each pause is shorter than what is allowed
            try:
                connection.sendall(b" ")
                answer = connection.recv(65_536)
                break
            except TimeoutError:
                continue
        connection.settimeout(20)
        answer += read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"bytes a second" in answer
    assert not upstream.books.requests


def test_a_body_that_is_slow_and_not_too_slow_arrives(door: RunningGateway, upstream: FakeUpstream) -> None:
    padding = b" " * 2000
    body = BODY + padding
    with socket.create_connection(("127.0.0.1", door.port), timeout=20) as connection:
        connection.sendall(head(MASTER_KEY, f"content-length: {len(body)}", "connection: close"))
        for start in range(0, len(body), 300):
            connection.sendall(body[start : start + 300])
            time.sleep(0.1)
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")
    assert upstream.books.requests[0][2] == body


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {MASTER_KEY}"},
        {"authorization": f"bearer  {MASTER_KEY}"},
        {"authorization": MASTER_KEY},
        {"x_api_key": MASTER_KEY},
        {"api_key": MASTER_KEY},
        {"x_litellm_api_key": MASTER_KEY},
        {"x_litellm_api_key": f"Bearer {MASTER_KEY}", "authorization": "Bearer of-another"},
    ],
    ids=str,
)
def test_a_key_may_come_in_any_of_the_usual_headers(
    door: RunningGateway, upstream: FakeUpstream, headers: dict[str, str]
) -> None:
    assert door.post(CHAT, BODY, **headers)[0] == 200
    _, sent, _ = upstream.books.requests[0]
    assert sent["authorization"] == "Bearer the-backends-own"
    assert MASTER_KEY not in str(sent)
    assert (
        door.send("GET", "/admin/accounts", None, {name.replace("_", "-"): headers[name] for name in headers})[0] == 200
    )


@pytest.mark.parametrize(
    "headers", [{"authorization": "Bearer"}, {"authorization": ""}, {"x_litellm_api_key": "Bearer "}]
)
def test_a_header_without_a_key_is_none(door: RunningGateway, headers: dict[str, str]) -> None:
    status, _, body = door.post(CHAT, BODY, **headers)
    assert (status, "No API key" in body.decode()) == (401, True)


@pytest.mark.parametrize(
    ("path", "served"),
    [
        ("/chat/completions", CHAT),
        ("/completions", "/v1/completions"),
        ("/embeddings", "/v1/embeddings"),
        ("/responses", "/v1/responses"),
        ("/moderations", "/v1/moderations"),
        ("/openai/v1/chat/completions", CHAT),
    ],
)
def test_paths_are_served_without_v1_too(door: RunningGateway, upstream: FakeUpstream, path: str, served: str) -> None:
    bearer = {"authorization": f"Bearer {MASTER_KEY}"}
    assert door.post(served, BODY, **bearer)[::2] == door.post(path, BODY, **bearer)[::2]
    assert [request[0] for request in upstream.books.requests] == [served, served]


def test_the_models_are_listed_without_v1_too(door: RunningGateway) -> None:
    bearer = {"authorization": f"Bearer {MASTER_KEY}"}
    for path in ("/models", "/models/tiny", "/models/org/nested/name"):
        assert door.send("GET", path, None, bearer)[::2] == door.send("GET", "/v1" + path, None, bearer)[::2]
    assert door.send("GET", "/models")[0] == 401
    assert door.send("POST", "/models", b"{}", bearer)[0] == 405
    assert door.send("OPTIONS", "/chat/completions")[1]["allow"] == "POST, OPTIONS"


@pytest.mark.parametrize(
    "path", ["/openai/deployments/{}/chat/completions?api-version=2024-06-01", "/engines/{}/chat/completions"]
)
@pytest.mark.parametrize("model", ["tiny", "org/nested/name", "org%2Fnested%2Fname"])
def test_a_path_names_the_model(door: RunningGateway, upstream: FakeUpstream, path: str, model: str) -> None:
    for body in ({"messages": []}, {"model": "nobody", "messages": []}):
        assert door.post(path.format(model), body, api_key=MASTER_KEY)[0] == 200
    plain = model.replace("%2F", "/")
    assert [json.loads(request[2])["model"] for request in upstream.books.requests] == [plain, plain]
    assert {request[0] for request in upstream.books.requests} == {CHAT}
    assert door.post(path.format("nobody"), {"model": "tiny"}, api_key=MASTER_KEY)[0] == 404
    assert door.post(path.format("tiny"), b"[]", api_key=MASTER_KEY)[0] == 400


@pytest.mark.parametrize(
    "path", ["/nothing", "/openai/v1/../admin", "/openai/deployments/tiny/admin", "/engines//chat/completions"]
)
def test_other_paths_are_still_none(door: RunningGateway, upstream: FakeUpstream, path: str) -> None:
    assert door.post(path, BODY, authorization=f"Bearer {MASTER_KEY}")[0] == 404
    assert not upstream.books.requests


def test_azures_client_is_served(door: RunningGateway, upstream: FakeUpstream) -> None:
    client = openai.AzureOpenAI(azure_endpoint=door.url, api_key=MASTER_KEY, api_version="2024-06-01")
    with client:
        answer = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hello"}])
    assert answer.choices[0].message.content
    assert upstream.books.requests[0][0] == CHAT
