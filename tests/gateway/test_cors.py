"""Pages of other origins: what their browsers are told, and that nothing is opened which holds more than answers."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway.running import RunningGateway
from tests.gateway.upstream import FakeUpstream
from tokenmill.engine.gateway import litellm, yaml_file
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.config import Server
from tokenmill.engine.gateway.governance.options import Options, digest
from tokenmill.engine.gateway.settings import Settings
from tokenmill.engine.supervisor import arguments
from tokenmill.errors import ConfigurationError

CHAT = "/v1/chat/completions"
MASTER = "sk-a-master-key-for-tests"
PAGE = "https://chat.example.org"
PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-lang",
}
#: A backend that opens itself to everybody, as many do.
OPEN = {"access-control-allow-origin": "*", "access-control-allow-credentials": "true"}


def about_origins(headers: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.startswith("access-control-") or name == "vary"}


@pytest.fixture(scope="module")
def server() -> Iterator[FakeUpstream]:
    made = FakeUpstream().start()
    yield made
    made.stop()


def running(server: FakeUpstream, folder: Path, *origins: str) -> RunningGateway:
    settings = Settings(probe_interval_s=0.1, allowed_origins=origins)
    governance = Options(str(folder / "books.db"), digest(MASTER))
    return RunningGateway(Backend("a", server.url, "t"), settings=settings, governance=governance, key=MASTER)


@pytest.fixture(scope="module")
def gateway(server: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with running(server, tmp_path_factory.mktemp("books"), "http://localhost:3000", PAGE) as made:
        yield made


@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/v1/models/tiny", "/v1/audio/speech", "/chat/completions"])
def test_a_browser_that_asks_is_told_before_any_key(gateway: RunningGateway, path: str) -> None:
    status, headers, body = gateway.send("OPTIONS", path, headers=PREFLIGHT)
    assert (status, body) == (204, b"")
    told = about_origins(headers)
    assert (told.pop("access-control-allow-origin"), told.pop("vary")) == (PAGE, "origin")
    assert told.pop("access-control-allow-headers") == PREFLIGHT["access-control-request-headers"]
    assert "POST" in told.pop("access-control-allow-methods")
    assert told == {"access-control-max-age": "600"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_page_may_read_answers_and_what_their_headers_say(
    gateway: RunningGateway, server: FakeUpstream, stream: bool
) -> None:
    headers = {"authorization": f"Bearer {MASTER}", "content-type": "application/json", "origin": PAGE}
    expected = {"access-control-allow-origin": PAGE, "access-control-expose-headers": "*", "vary": "origin"}
    body = json.dumps({"model": "tiny", "stream": stream}).encode()
    status, told, answer = gateway.send("POST", CHAT, body, headers)
    assert (status, about_origins(told), answer) == (200, expected, server.books.sent[-1] if not stream else answer)
    assert "origin" not in server.books.requests[-1][1]
    status, told, _ = gateway.send("POST", CHAT, body, {**headers, "authorization": "Bearer sk-nobody"})
    assert (status, about_origins(told)) == (401, expected)


@pytest.mark.parametrize("path", ["/admin/keys", "/key/generate", "/dashboard", "/dashboard/login", "/metrics"])
@pytest.mark.parametrize("method", ["OPTIONS", "GET"])
def test_what_administers_stays_closed(gateway: RunningGateway, path: str, method: str) -> None:
    assert not about_origins(gateway.send(method, path, headers=PREFLIGHT)[1]).keys() - {"vary"}


@pytest.mark.parametrize("origin", ["https://evil.example.org", "https://chat.example.org.evil.org", "null", ""])
def test_other_pages_are_told_nothing(gateway: RunningGateway, origin: str) -> None:
    for method in ("OPTIONS", "GET"):
        status, headers, _ = gateway.send(method, "/v1/models", headers={**PREFLIGHT, "origin": origin})
        assert (status, about_origins(headers)) == (204 if method == "OPTIONS" else 401, {"vary": "origin"})


def test_no_cache_shows_a_page_what_was_answered_to_nobody(gateway: RunningGateway) -> None:
    assert about_origins(gateway.get("/openapi.json")[1]) == {"vary": "origin"}
    assert about_origins(gateway.post(CHAT, {})[1]) == {"vary": "origin"}


@pytest.mark.parametrize(
    ("broken", "status"), [(b"no: http\x00\r\n", b"400"), (b"x: %b\r\n" % (b"y" * 70_000), b"431")]
)
def test_a_page_may_read_what_is_wrong_with_a_head(gateway: RunningGateway, broken: bytes, status: bytes) -> None:
    begin = b"POST %b HTTP/1.1\r\nhost: a\r\n" % CHAT.encode()
    answer = gateway.raw(begin + b"origin: %b\r\n" % PAGE.encode() + broken + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert b"access-control-allow-origin: %b\r\nvary: origin\r\n" % PAGE.encode() in answer
    for other in (b"", b"origin: https://evil.example.org\r\n"):
        answer = gateway.raw(begin + other + broken + b"\r\n\r\n")
        assert b"vary: origin\r\n" in answer
        assert b"access-control" not in answer


def test_without_the_setting_nothing_is_opened_not_even_by_a_backend(server: FakeUpstream) -> None:
    with RunningGateway(Backend("a", server.url, "t")) as gateway:
        body = {"model": "tiny", "act": {"status": 200, "body": "{}", "headers": OPEN}}
        status, headers, _ = gateway.post(CHAT, body, origin=gateway.url)
        assert (status, about_origins(headers)) == (200, {})
        assert about_origins(gateway.send("OPTIONS", CHAT, headers=PREFLIGHT)[1]) == {}


def test_a_star_is_every_page(server: FakeUpstream, tmp_path: Path) -> None:
    with running(server, tmp_path, "*") as gateway:
        told = about_origins(gateway.send("OPTIONS", CHAT, headers={**PREFLIGHT, "origin": "null"})[1])
        assert told["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in told
        assert not about_origins(gateway.send("GET", "/admin/keys", headers=PREFLIGHT)[1])


def test_the_command_line_takes_them_as_vllm_does() -> None:
    asked = arguments.parse(["model", "--allowed-origins", json.dumps([PAGE])])
    assert (asked.config.server.allowed_origins, asked.engine_arguments) == ([PAGE], ())
    with pytest.raises(ConfigurationError, match="no origin as browsers write it"):
        arguments.parse(["model", "--allowed-origins", json.dumps([PAGE + "/"])])
    with pytest.raises(SystemExit):
        arguments.parse(["model", "--allowed-origins", "*"])


@pytest.mark.parametrize("origin", ["https://a.b:443", "http://a.b:80", "a.b", "https://a.b/c", "https://A.b", "null"])
def test_what_no_browser_sends_is_no_origin(origin: str) -> None:
    with pytest.raises(ValueError, match="no origin"):
        Server(allowed_origins=[origin])


def test_litellms_variable_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "litellm.yaml"
    path.write_text("model_list: [{model_name: x, litellm_params: {model: openai/x, api_key: k}}]\n", encoding="utf-8")
    monkeypatch.setenv("LITELLM_CORS_ORIGINS", f"{PAGE}, http://localhost:3000")
    server = litellm.convert(yaml_file.read(path)).config.server
    assert server.allowed_origins == [PAGE, "http://localhost:3000"]
    monkeypatch.setenv("LITELLM_CORS_ORIGINS", f"{PAGE}/path")
    with pytest.raises(ConfigurationError, match=r"LITELLM_CORS_ORIGINS: .* no origin"):
        litellm.convert(yaml_file.read(path))
