"""Whatever Claude answers, a stream of the Responses API holds what the whole answer does, in events that add up."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pydantic
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import ResponseStreamEvent

from tests.gateway.anthropic_upstream import FakeAnthropic
from tokenmill.engine.gateway import anthropic, anthropic_stream, responses_answer, responses_stream
from tokenmill.engine.gateway.body import Body
from tokenmill.engine.gateway.pipeline import Usage

EVENT: Any = pydantic.TypeAdapter(ResponseStreamEvent)
ASKED = Body(b'{"input": "a", "include": ["reasoning.encrypted_content"]}')
TEXTS = st.one_of(st.sampled_from(["", "data: x\n\n", '"usage": 1', "[DONE]", "[EMAIL_"]), st.text(max_size=20))
THOUGHTS = st.one_of(
    TEXTS.map(lambda text: {"type": "thinking", "thinking": text, "signature": "EqoB"}),
    st.just({"type": "redacted_thinking", "data": "EmwK"}),
)
#: Servers that only speak that API may leave a call's id empty.
CALLS = st.builds(
    lambda given, name: {"type": "tool_use", "id": name, "name": "weather", "input": given},
    st.dictionaries(st.text(max_size=4), TEXTS, max_size=2),
    st.sampled_from(["toolu_1", ""]),
)
#: In the order in which it has them where thoughts do not stand between its texts.
BLOCKS = st.tuples(
    st.lists(THOUGHTS, max_size=2),
    st.lists(TEXTS.map(lambda text: {"type": "text", "text": text}), max_size=2),
    st.lists(CALLS, max_size=2),
).map(lambda parts: [*parts[0], *parts[1], *parts[2]])


@settings(deadline=None)
@given(BLOCKS, st.sampled_from(["end_turn", "max_tokens", "tool_use", "refusal"]), st.integers(1, 400))
def test_a_stream_says_what_the_whole_answer_does(blocks: list[dict[str, Any]], reason: str, size: int) -> None:
    usage = {"input_tokens": 7, "cache_read_input_tokens": 3, "cache_creation_input_tokens": 2, "output_tokens": 5}
    message = {
        "id": "msg_1", "model": "m", "content": blocks, "stop_reason": reason, "stop_sequence": None, "usage": usage,
    }  # fmt: skip
    events = FakeAnthropic._events(FakeAnthropic.__new__(FakeAnthropic), message)
    raw = "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events).encode()
    said = asyncio.run(streamed(raw, size))
    assert [event["sequence_number"] for event in said] == list(range(len(said)))
    for event in said:
        EVENT.validate_python(event)
    deltas: dict[str, str] = {}
    for event in said:
        if event["type"].endswith(".delta"):
            deltas[event["item_id"]] = deltas.get(event["item_id"], "") + event["delta"]
    last = said[-1]["response"]
    assert [event["item"] for event in said if event["type"] == "response.output_item.done"] == last["output"]
    assert [deltas.get(item["id"], "") for item in last["output"]] == [text_of(item) for item in last["output"]]
    whole = json.loads(responses_answer.whole(anthropic.answer(json.dumps(message).encode()), ASKED))
    assert plain(whole) == plain(last)


async def streamed(raw: bytes, size: int) -> list[dict[str, Any]]:
    """The events that a stream becomes whose bytes come so many at a time."""

    async def source() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(raw), size):
            yield raw[start : start + size]

    chunks = responses_stream.translated(await anthropic_stream.begun(source(), True, Usage()), ASKED)
    out = b"".join([chunk async for chunk in chunks])
    lines = [event.split(b"\n") for event in out.removesuffix(b"\n\n").split(b"\n\n")]
    return [json.loads(data.removeprefix(b"data: ")) for _, data in lines]


def text_of(item: dict[str, Any]) -> str:
    """An item's text, or a call's arguments."""
    parts = item.get("summary", item.get("content", ()))
    text: str = item["arguments"] if item["type"] == "function_call" else "".join(part["text"] for part in parts)
    return text


def plain(response: dict[str, Any]) -> dict[str, Any]:
    """A response without its time, its calls' arguments as they are meant."""
    items = [
        item | ({"arguments": json.loads(item["arguments"])} if item["type"] == "function_call" else {})
        for item in response["output"]
    ]
    return {**response, "created_at": 0, "output": items}
