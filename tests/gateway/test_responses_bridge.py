"""The Responses API on a backend with Anthropic's API, driven by the official OpenAI client."""

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest
from aiohttp import web
from openai.types.responses import Response, ResponseStreamEvent

from tests.gateway.anthropic_upstream import THOUGHTS, FakeAnthropic
from tests.gateway.running import RunningGateway
from tests.gateway.upstream import FakeUpstream
from tokenmill.engine.gateway.backends import Backend

PNG, PDF = "data:image/png;base64,QUI=", "data:application/pdf;base64,JVBERg=="
TOOLS: Any = [
    {"type": "function", "name": "weather", "description": "Of a city.", "strict": True,
     "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
]  # fmt: skip
EVENT: Any = pydantic.TypeAdapter(ResponseStreamEvent)


class City(pydantic.BaseModel):
    name: str


class Renamed(FakeAnthropic):
    """Knows no model of the name that it is asked for."""

    def _problem(self, request: web.Request, asked: dict[str, Any]) -> web.Response | None:
        error = {"type": "not_found_error", "message": f"model: {asked['model']}"}
        return web.json_response({"type": "error", "error": error}, status=404)


def backend(server: FakeUpstream, name: str = "claude-sonnet-4-5", **more: Any) -> Backend:
    """A backend with Anthropic's API whose model `claude` is called so there."""
    names = {"claude": name}
    return Backend(
        "frontier", server.url, "cloud", ("claude",), names, "sk-ant-key", protocol="anthropic", health_path=None,
        **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def gateway(claude: FakeAnthropic) -> Iterator[RunningGateway]:
    with RunningGateway(backend(claude)) as running:
        yield running


@pytest.fixture(scope="module")
def client(gateway: RunningGateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key="sk-client", max_retries=0, timeout=20) as made:
        yield made


def sent(claude: FakeAnthropic) -> dict[str, Any]:
    """What the backend was asked last."""
    body: dict[str, Any] = json.loads(claude.books.requests[-1][2])
    return body


def events_of(gateway: RunningGateway, **asked: Any) -> list[dict[str, Any]]:
    """The events of a stream: each is named as its data says, and is what OpenAI's client has a class for."""
    status, headers, raw = gateway.post("/v1/responses", {"model": "claude", "stream": True, **asked})
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    events = []
    for said in raw.decode().removesuffix("\n\n").split("\n\n"):
        name, data = said.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
        EVENT.validate_python(events[-1])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def test_an_answer(client: openai.OpenAI, claude: FakeAnthropic) -> None:
    said = client.responses.with_raw_response.create(
        model="claude", input="hello", instructions="Be brief.", temperature=0.5, max_output_tokens=50
    )
    answer = said.parse()
    assert (answer.object, answer.status, answer.model) == ("response", "completed", "claude-sonnet-4-5")
    assert (answer.output_text, answer.instructions, answer.temperature) == ("You said hello", "Be brief.", 0.5)
    assert (answer.id, answer.store, answer.tools) == ("resp_1", False, [])
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (12, 5, 17)
    assert answer.usage.input_tokens_details.cached_tokens == 3
    assert answer.usage.output_tokens_details.reasoning_tokens == 0
    Response.model_validate_json(said.text)
    assert said.headers["request-id"] == "req_1"
    assert sent(claude) == {
        "model": "claude-sonnet-4-5",
        "max_tokens": 50,
        "temperature": 0.5,
        "system": "Be brief.",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
    }


def test_a_stream_is_the_usual_sequence(gateway: RunningGateway) -> None:
    events = events_of(gateway, input="hello", stream_options={"include_obfuscation": False})
    assert [event["type"].removeprefix("response.") for event in events] == [
        *("created", "in_progress", "output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.delta", "output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    first, last = events[0]["response"], events[-1]["response"]
    assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
    assert events[2]["item"] == {
        "id": "msg_1_0", "type": "message", "role": "assistant", "content": [], "status": "in_progress",
    }  # fmt: skip
    assert last == json.loads(gateway.post("/v1/responses", {"model": "claude", "input": "hello"})[2]) | {
        "created_at": last["created_at"]
    }
    assert last["output"] == [events[-2]["item"]]


def test_the_client_puts_a_stream_together(client: openai.OpenAI) -> None:
    with client.responses.stream(model="claude", input="hello", tools=TOOLS, reasoning={"effort": "low"}) as stream:
        kinds = {event.type for event in stream}
        answer = stream.get_final_response()
    assert {"response.function_call_arguments.delta", "response.reasoning_summary_text.done"} <= kinds
    assert [item.type for item in answer.output] == ["reasoning", "reasoning", "message", "function_call"]
    assert answer.output_text == "You said hello"
    call = answer.output[-1]
    assert call.type == "function_call"
    assert (call.call_id, call.name, json.loads(call.arguments)) == ("toolu_1", "weather", {"city": "Bern"})
    assert answer.usage is not None
    assert answer.usage.output_tokens == 5


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("encrypted", [False, True])
def test_a_turn_with_a_tool(client: openai.OpenAI, claude: FakeAnthropic, streamed: bool, encrypted: bool) -> None:
    asked: Any = {
        "model": "claude", "tools": TOOLS, "tool_choice": {"type": "function", "name": "weather"},
        "parallel_tool_calls": False, "reasoning": {"effort": "low"},
        "include": ["reasoning.encrypted_content"] if encrypted else [],
    }  # fmt: skip
    said: Any = [{"role": "user", "content": "hello"}]
    if streamed:
        with client.responses.stream(input=said, **asked) as stream:
            answer: Any = stream.get_final_response()
    else:
        answer = client.responses.create(input=said, **asked)
    items = [item.to_dict() for item in answer.output]
    assert items[0]["summary"] == [{"type": "summary_text", "text": "The city is Bern."}]
    for item in items[:2]:
        assert ("encrypted_content" in item) == encrypted
        if encrypted:
            del item["signature"]  # as a client does that knows OpenAI's members alone
    told = {"type": "function_call_output", "call_id": "toolu_1", "output": "sunny"}
    # The server refuses calls without the thoughts before them as they were.
    client.responses.create(input=[*said, *items, told], **asked)
    assert sent(claude)["messages"] == [
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        {"role": "assistant", "content": [
            *THOUGHTS, {"type": "text", "text": "You said hello"},
            {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Bern"}},
        ]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "sunny"}]},
    ]  # fmt: skip
    assert sent(claude)["tool_choice"] == {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}
    assert sent(claude)["tools"] == [
        {"name": "weather", "description": "Of a city.", "input_schema": TOOLS[0]["parameters"]}
    ]


def test_another_models_reasoning_is_left_out(client: openai.OpenAI, claude: FakeAnthropic) -> None:
    theirs = {"type": "reasoning", "id": "rs_9", "summary": [{"type": "summary_text", "text": "Hm."}]}
    said: Any = [{"role": "user", "content": "a"}, {**theirs, "encrypted_content": "gAAAAB"}, theirs]
    client.responses.create(model="claude", input=said)
    assert [message["role"] for message in sent(claude)["messages"]] == ["user"]


def test_an_answer_in_the_shape_of_a_class(client: openai.OpenAI, claude: FakeAnthropic) -> None:
    claude.says = '{{"name": "Bern"}}'
    try:
        answer = client.responses.parse(model="claude", input="where?", text_format=City)
    finally:
        claude.says = FakeAnthropic.says
    assert answer.output_parsed == City(name="Bern")
    shape = sent(claude)["output_config"]["format"]
    assert (shape["type"], shape["schema"]["required"]) == ("json_schema", ["name"])


def test_pictures_files_and_all_kinds_of_messages(client: openai.OpenAI, claude: FakeAnthropic) -> None:
    said: Any = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be kind."}]},
        {"type": "message", "role": "user", "content": [
            {"type": "input_image", "image_url": PNG, "detail": "auto"},
            {"type": "input_image", "image_url": "https://example.com/a.png", "detail": "low"},
            {"type": "input_file", "file_data": PDF, "filename": "a.pdf"},
            {"type": "input_file", "file_url": "https://example.com/a.pdf"},
        ]},
        {"type": "message", "role": "assistant", "id": "msg_9", "status": "completed", "content": [
            {"type": "output_text", "text": "A cat.", "annotations": []}, {"type": "refusal", "refusal": "No."},
        ]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "", "id": "fc_1"},
        {"type": "function_call_output", "call_id": "c1", "output": [
            {"type": "input_text", "text": "so"}, {"type": "input_image", "image_url": PNG},
        ]},
    ]  # fmt: skip
    client.responses.create(model="claude", input=said, instructions="Be brief.")
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUI="}}
    pdf = {"type": "base64", "media_type": "application/pdf", "data": "JVBERg=="}
    assert sent(claude)["system"] == "Be brief.\n\nBe kind."
    assert sent(claude)["messages"] == [
        {"role": "user", "content": [
            picture,
            {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}},
            {"type": "document", "source": pdf, "title": "a.pdf"},
            {"type": "document", "source": {"type": "url", "url": "https://example.com/a.pdf"}},
        ]},
        {"role": "assistant", "content": [
            {"type": "text", "text": "A cat."}, {"type": "text", "text": "No."},
            {"type": "tool_use", "id": "c1", "name": "weather", "input": {}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "so"}, picture]},
        ]},
    ]  # fmt: skip


def test_an_answer_that_is_too_long(client: openai.OpenAI, gateway: RunningGateway) -> None:
    answer = client.responses.create(model="claude", input="hello", max_output_tokens=4)
    assert answer.incomplete_details is not None
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    last = events_of(gateway, input="hello", max_output_tokens=4)[-1]
    assert (last["type"], last["response"]["incomplete_details"]) == (
        "response.incomplete", {"reason": "max_output_tokens"},
    )  # fmt: skip
    assert last["response"]["output"][0]["status"] == "incomplete"
    assert last["response"]["usage"]["output_tokens"] == 5


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("asked", "param", "says"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "send the earlier items in `input` again"),
        ({"conversation": "conv_1"}, "conversation", "send the earlier items"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "send its text"),
        ({"background": True}, "background", "ask for a stream"),
        ({"store": True}, "store", "leave it out or send false"),
        ({"tools": [{"type": "web_search"}]}, "tools", "`web_search`.*send functions"),
        ({"tools": TOOLS, "tool_choice": {"type": "file_search"}}, "tool_choice", "`file_search`"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input", "send the item itself"),
        ({"input": [{"id": "msg_1"}]}, "input", "send the item itself"),
        ({"input": [{"type": "computer_call"}]}, "input", "`computer_call`"),
        ({"input": [{"role": "judge", "content": "a"}]}, "input", "judge"),
        ({"input": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "input", "`input_audio`"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]}, "input", "`image_url`"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]}, "input", "`file_data`"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_data": "data:text/plain;base64,QQ=="}]}]},
         "input", "only PDFs"),
        ({"input": 5}, "input", "well-formed Responses request"),
        ({"tools": [{}]}, "input", "well-formed Responses request"),
        ({"input": None}, "input", "well-formed Responses request"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format", "`text.format` of type `json_object`"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "`text.verbosity`"),
        ({"reasoning": {"effort": "xhigh"}}, "reasoning.effort", "`reasoning.effort` `xhigh`"),
        ({"reasoning": {"effort": "low"}, "max_output_tokens": 9}, "reasoning.effort", "raise `max_output_tokens`"),
        ({"include": ["message.output_text.logprobs"]}, "include", "leave it out"),
        ({"truncation": "auto"}, "truncation", "leave it out"),
        ({"max_tokens": 5}, "max_tokens", "field of chat completions"),
        ({"frequency_penalty": 1}, "frequency_penalty", "leave it out"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_named(
    gateway: RunningGateway, claude: FakeAnthropic, asked: dict[str, Any], param: str, says: str, streamed: bool
) -> None:
    before = len(claude.books.requests)
    body = {"model": "claude", "input": "hello", "stream": streamed, **asked}
    status, _, raw = gateway.post("/v1/responses", body)
    error = json.loads(raw)["error"]
    assert (status, error["param"]) == (400, param)
    assert re.search(says, error["message"]), error["message"]
    assert len(claude.books.requests) == before


def test_what_says_nothing_is_taken(gateway: RunningGateway) -> None:
    nothing = {
        "previous_response_id": None, "conversation": None, "background": False, "store": False, "prompt": None,
        "truncation": "disabled", "max_tool_calls": 3, "include": ["file_search_call.results"], "top_logprobs": 0,
        "metadata": {"a": "b"}, "text": {"format": {"type": "text"}, "verbosity": "medium"}, "tools": [],
        "reasoning": {"summary": "auto"}, "service_tier": "auto", "prompt_cache_key": "k", "tool_choice": "auto",
    }  # fmt: skip
    status, _, raw = gateway.post("/v1/responses", {"model": "claude", "input": "hello", **nothing})
    assert status == 200, raw
    assert json.loads(raw)["metadata"] == {"a": "b"}
    # Paths below it are of responses that are kept.
    assert gateway.post("/v1/responses/input_tokens", {"model": "claude", "input": "hello"})[0] == 400
    assert gateway.get("/v1/responses/resp_1")[0] == 404


def test_errors(client: openai.OpenAI, gateway: RunningGateway) -> None:
    with pytest.raises(openai.InternalServerError) as raised:
        client.responses.create(model="claude", input="overload")
    assert (raised.value.status_code, raised.value.response.headers["retry-after"]) == (503, "2")
    with pytest.raises(openai.InternalServerError) as raised:
        client.responses.create(model="claude", input="overload at once", stream=True)
    assert raised.value.status_code == 503


@pytest.mark.parametrize(
    ("text", "message", "status"),
    [("overload later", "Overloaded", "incomplete"), ("break off", "broke off", "completed"),
     ("hang up", "broke off", "incomplete")],
)  # fmt: skip
def test_a_stream_that_does_not_end_has_failed(client: openai.OpenAI, text: str, message: str, status: str) -> None:
    seen: list[Any] = []
    with pytest.raises(openai.APIError, match="broke off"):
        for event in client.responses.create(model="claude", input=text, stream=True):
            seen.append(event)
    assert seen[-1].type == "response.failed"
    assert message in seen[-1].response.error.message
    assert [item.status for item in seen[-1].response.output] in ([status], [])


def test_another_backend_of_the_tier_may_keep_responses(claude: FakeAnthropic) -> None:
    keeping = FakeUpstream(("claude",)).start()
    with RunningGateway(backend(claude), Backend("o", keeping.url, "cloud", ("claude",))) as gateway:
        before = len(claude.books.requests)
        for _ in range(6):
            assert gateway.post("/v1/responses", {"model": "claude", "input": "a", "store": True})[0] == 200
        assert (len(claude.books.requests), len(keeping.books.requests)) == (before, 6)
    keeping.stop()


def test_what_may_be_dropped_and_what_is_usual_for_a_backend(claude: FakeAnthropic) -> None:
    defaults = {"temperature": 0.25, "max_tokens": 77}
    with RunningGateway(backend(claude, drop_unknown=True, defaults=defaults)) as gateway:
        asked = {"model": "claude", "input": "a", "include": ["message.output_text.logprobs"], "truncation": "auto"}
        assert gateway.post("/v1/responses", asked)[0] == 200
        assert (sent(claude)["temperature"], sent(claude)["max_tokens"]) == (0.25, 77)
        assert gateway.post("/v1/responses", {**asked, "max_output_tokens": 9})[0] == 200
        assert sent(claude)["max_tokens"] == 9
        assert gateway.post("/v1/responses", {**asked, "store": True})[0] == 400


def test_a_model_that_is_not_there_is_asked_for_elsewhere(claude: FakeAnthropic) -> None:
    """As of a chat completion: of what a backend keeps, a translated request names nothing."""
    gone = Renamed().start()
    first = dataclasses.replace(backend(gone), name="gone", weight=1e6)
    with RunningGateway(first, backend(claude)) as gateway:
        for streamed in (False, True):
            assert gateway.post("/v1/responses", {"model": "claude", "input": "a", "stream": streamed})[0] == 200
    assert len(gone.books.requests) == 2
    gone.stop()
