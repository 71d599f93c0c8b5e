"""What clients of OpenAI's API really send, on a backend with Anthropic's, which is strict about it."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pydantic
import pytest

from tests.gateway.anthropic_upstream import FakeAnthropic
from tests.gateway.running import RunningGateway
from tokenmill.engine.gateway import anthropic, anthropic_stream
from tokenmill.engine.gateway.api_error import ApiError, UntranslatableError
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.pipeline import Usage

HELLO: Any = [{"role": "user", "content": "hello"}]
MODEL = "claude-sonnet-4-6"


class City(pydantic.BaseModel):
    name: str


@pytest.fixture(scope="module")
def client(claude: FakeAnthropic) -> Iterator[openai.OpenAI]:
    names = {"claude": MODEL}
    backend = Backend("f", claude.url, "cloud", ("claude",), names, "sk-ant-key", protocol="anthropic")
    with (
        RunningGateway(backend) as gateway,
        openai.OpenAI(base_url=gateway.url + "/v1", api_key="sk-client", max_retries=0, timeout=20) as made,
    ):
        yield made


def translated(model: str = MODEL, **asked: Any) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(anthropic.request(json.dumps({"messages": HELLO, **asked}).encode(), model))
    return body


def test_an_answer_in_the_shape_of_a_class(client: openai.OpenAI, claude: FakeAnthropic) -> None:
    said = [{"role": "user", "content": json.dumps({"name": "Bern"})}]
    claude.says = "{text}"
    try:
        answer = client.chat.completions.parse(model="claude", messages=said, response_format=City)  # type: ignore[arg-type]
    finally:
        claude.says = FakeAnthropic.says
    assert answer.choices[0].message.parsed == City(name="Bern")
    sent = json.loads(claude.books.requests[-1][2])
    assert sent["output_config"]["format"]["type"] == "json_schema"
    assert sent["output_config"]["format"]["schema"]["properties"] == {"name": {"title": "Name", "type": "string"}}
    with pytest.raises(openai.BadRequestError, match="ask for a `json_schema`"):
        client.chat.completions.create(model="claude", messages=HELLO, response_format={"type": "json_object"})


def test_effort_reaches_the_backend(client: openai.OpenAI, claude: FakeAnthropic) -> None:
    answer = client.chat.completions.create(model="claude", messages=HELLO, reasoning_effort="low")
    assert answer.choices[0].message.content == "You said hello"
    sent = json.loads(claude.books.requests[-1][2])
    assert (sent["thinking"], sent["output_config"]) == ({"type": "adaptive"}, {"effort": "low"})


@pytest.mark.parametrize(
    ("model", "effort", "made"),
    [
        ("claude-sonnet-4-6", "high", {"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}}),
        ("claude-opus-5", "xhigh", {"thinking": {"type": "adaptive"}, "output_config": {"effort": "xhigh"}}),
        ("anthropic/claude-4.7-opus", "max", {"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}}),
        ("claude-haiku-5-20270101", "none", {"thinking": {"type": "disabled"}}),
        ("claude-opus-4-1-20250805", "low", {"thinking": {"type": "enabled", "budget_tokens": 1024}}),
        ("claude-opus-4-20250514", "medium", {"thinking": {"type": "enabled", "budget_tokens": 2048}}),
        ("claude-3-7-sonnet-20250219", "high", {"thinking": {"type": "enabled", "budget_tokens": 4096}}),
    ],
)
def test_effort_by_model(model: str, effort: str, made: dict[str, Any]) -> None:
    body = translated(model, reasoning_effort=effort)
    room = 4096 + made["thinking"].get("budget_tokens", 0)
    assert body == {
        "model": model,
        "max_tokens": room,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
        **made,
    }


def test_own_words_of_that_api_go_before() -> None:
    thinking, said = {"type": "disabled"}, {"effort": "max", "format": None}
    body = translated(reasoning_effort="low", thinking=thinking, output_config=said)
    assert (body["thinking"], body["output_config"]) == (thinking, said)


@pytest.mark.parametrize(
    ("model", "asked"),
    [
        ("claude-sonnet-4-6", {"reasoning_effort": "minimal"}),
        ("claude-sonnet-4-6", {"reasoning_effort": 7}),
        ("claude-opus-4-5", {"reasoning_effort": "xhigh"}),
        ("claude-3-5-sonnet-20241022", {"reasoning_effort": "low"}),
        ("claude-3-5-sonnet-20241022", {"reasoning_effort": "none"}),
        ("another", {"reasoning_effort": "low"}),
        ("claude-opus-4-5", {"reasoning_effort": "high", "max_tokens": 4096}),
        ("claude-opus-4-5", {"reasoning_effort": "low", "thinking": {"type": "disabled"}}),
        ("claude-opus-4-5", {"tools": [{"type": "custom", "custom": {"name": "x"}}]}),
        ("claude-opus-4-5", {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}),
        ("claude-opus-4-5", {"stop": ["\n", "END"]}),
        ("claude-opus-4-5", {"verbosity": "low"}),
        ("claude-opus-4-5", {"response_format": {"type": "json_object"}}),
    ],
)
def test_what_has_no_counterpart_is_named(model: str, asked: dict[str, Any]) -> None:
    with pytest.raises(UntranslatableError) as raised:
        translated(model, **asked)
    assert raised.value.param in {*asked}
    assert f"`{raised.value.param}`" in raised.value.message or raised.value.param == "tools"


def test_what_may_be_dropped_is() -> None:
    said = {"reasoning_effort": "minimal", "response_format": {"type": "json_object"}, "stop": ["\n", "END"]}
    raw = json.dumps({"messages": HELLO, **said}).encode()
    body = json.loads(anthropic.request(raw, MODEL, drop=True))
    assert body.keys() == {"model", "max_tokens", "messages", "stop_sequences"}
    assert body["stop_sequences"] == ["END"]


def test_answers_may_be_as_long_as_the_backend_makes_them() -> None:
    assert (
        json.loads(anthropic.request(json.dumps({"messages": HELLO}).encode(), MODEL, 64_000))["max_tokens"] == 64_000
    )
    assert translated(max_tokens=7)["max_tokens"] == 7
    assert translated(thinking={"type": "enabled", "budget_tokens": 8000})["max_tokens"] == 4096 + 8000


def test_words_that_are_none_are_left_out() -> None:
    messages = [
        {
            "role": "system",
            "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, _text("")],
        },
        {"role": "user", "content": [_text(""), _text("hello")]},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": "\n\n", "tool_calls": [_call("c1", "{}")]},
        {"role": "tool", "tool_call_id": "c1", "content": None},
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "Never."}]},
    ]
    body = translated(messages=messages, verbosity="medium", response_format={"type": "text"})
    assert body["system"] == messages[0]["content"][:1]
    assert body["messages"] == [
        {"role": "user", "content": [_text("hello")]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "f", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": ""}]},
        {"role": "assistant", "content": [_text("No."), _text("Never.")]},
    ]


@pytest.mark.parametrize("said", ['{"city": "Be', "[]", "null"])
def test_arguments_that_are_no_object(said: str) -> None:
    messages = [*HELLO, {"role": "assistant", "tool_calls": [_call("c1", said)]}]
    assert translated(messages=messages)["messages"][1]["content"][0]["input"] == {"INVALID_JSON": said}


def test_pictures_that_tools_give_and_pdfs() -> None:
    data = "data:application/pdf;base64,JVBERi0="
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUI="}}
    messages = [
        {"role": "user", "content": [{"type": "file", "file": {"filename": "a.pdf", "file_data": data}}, _text("see")]},
        {"role": "assistant", "tool_calls": [_call("c1", "{}")]},
        {"role": "tool", "tool_call_id": "c1", "content": [_text("here"), picture]},
    ]
    body = translated(messages=messages)
    pdf = {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0="}
    assert body["messages"][0]["content"] == [{"type": "document", "source": pdf, "title": "a.pdf"}, _text("see")]
    png = {"type": "base64", "media_type": "image/png", "data": "QUI="}
    assert body["messages"][2]["content"][0]["content"] == [_text("here"), {"type": "image", "source": png}]
    with pytest.raises(UntranslatableError, match="`file`"):
        translated(messages=[{"role": "user", "content": [{"type": "file", "file": {"file_id": "file-1"}}]}])


def test_tools_in_the_words_of_that_api() -> None:
    tool = {"name": "weather", "description": "d", "input_schema": {"type": "object"}}
    assert translated(tools=[tool])["tools"] == [tool]
    untyped = {"type": "function", "function": {"name": "f", "parameters": {"properties": {}}}}
    assert translated(tools=[untyped])["tools"][0]["input_schema"] == {"type": "object", "properties": {}}


def test_ids_of_other_models_calls() -> None:
    identity = "functions.f:0"
    said = {"role": "tool", "tool_call_id": identity, "content": "one"}
    body = translated(messages=[*HELLO, {"role": "assistant", "tool_calls": [_call(identity, "{}")]}, said])
    ids = (body["messages"][1]["content"][0]["id"], body["messages"][2]["content"][0]["tool_use_id"])
    assert ids == ("functions_f_0", "functions_f_0")


def test_what_is_usual_is_not_said() -> None:
    body = translated(temperature=1.0, top_p=1, top_k=-1)
    assert body.keys() == {"model", "max_tokens", "messages"}
    assert translated("another", top_p=1)["top_p"] == 1
    assert translated(temperature=0, top_p=0.9).keys() == {"model", "max_tokens", "messages", "temperature", "top_p"}


@pytest.mark.parametrize(
    ("user", "told"), [("u-1", True), ("a@example.com", False), ("+41 44 668 18 00", False), ("x" * 257, False)]
)
def test_users_that_api_refuses_are_not_named(user: str, told: bool) -> None:
    assert ("metadata" in translated(user=user)) is told


def test_a_call_without_arguments_has_an_empty_object_in_a_stream_too() -> None:
    block = {"type": "tool_use", "id": "toolu_1", "name": "now", "input": {}}
    empty = {"type": "input_json_delta", "partial_json": ""}
    events = [
        {"type": "message_start", "message": {"id": "m", "model": "claude"}},
        {"type": "content_block_start", "index": 0, "content_block": block},
        {"type": "content_block_delta", "index": 0, "delta": empty},
        {"type": "content_block_stop", "index": 0},
        {"type": "content_block_start", "index": 1, "content_block": block},
        {"type": "content_block_delta", "index": 1, "delta": {**empty, "partial_json": '{"a": 1}'}},
        {"type": "content_block_stop", "index": 1},
        {"type": "message_stop"},
    ]

    async def backend() -> AsyncIterator[bytes]:
        for event in events:
            yield b"data: " + json.dumps(event).encode() + b"\n\n"

    async def chunks() -> bytes:
        return b"".join([chunk async for chunk in await anthropic_stream.begun(backend(), False, Usage())])

    said = {0: "", 1: ""}
    for line in asyncio.run(chunks()).splitlines():
        for call in json.loads(line[6:])["choices"][0]["delta"].get("tool_calls", ()) if line[6:7] == b"{" else ():
            said[call["index"]] += call["function"]["arguments"]
    assert said == {0: "{}", 1: '{"a": 1}'}


def test_what_is_nested_too_deeply_for_that_api_is_the_clients_mistake() -> None:
    deep = '{"a":' * 300 + "1" + "}" * 300
    tool = {"type": "function", "function": {"name": "f", "parameters": json.loads(deep)}}
    for asked in ({"tools": [tool]}, {"messages": [*HELLO, {"role": "assistant", "tool_calls": [_call("1", deep)]}]}):
        with pytest.raises(ApiError, match="nested too deeply"):
            translated(**asked)


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _call(identity: str, arguments: str) -> dict[str, Any]:
    return {"id": identity, "type": "function", "function": {"name": "f", "arguments": arguments}}
