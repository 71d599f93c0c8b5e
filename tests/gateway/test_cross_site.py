"""What web pages may ask of a gateway without keys, and that no program is taken for one."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway.running import RunningGateway
from tests.gateway.upstream import FakeUpstream
from tokenmill.engine.gateway.api_error import ApiError
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.cross_site import CrossSite
from tokenmill.engine.gateway.governance.options import Options, digest
from tokenmill.engine.gateway.settings import Settings

CHAT = "/v1/chat/completions"
BODY = json.dumps({"model": "tiny", "messages": []}).encode()
PAGE = "https://chat.example.org"
LOCAL, FAR = ("127.0.0.1", 8000), ("192.0.2.7", 8000)


@pytest.fixture(scope="module")
def server() -> Iterator[FakeUpstream]:
    made = FakeUpstream().start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def gateway(server: FakeUpstream) -> Iterator[RunningGateway]:
    settings = Settings(probe_interval_s=0.1, allowed_origins=(PAGE,))
    with RunningGateway(Backend("a", server.url, "t"), settings=settings) as made:
        yield made


def send(gateway: RunningGateway, headers: dict[str, str], path: str = CHAT) -> int:
    return gateway.send("POST", path, BODY, {"content-type": "text/plain", **headers})[0]


@pytest.mark.parametrize("origin", ["https://evil.example.org", "http://evil.example.org", "null", PAGE + ".evil.org"])
def test_a_page_sends_nothing_to_a_model_through_somebodys_browser(
    gateway: RunningGateway, server: FakeUpstream, origin: str
) -> None:
    before = len(server.books.requests)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json", "multipart/form-data"):
        for path in (CHAT, "/v1/responses/resp_1/cancel", "/v1/audio/speech", "/chat/completions"):
            assert send(gateway, {"origin": origin, "content-type": kind}, path) == 403
    assert len(server.books.requests) == before
    assert send(gateway, {"origin": PAGE}) == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "vscode-webview://1a2b"},
        {"origin": "chrome-extension://abc", "sec-fetch-site": "none"},
        {"origin": "app://obsidian.md"},
        {"origin": "https://ui.example.org", "sec-fetch-site": "same-origin"},
        {"origin": "https://ui.example.org", "x-forwarded-host": "ui.example.org"},
    ],
)
def test_programs_and_pages_behind_the_same_proxy_are_served(gateway: RunningGateway, headers: dict[str, str]) -> None:
    assert send(gateway, headers) == 200


def test_curl_is_served_as_it_comes(gateway: RunningGateway) -> None:
    said = subprocess.run(
        ["curl", "-s", gateway.url + CHAT, "-d", BODY.decode()], capture_output=True, check=True
    ).stdout
    assert "choices" in json.loads(said)


def test_with_keys_a_page_has_none_and_is_told_so(server: FakeUpstream, tmp_path: Path) -> None:
    options = Options(str(tmp_path / "books.db"), digest("sk-a-master-key-for-tests"))
    with RunningGateway(Backend("a", server.url, "t"), governance=options, key="sk-a-master-key-for-tests") as gateway:
        assert send(gateway, {"origin": "https://evil.example.org"}) == 401
        headers = {"origin": "https://evil.example.org", "authorization": "Bearer sk-a-master-key-for-tests"}
        assert send(gateway, headers) == 200


def passes(origin: str, host: str, server: object = LOCAL, **more: str) -> bool:
    fields = {b"origin": origin.encode(), b"host": host.encode()}
    fields |= {name.replace("_", "-").encode(): value.encode() for name, value in more.items()}
    try:
        CrossSite(()).check(fields, server)
    except ApiError as error:
        assert error.status == 403
        return False
    return True


@pytest.mark.parametrize(
    "host", ["localhost:8000", "127.0.0.1:8000", "[::1]:8000", "gpubox:8000", "a.localhost", "192.168.1.5"]
)
def test_a_page_from_here_may(host: str) -> None:
    assert passes(f"http://{host}", host)
    assert passes(f"http://{host}", host, sec_fetch_site="same-origin")
    assert not passes(f"http://{host}", "other:8000")
    assert not passes(f"http://{host}", host, sec_fetch_site="same-site")
    assert not passes("http://localhost:3000", host)


def test_a_name_that_was_made_to_mean_this_machine_is_not_from_here() -> None:
    for server in (LOCAL, ("::1", 8000), ("::ffff:127.0.0.1", 8000)):
        for host in ("evil.example.org:8000", "evil.example.org", "127.0.0.1.evil.org:8000", "evil.org.:8000"):
            assert not passes(f"http://{host}", host, server)
    # A network's own names, and whoever has a certificate for one.
    assert passes("http://gpu.example.org:8000", "gpu.example.org:8000", FAR)
    assert passes("https://gpu.example.org", "gpu.example.org", LOCAL)
    assert passes("https://gpu.example.org", "gpu.example.org:443", LOCAL)
