"""Anthropic's own client through the gateway to a backend with its protocol: nothing is translated."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest

from tests.gateway.anthropic_upstream import FakeAnthropic
from tests.gateway.governance.governed import MASTER_KEY, options
from tests.gateway.running import RunningGateway, wait_until
from tests.gateway.upstream import FakeUpstream
from tokenmill.engine.gateway.backends import Backend

HELLO: Any = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]


@pytest.fixture(scope="module")
def server() -> Iterator[FakeAnthropic]:
    started = FakeAnthropic().start()
    started.version = anthropic.Anthropic(api_key="any").default_headers["anthropic-version"]
    yield started
    started.stop()


def backend(server: FakeUpstream) -> Backend:
    names = {"claude": "claude-real"}
    return Backend(
        "frontier", server.url, "cloud", ("claude",), names, "sk-ant-key", protocol="anthropic", health_path=None
    )


@pytest.fixture(scope="module")
def gateway(server: FakeAnthropic, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    folder: Path = tmp_path_factory.mktemp("books")
    with RunningGateway(backend(server), governance=options(str(folder / "books.db")), key=MASTER_KEY) as running:
        yield running


@pytest.fixture(scope="module")
def client(gateway: RunningGateway) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=gateway.url, api_key=MASTER_KEY, max_retries=0, timeout=20) as made:
        yield made


def test_a_message(client: anthropic.Anthropic, server: FakeAnthropic) -> None:
    answer = client.messages.create(model="claude", max_tokens=20, messages=HELLO)
    assert (answer.model, answer.content[0].type, answer.stop_reason) == ("claude-real", "text", "end_turn")
    assert answer.usage.cache_read_input_tokens == 3
    sent = json.loads(server.books.requests[-1][2])
    assert sent == {"model": "claude-real", "max_tokens": 20, "messages": HELLO}


def test_paths_that_its_users_know_from_elsewhere(gateway: RunningGateway) -> None:
    below = f"{gateway.url}/anthropic"
    with anthropic.Anthropic(base_url=below, api_key=MASTER_KEY, max_retries=0, timeout=20) as client:
        assert client.messages.create(model="claude", max_tokens=20, messages=HELLO).stop_reason == "end_turn"
        with pytest.raises(anthropic.NotFoundError):
            client.models.list()
    assert gateway.get("/v1/messages")[0] == 405
    described = json.loads(gateway.get("/openapi.json")[2])["paths"]
    assert {"/v1/messages", "/v1/messages/count_tokens"} <= described.keys()


def test_a_stream(client: anthropic.Anthropic) -> None:
    with client.messages.stream(model="claude", max_tokens=20, messages=HELLO) as stream:
        assert "".join(stream.text_stream) == "You said hello"
        assert stream.get_final_message().usage.output_tokens == 5


def test_what_it_uses_is_charged(server: FakeAnthropic, tmp_path: Path) -> None:
    governance = options(str(tmp_path / "books.db"))
    with (
        RunningGateway(backend(server), governance=governance, key=MASTER_KEY) as gateway,
        anthropic.Anthropic(base_url=gateway.url, api_key=MASTER_KEY, max_retries=0, timeout=20) as client,
    ):
        client.messages.create(model="claude", max_tokens=20, messages=HELLO)
        with client.messages.stream(model="claude", max_tokens=20, messages=HELLO) as stream:
            stream.get_final_message()

        def sums() -> tuple[int, ...]:
            head = {"authorization": f"Bearer {MASTER_KEY}"}
            rows = json.loads(gateway.send("GET", "/admin/ledger", headers=head)[2])["rows"]
            names = ("prompt_tokens", "cached_tokens", "completion_tokens")
            return tuple(sum(row[name] for row in rows) for name in names)

        wait_until(lambda: sums() == (24, 6, 10))


def test_errors_keep_their_form(client: anthropic.Anthropic) -> None:
    overload: Any = [{"role": "user", "content": [{"type": "text", "text": "overload"}]}]
    with pytest.raises(anthropic.APIStatusError) as caught:
        client.messages.create(model="claude", max_tokens=20, messages=overload)
    assert caught.value.status_code == 529
    assert caught.value.body["error"]["type"] == "overloaded_error"  # type: ignore[index]


def test_errors_of_the_gateway_have_that_form(client: anthropic.Anthropic, gateway: RunningGateway) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(model="nobody", max_tokens=20, messages=HELLO)
    said: Any = caught.value.body
    assert (said["type"], said["error"]["type"], said["error"]["code"]) == (
        "error",
        "not_found_error",
        "model_not_found",
    )
    with pytest.raises(anthropic.AuthenticationError) as refused:
        client.with_options(api_key="sk-wrong").messages.count_tokens(model="claude", messages=HELLO)
    assert refused.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]
    head = {"authorization": f"Bearer {MASTER_KEY}"}
    chat = json.loads(gateway.send("POST", "/v1/chat/completions", b'{"model": "nobody"}', head)[2])
    assert list(chat) == ["error"]


def test_a_stream_that_breaks_off_is_an_error(client: anthropic.Anthropic) -> None:
    said: Any = [{"role": "user", "content": [{"type": "text", "text": "hang up"}]}]
    stream = client.messages.create(model="claude", max_tokens=20, messages=said, stream=True)
    with pytest.raises(anthropic.APIStatusError, match="broke off"):
        list(stream)
