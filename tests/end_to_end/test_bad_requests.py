"""Ten kinds of bad request to the whole stack: each gets a 4xx in the shape of the API's errors, and it serves on."""

import http.client
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.supervisor.running import Running, call

pytestmark = pytest.mark.end_to_end
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def chat(**changes: Any) -> bytes:
    fields = {"model": "tiny-target", "max_tokens": 4, "messages": [{"role": "user", "content": "x"}]}
    return json.dumps(fields | changes).encode()


@dataclass(frozen=True)
class Bad:
    """A request that must be refused."""

    kind: str
    body: bytes
    path: str = CHAT
    method: str = "POST"
    status: tuple[int, ...] = (400, 422)


BAD = [
    Bad("unknown-model", chat(model="gpt-99"), status=(404,)),
    Bad("negative-max-tokens", chat(max_tokens=-5)),
    Bad("absurd-max-tokens", chat(max_tokens=10**30)),
    Bad("absurd-temperature", chat(temperature=1e30)),
    Bad("negative-n", chat(n=-1)),
    Bad("malformed-json", b'{"model": "tiny-target", messages: []}'),
    Bad("truncated-json", chat()[:-7]),
    Bad("wrong-type-of-messages", chat(messages="hello")),
    Bad("wrong-type-of-model", chat(model=["tiny-target"])),
    Bad("wrong-type-of-body", b"[1, 2]"),
    Bad("prompt-too-long", json.dumps({"model": "tiny-target", "prompt": "word " * 9000}).encode(), COMPLETIONS),
    Bad("wrong-method", b"", method="DELETE", status=(405,)),
    Bad("unknown-path", chat(), path="/v1/chat/nothing", status=(404,)),
    Bad("empty-body", b""),
    Bad("invalid-utf-8", b'{"model": "tiny-target", "prompt": "\xff\xfe"}', COMPLETIONS),
    Bad("deep-nesting", b'{"model": "tiny-target", "prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", COMPLETIONS),
]


def check(bad: Bad, status: int, body: bytes) -> None:
    assert status in bad.status, (status, body[:300])
    error = json.loads(body)["error"]
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert {"param", "code"} <= set(error)


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.kind)
def test_refused_over_http(server: Running, bad: Bad) -> None:
    where = urlsplit(server.url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=60)
    try:
        connection.request(bad.method, bad.path, bad.body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        check(bad, answer.status, answer.read())
    finally:
        connection.close()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_refused_to_curl(server: Running, tmp_path: Path) -> None:
    for bad in BAD:
        body = tmp_path / "body"
        body.write_bytes(bad.body)
        command = ["curl", "-sS", "-m", "60", "-X", bad.method, "-H", "Content-Type: application/json"]
        command += ["--data-binary", f"@{body}", "-w", "\n%{http_code}", server.url + bad.path]
        shown = subprocess.run(command, capture_output=True, check=True).stdout
        answer, _, status = shown.rpartition(b"\n")
        check(bad, int(status), answer)


def test_it_serves_on(server: Running) -> None:
    status, _, answer = call(server.url + CHAT, json.loads(chat()), timeout=60)
    assert status == 200, answer
