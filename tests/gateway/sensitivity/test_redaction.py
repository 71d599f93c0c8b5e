"""Placeholders: nothing of the data goes out, and every byte of it comes back, wherever a stream is cut."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.engine.gateway.body import Body
from tokenmill.engine.gateway.pipeline import Reply
from tokenmill.engine.gateway.sensitivity.redaction import Redaction
from tokenmill.engine.gateway.sensitivity.restoring import restore

VALUES = st.dictionaries(
    st.one_of(
        st.sampled_from(["bob@example.com", "4111 1111 1111 1111", "1.2.3.4", "[EMAIL_", "x\ny\"z", "日本@x.com"]),
        st.text(min_size=4, max_size=20),
    ),
    st.sampled_from(["email", "credit_card", "ip_address"]),
    min_size=1, max_size=6,
)  # fmt: skip
NOISE = st.one_of(
    st.text(max_size=12), st.sampled_from(["[", "[EMAIL_1]", "[EMAIL_", "[[", "]", "[CREDIT_CARD_2", " "])
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, str], str]:
    """(values, a text that holds some of them among look-alikes of placeholders)."""
    values = draw(VALUES)
    parts = draw(st.lists(st.one_of(NOISE, st.sampled_from(sorted(values))), max_size=12))
    return values, "".join(parts)


def raw(text: str) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": text}]}, ensure_ascii=False).encode(
        "utf-8", "surrogatepass"
    )


@settings(deadline=None)
@given(cases())
def test_what_is_hidden_comes_back_exactly(case: tuple[dict[str, str], str]) -> None:
    values, text = case
    redaction = Redaction(values, raw(text))
    hidden = redaction.hide(text)
    assert redaction.restore(hidden) == text
    visible = hidden
    for placeholder in redaction.placeholders.values():
        visible = visible.replace(placeholder, "\0")
    assert not any(value in visible for value in values)


def chunk(delta: dict[str, Any], finish: str | None = None, index: int = 0) -> bytes:
    event = {"id": "c", "choices": [{"index": index, "delta": delta, "finish_reason": finish}]}
    return b"data: " + json.dumps(event).encode() + b"\n\n"


async def run_through(data: list[bytes], redaction: Redaction) -> bytes:
    async def source() -> AsyncGenerator[bytes, None]:
        for part in data:
            yield part

    reply = Reply(200, [], None, source())
    restore(reply, redaction)
    assert reply.chunks is not None
    return b"".join([part async for part in reply.chunks])


def texts(stream: bytes, *path: str) -> str:
    """The pieces of a streamed text, joined."""
    found = ""
    for line in stream.decode().split("\n\n"):
        if line.startswith("data: {"):
            event = json.loads(line[6:])
            for choice in event["choices"]:
                value: Any = choice["delta"]
                for name in path:
                    value = value.get(name) if isinstance(value, dict) else value[0]
                    if value is None:
                        break
                found += value or ""
    return found


@settings(deadline=None)
@given(cases(), st.data())
def test_a_stream_comes_back_exactly_wherever_it_is_cut(case: tuple[dict[str, str], str], data: st.DataObject) -> None:
    values, text = case
    text = text.encode("utf-8", "ignore").decode()
    redaction = Redaction(values, raw(text))
    hidden = redaction.hide(text)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(hidden)), max_size=8)))
    pieces = [hidden[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(hidden)], strict=True)]
    last = data.draw(st.sampled_from(["finish", "done", "nothing"]))
    events = [chunk({"role": "assistant", "content": ""}), *(chunk({"content": piece}) for piece in pieces)]
    events += [chunk({}, "stop"), b"data: [DONE]\n\n"] if last == "finish" else []
    events += [b"data: [DONE]\n\n"] if last == "done" else []
    stream = b"".join(events)
    splits = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    parts = [stream[start:stop] for start, stop in zip([0, *splits], [*splits, len(stream)], strict=True)]
    out = asyncio.run(run_through(parts, redaction))
    assert texts(out, "content") == text
    assert out.endswith(b"data: [DONE]\n\n") == (last != "nothing")


@settings(deadline=None)
@given(cases(), st.integers(1, 5))
def test_arguments_of_tools_stay_json(case: tuple[dict[str, str], str], size: int) -> None:
    values, text = case
    text = text.encode("utf-8", "ignore").decode()
    redaction = Redaction(values, raw(text))
    arguments = json.dumps({"note": redaction.hide(text)})
    pieces = [arguments[start : start + size] for start in range(0, len(arguments), size)]
    events = [chunk({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}) for piece in pieces]
    out = asyncio.run(run_through([*events, chunk({}, "tool_calls")], redaction))
    assert json.loads(texts(out, "tool_calls", "0", "function", "arguments"))["note"] == text
    answer = {"choices": [{"message": {"tool_calls": [{"function": {"arguments": arguments}}]}}]}
    reply = Reply(200, [], json.dumps(answer).encode())
    restore(reply, redaction)
    call = json.loads(reply.body or b"")["choices"][0]["message"]["tool_calls"][0]
    assert json.loads(call["function"]["arguments"])["note"] == text


def test_events_without_placeholders_pass_byte_for_byte() -> None:
    redaction = Redaction({"bob@example.com": "email"}, b"")
    events = [
        b": ping\n\n",
        chunk({"content": "plain [1] text"}),
        b"event: x\r\ndata:  {}\r\n\r\n",
        b"data: [DONE]\n\n",
    ]
    assert asyncio.run(run_through(events, redaction)) == b"".join(events)


def test_responses_streams_are_restored() -> None:
    redaction = Redaction({"bob@example.com": "email"}, b"")
    events = [
        {"type": "response.output_text.delta", "item_id": "i", "content_index": 0, "delta": "to [EM"},
        {"type": "response.output_text.delta", "item_id": "i", "content_index": 0, "delta": "AIL_1], [E"},
        {"type": "response.output_text.done", "item_id": "i", "content_index": 0, "text": "to [EMAIL_1], [E"},
    ]
    stream = b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in events)
    out = asyncio.run(run_through([stream], redaction)).decode()
    shown = [json.loads(line[6:]) for line in out.split("\n\n") if line]
    assert "".join(one.get("delta", "") for one in shown) == "to bob@example.com, [E"
    assert shown[-1]["text"] == "to bob@example.com, [E"


def test_only_changed_fields_are_written_anew() -> None:
    body = Body(
        b'{ "model":"bob@example.com", "n" : 1.50, "messages": [{"role": "user", "content": "bob@example.com"}]}'
    )
    redaction = Redaction({"bob@example.com": "email"}, body.raw)
    hidden = redaction.body(body)
    assert hidden.raw_field("n") == b"1.50"
    assert hidden.get("model", str) == "bob@example.com"
    assert msgspec.json.decode(hidden.raw)["messages"][0]["content"] == "[EMAIL_1]"
