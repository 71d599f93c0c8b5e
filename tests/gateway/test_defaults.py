"""Fields that a backend's configuration gives to chat completions which do not say them."""

import json
from typing import Any

import pytest

from tests.gateway.anthropic_upstream import FakeAnthropic
from tests.gateway.running import RunningGateway
from tests.gateway.upstream import FakeUpstream
from tokenmill.engine.gateway.backend_section import RemoteBackend
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.body import Body
from tokenmill.engine.gateway.defaults import PATH, defaults_for, longest

HELLO: Any = [{"role": "user", "content": "hello"}]
DEFAULTS = {"temperature": 0.2, "max_tokens": 256, "chat_template_kwargs": {"enable_thinking": False}}


@pytest.mark.parametrize(
    ("said", "added"),
    [
        ({}, {"temperature", "max_tokens", "chat_template_kwargs"}),
        ({"temperature": 0, "max_tokens": None}, {"max_tokens", "chat_template_kwargs"}),
        ({"max_completion_tokens": 5}, {"temperature", "chat_template_kwargs"}),
        ({"chat_template_kwargs": {}}, {"temperature", "max_tokens"}),
    ],
)
def test_the_clients_word_goes_first(said: dict[str, Any], added: set[str]) -> None:
    body = Body(json.dumps({"messages": HELLO, **said}).encode())
    assert set(defaults_for(DEFAULTS, PATH, body)) == added
    assert not defaults_for(DEFAULTS, "/v1/embeddings", body)


def test_who_says_how_hard_to_think_gets_no_other_word_for_it() -> None:
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 2048}, "temperature": 1}
    body = Body(json.dumps({"messages": HELLO, "reasoning_effort": "low"}).encode())
    assert defaults_for(thinking, PATH, body) == {"temperature": 1}
    body = Body(json.dumps({"messages": HELLO, "thinking": {"type": "disabled"}}).encode())
    assert defaults_for({"reasoning_effort": "high"}, PATH, body) == {}


def test_the_longest_answer_that_they_allow() -> None:
    assert [longest(one) for one in (DEFAULTS, {"temperature": 1}, {})] == [256, 0, 0]


def test_backends_get_them(upstream: FakeUpstream) -> None:
    said = FakeAnthropic().start()
    backends = (
        Backend("a", upstream.url, "t", ("tiny",), defaults=DEFAULTS),
        Backend(
            *("b", said.url, "u", ("claude",)),
            api_key="sk-ant-key",
            protocol="anthropic",
            health_path=None,
            defaults={"max_tokens": 3},
        ),
    )
    with RunningGateway(*backends) as gateway:
        gateway.post(PATH, {"model": "tiny", "messages": HELLO, "temperature": 1})
        got = json.loads(upstream.books.requests[-1][2])
        assert (got["temperature"], got["max_tokens"]) == (1, 256)
        assert got["chat_template_kwargs"] == {"enable_thinking": False}
        # It stops where it was told to, and not by the API's default.
        answer = json.loads(gateway.post(PATH, {"model": "claude", "messages": HELLO})[2])
        assert answer["choices"][0]["finish_reason"] == "length"
    said.stop()


@pytest.mark.parametrize("wrong", [{"messages": []}, {"Model": "x"}, {"max_tokens": "many"}, {"max_tokens": 0}])
def test_what_decides_about_a_request_is_no_default(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"leave it out|not a number of tokens"):
        RemoteBackend(url="http://h", defaults=wrong)
