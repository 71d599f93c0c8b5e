"""Placeholders: nothing of the data goes out, and every byte of it comes back, wherever a stream is cut."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gateway.sensitivity.searching import clear
from tokenmill.engine.gateway.body import Body
from tokenmill.engine.gateway.pipeline import Reply
from tokenmill.engine.gateway.sensitivity.redaction import BrokenJsonError, Redaction, unescaped
from tokenmill.engine.gateway.sensitivity.restoring import restore
from tokenmill.engine.gateway.sensitivity.settings import SensitivitySettings
from tokenmill.engine.gateway.sensitivity.strings import decoded, encoded
from tokenmill.engine.gateway.sensitivity.turns import Turns

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


def hide(redaction: Redaction, text: str) -> str:
    return asyncio.run(redaction.hide(text, Turns(60)))


def raw(text: str) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": text}]}, ensure_ascii=False).encode(
        "utf-8", "surrogatepass"
    )


@settings(deadline=None)
@given(cases())
def test_what_is_hidden_comes_back_exactly(case: tuple[dict[str, str], str]) -> None:
    values, text = case
    redaction = Redaction(values, raw(text))
    hidden = hide(redaction, text)
    assert redaction.restore(hidden) == text
    visible = hidden
    for placeholder in redaction.placeholders.values():
        visible = visible.replace(placeholder, "\0")
    assert not any(value in visible for value in values)


def chunk(delta: dict[str, Any], finish: str | None = None, index: int = 0) -> bytes:
    event = {"id": "c", "choices": [{"index": index, "delta": delta, "finish_reason": finish}]}
    return b"data: " + json.dumps(event).encode() + b"\n\n"


ASKED = Body(b"{}")


async def run_through(data: list[bytes], redaction: Redaction, asked: Body = ASKED) -> bytes:
    async def source() -> AsyncGenerator[bytes, None]:
        for part in data:
            yield part

    reply = Reply(200, [], None, source())
    restore(reply, redaction, asked)
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
    hidden = hide(redaction, text)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(hidden)), max_size=8)))
    pieces = [hidden[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(hidden)], strict=True)]
    last = data.draw(st.sampled_from(["finish", "finish with the last piece", "done", "nothing"]))
    events = [chunk({"role": "assistant", "content": ""}), *(chunk({"content": piece}) for piece in pieces)]
    if last == "finish with the last piece":
        events[-1:] = [chunk({"content": pieces[-1]}, "length"), b"data: [DONE]\n\n"]
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
    arguments = json.dumps({"note": hide(redaction, text)})
    pieces = [arguments[start : start + size] for start in range(0, len(arguments), size)]
    events = [chunk({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}) for piece in pieces]
    out = asyncio.run(run_through([*events, chunk({}, "tool_calls")], redaction))
    assert json.loads(texts(out, "tool_calls", "0", "function", "arguments"))["note"] == text
    answer = {"choices": [{"message": {"tool_calls": [{"function": {"arguments": arguments}}]}}]}
    reply = Reply(200, [], json.dumps(answer).encode())
    restore(reply, redaction, ASKED)
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


def test_what_an_event_ends_stays_in_order() -> None:
    redaction = Redaction({"bob@example.com": "email"}, b"")
    events = [chunk({"content": "Hi "}), chunk({"content": "see [EM"}, "length"), b"data: [DONE]\n\n"]
    assert asyncio.run(run_through(events, redaction)) == b"".join(events)


async def events_through(
    events: list[dict[str, Any]], redaction: Redaction, asked: Body = ASKED
) -> list[dict[str, Any]]:
    """Events with names, as the Responses API and Anthropic's Messages stream them; each name must fit its data."""
    stream = [f"event: {one['type']}\ndata: {json.dumps(one)}\n\n".encode() for one in events]
    out = (await run_through(stream, redaction, asked)).decode()
    shown = []
    for part in out.split("\n\n")[:-1]:
        name, data = part.split("\n")
        shown.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {shown[-1]['type']}"
    return shown


def test_responses_streams_are_restored() -> None:
    redaction = Redaction({"bob@example.com": "email"}, b"")
    events = [
        {"type": "response.output_text.delta", "item_id": "i", "content_index": 0, "delta": "to [EM"},
        {"type": "response.output_text.delta", "item_id": "j", "content_index": 0, "delta": "[EMAIL"},
        {"type": "response.output_text.delta", "item_id": "i", "content_index": 0, "delta": "AIL_1], [E"},
        {"type": "response.output_text.done", "item_id": "i", "content_index": 0, "text": "to [EMAIL_1], [E"},
        {"type": "response.output_text.delta", "item_id": "j", "content_index": 0, "delta": "_1]"},
    ]
    shown = asyncio.run(events_through(events, redaction))
    texts = {item: "".join(one.get("delta", "") for one in shown if one["item_id"] == item) for item in "ij"}
    assert texts == {"i": "to bob@example.com, [E", "j": "bob@example.com"}
    assert shown[-2]["text"] == "to bob@example.com, [E"


VALUE = 'a "b"\n\\c'


@pytest.mark.parametrize("cut", range(1, 20))
def test_arguments_in_responses_streams_stay_json(cut: int) -> None:
    redaction = Redaction({VALUE: "note"}, b"")
    arguments = json.dumps({"note": "[NOTE_1]", "n": 1})
    item = {"type": "function_call", "id": "f", "name": "send", "arguments": arguments}
    deltas = [
        {"type": "response.function_call_arguments.delta", "item_id": "f", "output_index": 0, "delta": piece}
        for piece in (arguments[:cut], arguments[cut:])
    ]
    done = {"type": "response.function_call_arguments.done", "item_id": "f", "output_index": 0, "arguments": arguments}
    ends = [
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.completed", "response": {"id": "r", "output": [item]}},
    ]
    shown = asyncio.run(events_through([*deltas, done, *ends], redaction))
    given = [
        "".join(one.get("delta", "") for one in shown),
        *(one["arguments"] for one in shown if "arguments" in one),
        shown[-2]["item"]["arguments"],
        shown[-1]["response"]["output"][0]["arguments"],
    ]
    assert [json.loads(one) for one in given] == [{"note": VALUE, "n": 1}] * 4


@pytest.mark.parametrize("cut", range(1, 18))
def test_streams_of_messages_are_restored(cut: int) -> None:
    redaction = Redaction({VALUE: "note"}, b"")
    pieces = {"text": "see [NOTE_1], [N", "partial_json": '{"note": "[NOTE_1]"}'}
    events: list[dict[str, Any]] = []
    for index, (name, text) in enumerate(pieces.items()):
        events += [
            {"type": "content_block_delta", "index": index, "delta": {"type": "delta", name: piece}}
            for piece in (text[:cut], text[cut:])
        ]
        events.append({"type": "content_block_stop", "index": index})
    shown = asyncio.run(events_through(events, redaction))
    given = {name: "".join(one["delta"].get(name, "") for one in shown if "delta" in one) for name in pieces}
    assert given["text"] == f"see {VALUE}, [N"
    assert json.loads(given["partial_json"]) == {"note": VALUE}
    assert shown[-1] == events[-1]


def test_all_but_the_strings_keeps_its_bytes() -> None:
    body = Body(
        b'{ "model":"bob@example.com", "n" : 1.50, "messages": [{"role": "user", "content": "bob@example.com"},'
        b' {"bob@example.com" : 123456789012345678901234567890, "x": [1E400, 1.10, "\\u00e9 bob@example.com"]}]}'
    )
    redaction = Redaction({"bob@example.com": "email"}, body.raw)
    hidden = asyncio.run(redaction.body(body, Turns(60)))
    assert hidden.raw_field("n") == b"1.50"
    assert hidden.get("model", str) == "bob@example.com"
    assert hidden.raw_field("messages") == (
        b'[{"role": "user", "content": "[EMAIL_1]"}, {"bob@example.com" : 123456789012345678901234567890,'
        b' "x": [1E400, 1.10, "\xc3\xa9 [EMAIL_1]"]}]'
    )


@settings(deadline=None)
@given(cases(), st.booleans())
def test_a_whole_body_comes_back(case: tuple[dict[str, str], str], ascii_only: bool) -> None:
    values, text = case
    text = text.encode("utf-8", "ignore").decode() + "\u00e9\n" * 3
    fields = {"prompt": text, "more": {"a": [text, 1, None, {"b": text}]}}
    data = json.dumps(fields, ensure_ascii=ascii_only).encode()

    async def hide_all() -> tuple[Redaction, Body]:
        redaction = Redaction(values, await unescaped(data, Turns(60)))
        return redaction, await redaction.body(Body(data), Turns(60))

    redaction, hidden = asyncio.run(hide_all())
    shown = json.loads(hidden.raw)
    assert redaction.restore(shown["prompt"]) == redaction.restore(shown["more"]["a"][3]["b"]) == text
    assert shown == json.loads(json.dumps(fields).replace(json.dumps(text), json.dumps(shown["prompt"])))


@pytest.mark.parametrize("unit", ["a", "\u00e9", "\U0001f600", '\\"', "\n\u00e9"])
def test_long_strings_are_decoded_and_encoded_whole(unit: str) -> None:
    text = unit * 150_000
    for ascii_only in (False, True):
        data = json.dumps(text, ensure_ascii=ascii_only)
        assert asyncio.run(decoded(memoryview(data.encode()), Turns(60))) == text
    assert json.loads(asyncio.run(encoded(text, Turns(60)))) == text


def test_what_looks_like_a_placeholder_is_seen_through_escapes() -> None:
    raw = b'{"prompt": "\\u005bEMAIL_1] [EMAIL1\\u005f1] bob@example.com"}'
    taken = asyncio.run(unescaped(raw, Turns(60)))
    assert Redaction({"bob@example.com": "email"}, taken).placeholders == {"bob@example.com": "[EMAIL2_1]"}


def test_where_all_short_placeholders_are_taken_there_is_another() -> None:
    """A request full of them is not searched for one that is left, which took 30 ms for 2 MiB at one go."""
    for count in (4, 10_000):
        taken = b" ".join(b"[EMAIL%b_1]" % (b"%d" % number if number else b"") for number in range(count))
        (placeholder,) = Redaction({"bob@example.com": "email"}, taken).placeholders.values()
        assert placeholder.startswith("[EMAIL")
        assert placeholder[:-2].encode() not in taken
        assert len(placeholder) > len("[EMAIL10000_1]")


@pytest.mark.parametrize("before", range(8))
def test_escapes_are_taken_off_wherever_slices_meet(before: int) -> None:
    text = "x" * before + "[NOTE_1]" * 20_000
    turns = Turns(60)
    escaped = "".join(f"\\u00{ord(character):02x}" for character in text[before:])
    raw = f"{text[:before]}{escaped}".encode()
    assert asyncio.run(unescaped(raw, turns)) == text.encode()
    assert asyncio.run(unescaped(raw[:-1] + b"\\u00zz", turns)) == text[:-1].encode() + raw[-6:-1] + b"\\u00zz"


def test_kinds_that_differ_in_a_digit_alone_do_not_share_placeholders() -> None:
    redaction = Redaction({"E-1234": "badge1", "F-1234": "badge2"}, b"")
    assert redaction.restore(" ".join(redaction.placeholders.values())) == "E-1234 F-1234"


def calls(arguments: str) -> bytes:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return json.dumps({"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}).encode()


@pytest.mark.parametrize("name", ["arguments", "partial_json"])
def test_arguments_that_would_be_no_json_any_more_are_not_hidden(name: str) -> None:
    def hidden(value: str, text: str) -> dict[str, Any]:
        body = Body(json.dumps({"x": [{name: text, "content": "ok"}]}).encode())
        shown: dict[str, Any] = json.loads(asyncio.run(Redaction({value: "note"}, body.raw).body(body, Turns(60))).raw)[
            "x"
        ][0]
        return shown

    for value, arguments in (("4111111111111111", {"card": 4111111111111111}), ("nanna", {"a": "x\nanna"})):
        with pytest.raises(BrokenJsonError):
            hidden(value, json.dumps(arguments))
    assert hidden("anna", json.dumps({"a": "x\nanna"}))[name] == '{"a": "x\\n[NOTE_1]"}'
    assert hidden("nanna", "x\\nanna")[name] == "x\\[NOTE_1]"


def test_a_text_of_a_message_may_be_json_and_need_not_stay_it() -> None:
    for content in ("4111111111111111", '{"card": 4111111111111111}'):
        body = Body(json.dumps({"messages": [{"role": "user", "content": content}]}).encode())
        hidden = asyncio.run(Redaction({"4111111111111111": "note"}, body.raw).body(body, Turns(60)))
        shown = json.loads(hidden.raw)["messages"][0]["content"]
        assert shown == content.replace("4111111111111111", "[NOTE_1]")


def test_a_request_with_arguments_that_would_be_no_json_stays() -> None:
    policy = SensitivitySettings(default="redact")
    stays = clear(policy, calls(json.dumps({"card": 4111111111111111})))
    assert (stays.action, stays.kinds) == ("stay", {"credit_card": 1})
    assert "no JSON" in stays.why
    assert clear(policy, calls(json.dumps({"card": "4111111111111111"}))).action == "redact"
