"""Answers with their data back: JSON where JSON was asked for, parts of contents, events of no known form."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from tests.gateway.running import RunningGateway
from tests.gateway.sensitivity.test_redaction import VALUE, chunk, events_through, run_through, texts
from tests.gateway.upstream import FakeUpstream
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.body import Body
from tokenmill.engine.gateway.pipeline import Reply
from tokenmill.engine.gateway.sensitivity.redaction import Redaction
from tokenmill.engine.gateway.sensitivity.restoring import restore
from tokenmill.engine.gateway.sensitivity.settings import SensitivitySettings

HIDDEN = '{"note": "[NOTE_1]"}'
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
JSON_ASKED: list[dict[str, Any]] = [
    {"response_format": {"type": "json_object"}},
    {"response_format": SCHEMA},
    {"text": {"format": SCHEMA, "verbosity": "low"}},
    {"output_format": SCHEMA},
    {"output_config": {"format": SCHEMA}},
    {"guided_json": {"type": "object"}},
    {"structured_outputs": {"json": {"type": "object"}}},
    {"structured_outputs": {"json_object": True}},
]
PROSE_ASKED: list[dict[str, Any]] = [
    {},
    {"response_format": {"type": "text"}},
    {"response_format": None, "text": "x", "guided_json": None},
    {"text": {"format": {"type": "text"}}, "structured_outputs": {"regex": "a"}, "output_config": {"effort": "low"}},
]


def redacted() -> Redaction:
    return Redaction({VALUE: "note"}, b"")


def asked(fields: dict[str, Any]) -> Body:
    return Body(json.dumps(fields).encode())


def whole(answer: dict[str, Any], fields: dict[str, Any]) -> Any:
    reply = Reply(200, [], json.dumps(answer).encode())
    restore(reply, redacted(), asked(fields))
    return json.loads(reply.body or b"")


def thought_and_said(said: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so [NOTE_1]"}]},
        {"type": "message", "content": [said]},
    ]


@pytest.mark.parametrize("fields", JSON_ASKED, ids=str)
def test_answers_stay_json_where_json_was_asked_for(fields: dict[str, Any]) -> None:
    chat = {"choices": [{"message": {"content": HIDDEN, "reasoning_content": "so [NOTE_1]"}}]}
    message = whole(chat, fields)["choices"][0]["message"]
    assert json.loads(message["content"]) == {"note": VALUE}
    assert message["reasoning_content"] == f"so {VALUE}"
    thought, said = whole({"output": thought_and_said({"type": "output_text", "text": HIDDEN})}, fields)["output"]
    assert json.loads(said["content"][0]["text"]) == {"note": VALUE}
    assert thought["summary"][0]["text"] == f"so {VALUE}"
    blocks = whole(
        {"content": [{"type": "thinking", "thinking": "so [NOTE_1]"}, {"type": "text", "text": HIDDEN}]}, fields
    )["content"]
    assert json.loads(blocks[1]["text"]) == {"note": VALUE}
    assert blocks[0]["thinking"] == f"so {VALUE}"


@pytest.mark.parametrize("fields", PROSE_ASKED, ids=str)
def test_other_answers_get_the_data_as_it_is(fields: dict[str, Any]) -> None:
    assert whole({"choices": [{"message": {"content": "see [NOTE_1]"}}]}, fields)["choices"][0]["message"] == {
        "content": f"see {VALUE}"
    }


@pytest.mark.parametrize("cut", range(1, len(HIDDEN)))
def test_streams_stay_json_where_json_was_asked_for(cut: int) -> None:
    fields = asked({"response_format": {"type": "json_object"}})
    pieces = (HIDDEN[:cut], HIDDEN[cut:])
    events = [chunk({"reasoning": "so [NOTE_1]"}), *(chunk({"content": piece}) for piece in pieces)]
    out = asyncio.run(run_through([*events, chunk({}, "stop")], redacted(), fields))
    assert json.loads(texts(out, "content")) == {"note": VALUE}
    assert texts(out, "reasoning") == f"so {VALUE}"

    place = {"item_id": "i", "content_index": 0}
    deltas = [{"type": "response.output_text.delta", **place, "delta": piece} for piece in pieces]
    answer = [
        {"type": "response.reasoning_summary_text.delta", "item_id": "t", "delta": "so [NOTE_1]"},
        {"type": "response.reasoning_summary_text.done", "item_id": "t", "text": "so [NOTE_1]"},
        *deltas,
        {"type": "response.output_text.done", **place, "text": HIDDEN},
        {
            "type": "response.completed",
            "response": {"output": thought_and_said({"type": "output_text", "text": HIDDEN})},
        },
    ]
    shown = asyncio.run(events_through(answer, redacted(), asked({"text": {"format": SCHEMA}})))
    said = "".join(one["delta"] for one in shown if one["type"] == "response.output_text.delta")
    assert json.loads(said) == json.loads(shown[-2]["text"]) == {"note": VALUE}
    assert shown[0]["delta"] == shown[1]["text"] == f"so {VALUE}"
    thought, message = shown[-1]["response"]["output"]
    assert json.loads(message["content"][0]["text"]) == {"note": VALUE}
    assert thought["summary"][0]["text"] == f"so {VALUE}"


def test_events_that_are_added_have_numbers_of_their_own() -> None:
    kinds = ("response.output_text.delta", "response.output_text.done")
    events: list[dict[str, Any]] = [
        {"sequence_number": 3, "type": "response.in_progress"},
        {"type": kinds[0], "item_id": "i", "delta": "[NOTE_1] [NO", "sequence_number": 4},
        {"type": kinds[0], "item_id": "j", "delta": "[NOTE", "sequence_number": 5},
        {"type": kinds[1], "item_id": "i", "text": "[NOTE_1] [NO", "sequence_number": 6},
        {"type": kinds[0], "item_id": "k", "delta": "a [", "logprobs": [{"sequence_number": 0}], "sequence_number": 7},
        {"type": "response.completed", "response": {"output": ['"sequence_number": 8']}, "sequence_number": 8},
    ]
    shown = asyncio.run(events_through(events, redacted()))
    assert [event["sequence_number"] for event in shown] == list(range(3, 12))
    assert [event.get("item_id") for event in shown] == [None, "i", "j", "i", "i", "k", "j", "k", None]
    assert shown[5]["logprobs"] == events[4]["logprobs"]
    assert shown[-1]["response"] == events[-1]["response"]
    # A stream that breaks off, too.
    shown = asyncio.run(events_through(events[:-1], redacted()))
    assert [event["sequence_number"] for event in shown] == list(range(3, 11))
    # Nothing is changed where nothing is added.
    plain = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in (events[0], events[-1])]
    assert asyncio.run(run_through(plain, redacted())) == b"".join(plain)


def test_answers_through_a_gateway_stay_json() -> None:
    address = '"john doe"@example.com'
    far = FakeUpstream(("vast",)).start()
    backend = Backend("far", far.url, "frontier", ("vast",), zone="cloud")
    policy = SensitivitySettings({"contact": "redact"})
    with RunningGateway(backend, sensitivity=policy) as gateway:
        for stream in (False, True):
            body = {
                "model": "vast",
                "messages": [{"role": "user", "content": f'{{"to": "{address}"}}'}],
                "response_format": {"type": "json_object"},
                "act": {"echo": 3},
                "stream": stream,
            }
            status, _, raw = gateway.post("/v1/chat/completions", body)
            assert status == 200
            shown = texts(raw, "content") if stream else json.loads(raw)["choices"][0]["message"]["content"]
            assert json.loads(shown) == {"to": address}
    assert b"john doe" not in b"".join(request[2] for request in far.books.requests)
    far.stop()


def said_in_parts(stream: bytes, kind: str = "text") -> str:
    found = ""
    for line in stream.decode().split("\n\n")[:-1]:
        content = json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content") or []
        found += content if isinstance(content, str) else "".join(part.get(kind, "") for part in content)
    return found


@pytest.mark.parametrize("cut", range(1, 12))
def test_contents_that_are_lists_are_restored(cut: int) -> None:
    hidden = "see [NOTE_1], [NO"
    first, second = hidden[:cut], hidden[cut:]

    def part(text: str) -> dict[str, str]:
        return {"type": "text", "text": text}

    for events in (
        [chunk({"content": [part(first)]}), chunk({"content": [part(second)]})],
        [chunk({"content": [part(first), part(second)]})],
        [chunk({"content": first}), chunk({"content": [part(second)]})],
        [chunk({"content": [part(""), part(first)]}), chunk({"content": [part(second[:2]), part(second[2:])]})],
    ):
        out = asyncio.run(run_through([*events, chunk({}, "stop")], redacted()))
        assert said_in_parts(out) == f"see {VALUE}, [NO"
    thoughts = [chunk({"content": [{"type": "thinking", "thinking": [part(text)]}]}) for text in (first, second)]
    out = asyncio.run(run_through([*thoughts, chunk({"content": [part("[NOTE_1]")]}), chunk({}, "stop")], redacted()))
    assert said_in_parts(out) == VALUE
    thought = "".join(
        inner["text"]
        for line in out.decode().split("\n\n")[:-1]
        for outer in json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content") or []
        for inner in outer.get("thinking", [])
    )
    assert thought == f"see {VALUE}, [NO"
    thoughts = [chunk({"content": [{"type": "thinking", "thinking": text}]}) for text in (first, second)]
    out = asyncio.run(run_through([*thoughts, chunk({}, "stop")], redacted()))
    assert said_in_parts(out, "thinking") == f"see {VALUE}, [NO"
    assert out.endswith(chunk({}, "stop"))


@pytest.mark.parametrize(
    "odd",
    [
        {"choices": 5},
        {"choices": {"a": 1}},
        {"choices": [None, 5]},
        {"choices": [{"index": 0, "delta": {"tool_calls": 5}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [None], "content": 3}}]},
        {"choices": [{"index": [1], "delta": {"content": "x"}, "finish_reason": "stop"}]},
        {"type": "response.output_text.delta", "item_id": {"a": 1}, "delta": "x"},
        {"type": "response.output_text.done", "item_id": {"a": 1}},
        {"type": "content_block_stop", "index": [1]},
        {"type": "content_block_delta", "index": {}, "delta": {"text": "x"}},
        {"type": ["x"], "delta": {}},
    ],
    ids=str,
)
def test_events_of_no_known_form_pass(odd: dict[str, Any]) -> None:
    raw = b"data: " + json.dumps(odd).encode() + b"\n\n"
    events = [chunk({"content": "a [NOTE"}), raw, chunk({"content": "_1]"}), chunk({}, "stop")]
    out = asyncio.run(run_through(events, redacted()))
    assert raw in out
    assert texts(out.replace(raw, b""), "content") == f"a {VALUE}"
    noted = b"data: " + json.dumps({**odd, "note": "[NOTE_1]"}).encode() + b"\n\n"
    shown = asyncio.run(run_through([noted], redacted()))
    assert json.loads(shown.removeprefix(b"data: ")) == {**odd, "note": VALUE}


def test_what_is_kept_back_goes_out_beside_odd_choices() -> None:
    event = {"choices": [{"index": 0, "delta": {"content": "a [NOTE"}}, 5]}
    out = asyncio.run(run_through([b"data: " + json.dumps(event).encode() + b"\n\n"], redacted()))
    said = [json.loads(line[6:])["choices"][0]["delta"]["content"] for line in out.decode().split("\n\n")[:-1]]
    assert said == ["a ", "[NOTE"]


def test_a_server_cannot_have_any_number_of_ends_kept_back() -> None:
    events = [chunk({"content": "[NO"}, index=index) for index in range(1000)]
    out = asyncio.run(run_through(events, redacted()))
    shown = [one["choices"][0] for one in said(out) if one["choices"][0]["delta"]["content"]]
    assert sorted(one["index"] for one in shown) == list(range(1000))
    assert {one["delta"]["content"] for one in shown} == {"[NO"}
    assert out.count(b"\n\n") == 1000 + 256  # the first ones came twice: empty, and with what was kept back


def said(stream: bytes) -> list[Any]:
    return [json.loads(line[6:]) for line in stream.decode().split("\n\n") if line.startswith("data: {")]


def test_the_last_event_needs_no_empty_line() -> None:
    events = [chunk({"content": "[NO"}), chunk({"content": "TE_1], [NO"}).rstrip()]
    out = said(asyncio.run(run_through(events, redacted())))
    assert [one["choices"][0]["delta"]["content"] for one in out] == ["", f"{VALUE}, ", "[NO"]
    out = said(asyncio.run(run_through([chunk({"content": "[NO"}), b'data: {"model": "m"}'], redacted())))
    assert [one.get("model") or one["choices"][0]["delta"]["content"] for one in out] == ["", "m", "[NO"]


def test_a_comment_does_not_part_the_two_halves_of_a_placeholder() -> None:
    events = [chunk({"content": "a [NO"}), b": ping\n\n", chunk({"content": "TE_1]"})]
    out = asyncio.run(run_through(events, redacted()))
    assert b": ping\n\n" in out
    assert texts(out, "content") == f"a {VALUE}"


@pytest.mark.parametrize("kind", [b"text/event-stream", b"text/plain"])
def test_whoever_leaves_an_answer_leaves_the_backends(kind: bytes) -> None:
    closed = []

    async def source() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield chunk({"content": "a"})
        finally:
            closed.append(True)

    async def leave() -> None:
        reply = Reply(200, [(b"content-type", kind)], None, source())
        restore(reply, redacted(), asked({}))
        assert reply.chunks is not None
        await anext(reply.chunks)
        await reply.chunks.aclose()
        assert closed == [True]

    asyncio.run(leave())


def test_an_answer_in_one_piece_need_not_be_json() -> None:
    for answer, shown in ((b"so [NOTE_1] \xff", f"so {VALUE} ".encode() + b"\xff"), (b"", b"")):
        reply = Reply(200, [(b"content-type", b"text/plain")], answer)
        restore(reply, redacted(), asked({}))
        assert reply.body == shown


@pytest.mark.parametrize(
    "last", [{"error": {"message": "gone"}}, {"type": "response.completed", "response": {}}, {"type": "message_stop"}]
)
def test_what_is_kept_back_goes_out_before_the_last_event(last: dict[str, Any]) -> None:
    delta = {"type": "response.output_text.delta", "item_id": "i", "delta": "a [NO"}
    out = said(
        asyncio.run(run_through([b"data: " + json.dumps(one).encode() + b"\n\n" for one in (delta, last)], redacted()))
    )
    assert [one.get("delta") for one in out] == ["a ", "[NO", None]
    assert out[-1] == last


def test_what_is_spoken_is_restored() -> None:
    events = [chunk({"audio": {"transcript": "so [NO"}}), chunk({"audio": {"transcript": "TE_1]", "data": "AAAA"}})]
    out = said(asyncio.run(run_through(events, redacted())))
    assert "".join(one["choices"][0]["delta"]["audio"]["transcript"] for one in out) == f"so {VALUE}"


@pytest.mark.parametrize("cut", range(1, 12))
@pytest.mark.parametrize(
    ("kind", "answer", "shown"),
    [
        (b"text/plain; charset=utf-8", "é [NOTE_1], [NOTE_2] [NO", f"é {VALUE}, [NOTE_2] [NO"),
        (b"application/x-ndjson", '{"a": "[NOTE_1]"}\n{"b": "["}\n', f'{{"a": {json.dumps(VALUE)}}}\n{{"b": "["}}\n'),
    ],
)
def test_streams_without_events_are_restored(kind: bytes, answer: str, shown: str, cut: int) -> None:
    async def run() -> bytes:
        async def source() -> AsyncGenerator[bytes, None]:
            for start in range(0, len(answer.encode()), cut):
                yield answer.encode()[start : start + cut]

        reply = Reply(200, [(b"content-type", kind)], None, source())
        restore(reply, redacted(), asked({}))
        assert reply.chunks is not None
        return b"".join([part async for part in reply.chunks])

    assert asyncio.run(run()).decode() == shown


def test_bytes_that_are_no_text_pass_as_they_are() -> None:
    async def run() -> bytes:
        async def source() -> AsyncGenerator[bytes, None]:
            for code in range(256):
                yield bytes((code, 255 - code))
            yield "あ".encode()[:2]

        reply = Reply(200, [(b"content-type", b"audio/mpeg")], None, source())
        restore(reply, redacted(), asked({}))
        assert reply.chunks is not None
        return b"".join([part async for part in reply.chunks])

    assert asyncio.run(run()) == b"".join(bytes((code, 255 - code)) for code in range(256)) + "あ".encode()[:2]
