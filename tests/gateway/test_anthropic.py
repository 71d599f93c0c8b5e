"""Chat completions on a backend with Anthropic's API, driven by the official OpenAI client."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest

from tests.gateway.anthropic_upstream import THOUGHTS, FakeAnthropic
from tests.gateway.running import RunningGateway
from tests.gateway.upstream import FakeUpstream
from tokenmill.engine.gateway import anthropic, anthropic_stream
from tokenmill.engine.gateway.api_error import ApiError
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.connection import CutError, NoAnswerError
from tokenmill.engine.gateway.pipeline import Usage
from tokenmill.engine.gateway.sse import LONGEST

HELLO: Any = [{"role": "user", "content": "hello"}]
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    server = FakeAnthropic().start()
    backend = Backend(
        "frontier",
        server.url,
        "cloud",
        ("claude",),
        {"claude": "claude-real"},
        "sk-ant-key",
        protocol="anthropic",
        health_path=None,
        zone="cloud",
    )
    with (
        RunningGateway(backend) as gateway,
        openai.OpenAI(base_url=gateway.url + "/v1", api_key="sk-client", max_retries=0, timeout=20) as made,
    ):
        yield made
    server.stop()


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="claude", messages=HELLO)
    assert answer.object == "chat.completion"
    assert answer.model == "claude-real"
    assert answer.choices[0].message.content == "You said hello"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (12, 5, 17)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.usage.prompt_tokens_details.cache_creation_tokens == 0  # type: ignore[attr-defined]
    assert (
        client.chat.completions.create(model="cloud", messages=HELLO, max_tokens=2).choices[0].finish_reason == "length"
    )


def test_stream(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True}
    events = list(client.chat.completions.create(model="claude", messages=HELLO, stream=True, stream_options=options))
    assert "".join(event.choices[0].delta.content or "" for event in events if event.choices) == "You said hello"
    assert [event.choices[0].finish_reason for event in events if event.choices][-1] == "stop"
    assert events[0].choices[0].delta.role == "assistant"
    assert events[-1].usage is not None
    assert events[-1].usage.total_tokens == 17
    without = list(client.chat.completions.create(model="claude", messages=HELLO, stream=True))
    assert all(event.usage is None for event in without)


@pytest.mark.parametrize("streamed", [False, True])
def test_what_is_written_into_the_cache_is_among_the_prompts_tokens(client: openai.OpenAI, streamed: bool) -> None:
    """LiteLLM's words, which its clients know; OpenAI's API has none for how long it is kept."""
    marks: Any = ({"type": "ephemeral"}, {"type": "ephemeral", "ttl": "1h"}, {"type": "ephemeral", "ttl": "1h"})
    texts: Any = [{"type": "text", "text": "hello", "cache_control": mark} for mark in marks]
    asked: Any = {"model": "claude", "messages": [{"role": "user", "content": texts}]}
    if streamed:
        events = client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **asked)
        usage: Any = list(events)[-1].usage
    else:
        usage = client.chat.completions.create(**asked).usage
    assert usage.to_dict() == {
        "prompt_tokens": 7 + 3 + 6,
        "completion_tokens": 5,
        "total_tokens": 21,
        "prompt_tokens_details": {
            "cached_tokens": 3,
            "cache_creation_tokens": 6,
            "cache_creation_token_details": {"ephemeral_5m_input_tokens": 2, "ephemeral_1h_input_tokens": 4},
        },
        "cache_creation_input_tokens": 6,
        "cache_read_input_tokens": 3,
    }


def test_tools(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="claude", messages=HELLO, tools=TOOLS, tool_choice="required")
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.tool_calls is not None
    call: Any = answer.choices[0].message.tool_calls[0]
    assert (call.id, call.function.name, json.loads(call.function.arguments)) == (
        "toolu_1",
        "weather",
        {"city": "Bern"},
    )
    name, arguments = "", ""
    for event in client.chat.completions.create(model="claude", messages=HELLO, tools=TOOLS, stream=True):
        for part in event.choices[0].delta.tool_calls or ():
            assert part.index == 0
            assert part.function is not None
            name += part.function.name or ""
            arguments += part.function.arguments or ""
    assert (name, json.loads(arguments)) == ("weather", {"city": "Bern"})


@pytest.mark.parametrize("streamed", [False, True])
def test_thoughts_go_back_with_what_tools_said(client: openai.OpenAI, streamed: bool) -> None:
    asked: Any = {"model": "claude", "tools": TOOLS, "extra_body": {"thinking": {"type": "enabled"}}}
    if streamed:
        with client.chat.completions.stream(messages=HELLO, **asked) as events:
            said = events.get_final_completion().choices[0].message.to_dict()
        for number, block in enumerate(said["thinking_blocks"]):
            assert block.pop("index") == number
    else:
        said = client.chat.completions.create(messages=HELLO, **asked).choices[0].message.to_dict()
    assert (said["reasoning_content"], said["thinking_blocks"]) == ("The city is Bern.", THOUGHTS)
    told: Any = {"role": "tool", "tool_call_id": "toolu_1", "content": "sunny"}
    following = client.chat.completions.create(messages=[*HELLO, said, told], **asked)
    assert following.choices[0].finish_reason == "tool_calls"
    # Another model's thoughts have no signature, and what is malformed is the client's.
    said["thinking_blocks"] = [{"type": "thinking", "thinking": "x"}, {"type": "odd"}]
    with pytest.raises(openai.BadRequestError, match="Expected `thinking`"):
        client.chat.completions.create(messages=[*HELLO, said, told], **asked)
    said["thinking_blocks"] = ["x"]
    with pytest.raises(openai.BadRequestError, match="well-formed"):
        client.chat.completions.create(messages=[*HELLO, said, told], **asked)


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as raised:
        client.chat.completions.create(model="claude", messages=[{"role": "user", "content": "overload"}])
    assert raised.value.status_code == 503
    assert raised.value.response.headers["retry-after"]
    assert raised.value.body == {"message": "Overloaded", "type": "overloaded_error", "param": None, "code": None}
    for field, value in (("n", 2), ("logprobs", True), ("response_format", {"type": "json_object"})):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="claude", messages=HELLO, extra_body={field: value})
        assert refused.value.param == field
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model="claude", input="a")


def test_a_stream_that_begins_with_an_error_is_that_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as raised:
        list(say(client, "overload at once"))
    assert raised.value.status_code == 503
    assert raised.value.body == {"message": "Overloaded", "type": "overloaded_error", "param": None, "code": None}


@pytest.mark.parametrize(("text", "message"), [("overload later", "Overloaded"), ("break off", "broke off")])
def test_a_stream_that_does_not_end_is_an_error(client: openai.OpenAI, text: str, message: str) -> None:
    with pytest.raises(openai.APIError, match=message):
        list(say(client, text))


def say(client: openai.OpenAI, text: str) -> Any:
    """A streamed answer to this."""
    messages: Any = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="claude", messages=messages, stream=True)


def test_what_cannot_be_translated_goes_to_another_backend_of_the_tier() -> None:
    servers = FakeAnthropic().start(), FakeUpstream().start()
    backends = (
        Backend("a", servers[0].url, "t", ("tiny",), api_key="sk-ant-key", protocol="anthropic", health_path=None),
        Backend("o", servers[1].url, "t", ("tiny",)),
    )
    with RunningGateway(*backends) as gateway:
        for _ in range(8):
            assert gateway.post("/v1/chat/completions", {"model": "tiny", "messages": HELLO, "n": 2})[0] == 200
            assert gateway.post("/v1/completions", {"model": "tiny", "prompt": "a"})[0] == 200
        # Neither server has been asked for what it cannot do, and one that begins with an error is no answer.
        assert not servers[0].books.requests
        for _ in range(8):
            body = {"model": "tiny", "stream": True, "messages": [{"role": "user", "content": "overload at once"}]}
            assert gateway.post("/v1/chat/completions", body)[0] == 200
        assert len(servers[1].books.requests) == 24
    for server in servers:
        server.stop()


def test_what_has_no_counterpart_may_be_left_out() -> None:
    asked = {"messages": HELLO, "n": 2, "logit_bias": {"1": 2}, "frequency_penalty": 0.5, "invented": 1, "top_k": 4}
    body = json.loads(anthropic.request(json.dumps(asked).encode(), "real", drop=True))
    assert set(body) == {"model", "max_tokens", "messages", "top_k"}
    with pytest.raises(ApiError, match="functions"):
        anthropic.request(json.dumps({"messages": HELLO, "functions": [{}]}).encode(), "real", drop=True)


def test_models_that_nobody_names_are_those_that_it_lists() -> None:
    server = FakeAnthropic(("claude-one", "claude-two")).start()
    backend = Backend(
        *("a", server.url, "t"),
        api_key="sk-ant-key",
        protocol="anthropic",
        health_path=None,
        prefix="anthropic/",
    )
    with RunningGateway(backend) as gateway:
        listed = json.loads(gateway.get("/v1/models")[2])["data"]
        assert [model["id"] for model in listed] == ["anthropic/claude-one", "anthropic/claude-two"]
        body = {"model": "anthropic/claude-two", "max_tokens": 9, "messages": HELLO}
        assert json.loads(gateway.post("/v1/chat/completions", body)[2])["model"] == "claude-two"
    server.stop()


def test_what_cannot_be_said_uses_up_nothing() -> None:
    server = FakeAnthropic().start()
    backend = Backend(
        "claude", server.url, "cloud", ("claude",), {}, "sk-ant-key", protocol="anthropic", health_path=None,
        requests_per_minute=3,
    )  # fmt: skip
    body = {"model": "claude", "messages": HELLO}
    with RunningGateway(backend) as gateway:
        for _ in range(3):
            assert gateway.post("/v1/chat/completions", {**body, "n": 2})[0] == 400
        assert gateway.post("/v1/chat/completions", body)[0] == 200
    assert len(server.books.requests) == 1
    server.stop()


def streamed(*events: bytes | dict[str, Any]) -> bytes:
    """A stream of these events, translated."""

    async def chunks() -> AsyncIterator[bytes]:
        for event in events:
            yield event if isinstance(event, bytes) else b"data: " + json.dumps(event).encode() + b"\r\n\r\n"

    async def all_of() -> bytes:
        return b"".join([chunk async for chunk in await anthropic_stream.begun(chunks(), True, Usage())])

    return asyncio.run(all_of())


START = {
    "type": "message_start",
    "message": {"id": "m", "model": "c", "usage": {"input_tokens": 7, "output_tokens": 1}},
}
STOP = {"type": "message_stop"}


def test_counts_that_are_null_later_are_those_of_the_start() -> None:
    end = {
        "type": "message_delta",
        "delta": {"stop_reason": "end_turn"},
        "usage": {"input_tokens": None, "output_tokens": 5},
    }
    usage = json.loads(streamed(START, end, STOP).split(b"data: ")[-2])["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (7, 5)


@pytest.mark.parametrize(
    "event",
    [
        b"data: {nonsense\n\n",
        {"type": "content_block_delta"},
        {"type": "message_delta", "delta": None},
        b"data: 1\n\n",
        pytest.param(b"x" * (LONGEST + 1), id="endless"),
    ],
)
def test_malformed_events_cut_a_stream(event: bytes | dict[str, Any]) -> None:
    with pytest.raises(CutError):
        streamed(START, event, STOP)
    with pytest.raises(NoAnswerError):
        streamed(event, START, STOP)


def test_a_signature_of_what_is_no_thought_is_left_out() -> None:
    text = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    signature = {"type": "signature_delta", "signature": "EqoBCkgIARABGAI="}
    delta, stop = ({"type": f"content_block_{kind}", "index": 0} for kind in ("delta", "stop"))
    out = streamed(START, text, {**delta, "delta": signature}, stop, STOP)
    assert (out.endswith(b"data: [DONE]\n\n"), b"EqoB" in out) == (True, False)


def test_an_error_in_the_midst_is_told_and_cuts_the_stream() -> None:
    with pytest.raises(CutError):
        streamed(START, {"type": "error", "error": {"type": "api_error", "message": "Internal"}})


def test_an_answer_without_a_beginning_is_none() -> None:
    delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hi"}}
    for then in (STOP, {"type": "error", "error": {"type": "overloaded_error", "message": "later"}}):
        with pytest.raises(NoAnswerError):
            streamed(delta, then)


def test_marks_for_the_cache_are_kept() -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    part = {"type": "text", "text": "long", **mark}
    asked = {
        "messages": [{"role": role, "content": [part]} for role in ("system", "user")],
        "tools": [{**TOOLS[0], **mark}],
    }
    body = json.loads(anthropic.request(json.dumps(asked).encode(), "real"))
    assert (body["system"], body["messages"][0]["content"], body["tools"][0]["cache_control"]) == (
        [part],
        [part],
        mark["cache_control"],
    )


def test_keys_of_the_gateway_stay_here() -> None:
    forward = [(name, b"secret") for name in (b"authorization", b"x-api-key", b"api-key", b"x-litellm-api-key")]
    version = (b"anthropic-version", b"2023-06-01")
    assert anthropic.headers(forward, "sk-ant") == [version, (b"x-api-key", b"sk-ant")]
    assert anthropic.headers([(b"x-api-key", b"own")], None) == [version, (b"x-api-key", b"own")]
    bearer = [(b"authorization", b"Bearer own"), (b"x-api-key", b"other")]
    assert anthropic.headers(bearer, None) == [version, (b"x-api-key", b"own")]
    newer = [(b"anthropic-version", b"2030-01-01")]
    assert anthropic.headers(newer, "sk-ant") == [version, (b"x-api-key", b"sk-ant")]
    assert anthropic.headers(newer, "sk-ant", own=True) == [*newer, (b"x-api-key", b"sk-ant")]


@pytest.mark.parametrize(
    ("status", "raw", "shown", "kind", "message"),
    [
        (529, b'{"error": {"type": "overloaded_error", "message": "busy"}}', 503, "overloaded_error", "busy"),
        (None, b'{"error": {"type": "overloaded_error", "message": "busy"}}', 503, "overloaded_error", "busy"),
        (None, b'{"error": {"type": "rate_limit_error", "message": "slow"}}', 429, "rate_limit_error", "slow"),
        (None, b'{"error": {"type": "another", "message": "no"}}', 500, "another", "no"),
        (400, b'{"error": {"type": "invalid_request_error", "message": "no"}}', 400, "invalid_request_error", "no"),
        (502, b"<html>", 502, "server_error", "<html>"),
        (502, b"[]", 502, "server_error", "[]"),
        (502, b"", 502, "server_error", "The backend answered with status 502."),
    ],
)
def test_errors_are_translated(status: int | None, raw: bytes, shown: int, kind: str, message: str) -> None:
    found, body = anthropic.error(status, raw)
    said = json.loads(body)["error"]
    assert (found, said["type"], said["message"]) == (shown, kind, message)


def test_request_is_translated_field_by_field() -> None:
    asked = {
        "model": "claude",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "What is this?"}, _image("data:image/png;base64,QUI=")],
            },
            {"role": "assistant", "content": None, "tool_calls": [_call("c1", '{"a": 1}'), _call("c2", "")]},
            {"role": "tool", "tool_call_id": "c1", "content": "one"},
            {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "two"}]},
            {"role": "user", "content": "and?"},
        ],
        "max_completion_tokens": 9,
        "stop": "END",
        "temperature": 0,
        "user": "u1",
        "n": 1,
        "seed": 7,
        "modalities": ["text"],
        "reasoning_effort": None,
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "parallel_tool_calls": False,
    }
    body = json.loads(anthropic.request(json.dumps(asked).encode(), "real"))
    assert body == {
        "model": "real",
        "max_tokens": 9,
        "system": "Be brief.",
        "stop_sequences": ["END"],
        "temperature": 0,
        "metadata": {"user_id": "u1"},
        "tools": [{"name": "weather", "input_schema": {"type": "object", "properties": {}}}],
        "tool_choice": {"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is this?"},
                    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUI="}},
                ],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
                    {"type": "tool_use", "id": "c2", "name": "f", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c1", "content": "one"},
                    {"type": "tool_result", "tool_use_id": "c2", "content": "two"},
                    {"type": "text", "text": "and?"},
                ],
            },
        ],
    }


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"messages": "text"},
        {"messages": [1]},
        {"messages": [{"content": "no role"}]},
        {"messages": [{"role": "tool"}]},
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        {"messages": [{"role": "judge", "content": "a"}]},
        {"messages": [], "reasoning_effort": "high"},
        {"messages": [], "repetition_penalty": 1.1},
        {"messages": [], "modalities": ["text", "audio"]},
        {"messages": [], "tools": [{}]},
        {"messages": [], "tools": TOOLS, "tool_choice": "sometimes"},
    ],
)
def test_malformed_requests_are_400(asked: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as raised:
        anthropic.request(json.dumps(asked).encode(), "real")
    assert raised.value.status == 400


def _image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def _call(identity: str, arguments: str) -> dict[str, Any]:
    return {"id": identity, "type": "function", "function": {"name": "f", "arguments": arguments}}


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}x", b'{"content": [{}]}', b'{"content": [{"type": "tool_use"}]}'])
def test_malformed_answers_are_502(raw: bytes) -> None:
    with pytest.raises(ApiError) as raised:
        anthropic.answer(raw)
    assert raised.value.status == 502
