"""Counts are read out of every kind of answer; the usage nobody asked for is hidden and nothing else is."""

import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.engine.gateway.event_tokens import EventTokens
from tokenmill.engine.gateway.pipeline import Usage
from tokenmill.engine.gateway.usage import HiddenUsage, StreamUsage, read_usage

USAGE = b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}'
#: Events that stay: text that speaks of usage, usage beside choices, null usage, comments, no JSON, another kind.
KEPT = (
    b'data: {"choices":[{"delta":{"content":"a"}}]}',
    b'data: {"choices":[{"delta":{"content":"say \\"usage\\""}}]}',
    b'data: {"choices":[{"index":0}],"usage":{"prompt_tokens":3}}',
    b'data: {"choices":[],"usage":null}',
    b'data: {"choices":[],"prompt_filter_results":[]}',
    b': "usage"',
    b'data: "usage" of nothing',
    b'event: x\ndata: {"usage":{}}',
    b"data: [DONE]",
)


def parted(minutes: int | None, hour: int | None) -> dict[str, int | None]:
    """Anthropic's word for how long what was written into a cache is kept."""
    return {"ephemeral_5m_input_tokens": minutes, "ephemeral_1h_input_tokens": hour}


@given(
    st.lists(st.sampled_from((*KEPT, USAGE)), max_size=8),
    st.sampled_from([b"\n\n", b"\r\n\r\n"]),
    st.lists(st.integers(0, 400), max_size=6),
    st.sampled_from([b"", b'data: {"choices":[],"us']),
)
def test_exactly_the_usage_event_is_hidden(events: list[bytes], gap: bytes, cuts: list[int], rest: bytes) -> None:
    events = [event.replace(b"\n", gap[: len(gap) // 2]) for event in events]
    stream = b"".join(event + gap for event in events) + rest
    places = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    hidden = HiddenUsage()
    shown = [hidden.feed(stream[start:stop]) for start, stop in itertools.pairwise(places)]
    expected = b"".join(event + gap for event in events if event != USAGE) + rest
    assert b"".join(shown) + hidden.finish() == expected


def test_whole_events_are_not_held_back() -> None:
    hidden = HiddenUsage()
    assert hidden.feed(KEPT[0] + b"\n\n") == KEPT[0] + b"\n\n"
    assert hidden.feed(KEPT[0] + b"\n\ndata: {") == KEPT[0] + b"\n\n"
    long = b"x" * (1 << 20)
    assert hidden.feed(long) == b"data: {" + long


@pytest.mark.parametrize(
    ("answer", "counts"),
    [
        ({"usage": {"prompt_tokens": 5, "completion_tokens": 7}}, (5, 0, 7, True)),
        ({"usage": {"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 2}}}, (5, 2, 0, True)),
        ({"usage": {"prompt_tokens": 5, "completion_tokens": None}}, (5, 0, 0, True)),
        (
            {"usage": {"input_tokens": 5, "output_tokens": 7, "input_tokens_details": {"cached_tokens": 1}}},
            (5, 1, 7, True),
        ),
        ({"response": {"usage": {"input_tokens": 5, "output_tokens": 7}}}, (5, 0, 7, True)),
        ({"usage": {"input_tokens": 5, "output_tokens": 7, "cache_read_input_tokens": 4}}, (9, 4, 7, True)),
        ({"usage": {"output_tokens": 7}}, (0, 0, 0, False)),
        # What is embedded or ranked is read, and nothing else.
        ({"data": [{"embedding": [1]}], "usage": {"total_tokens": 7}}, (7, 0, 0, True)),
        ({"results": [{"index": 0}], "usage": {"total_tokens": 7}}, (7, 0, 0, True)),
        ({"choices": [{"text": "a"}], "data": [], "usage": {"total_tokens": 7}}, (0, 0, 0, False)),
        ({"usage": {"total_tokens": 7}}, (0, 0, 0, False)),
        ({"data": [{"url": "https://example.com/a.png"}], "usage": {}}, (0, 0, 0, False)),
        # Some servers count in floats, shape their details as they like, or say more cached tokens than there are.
        ({"usage": {"prompt_tokens": 5.0, "completion_tokens": 6.2}}, (5, 0, 7, True)),
        ({"usage": {"prompt_tokens": 5, "completion_tokens": 7, "prompt_tokens_details": []}}, (5, 0, 7, True)),
        ({"usage": {"input_tokens": 5, "output_tokens": 7, "input_tokens_details": "none"}}, (5, 0, 7, True)),
        ({"usage": {"input_tokens": 5, "output_tokens": 7}, "response": "a text"}, (5, 0, 7, True)),
        ({"usage": {"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 60}}}, (5, 5, 0, True)),
        ({"usage": None}, (0, 0, 0, False)),
        ({"usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}}, (0, 0, 0, False)),
        ({"usage": {"prompt_tokens": 0.0, "completion_tokens": -1.0}}, (0, 0, 0, False)),
        ({"usage": {"input_tokens": 0, "output_tokens": 0}}, (0, 0, 0, False)),
        ({"usage": {"prompt_tokens": 0, "completion_tokens": 3}}, (0, 0, 3, True)),
        ({"usage": {"prompt_tokens": "5"}}, (0, 0, 0, False)),
        ({"usage": {"prompt_tokens": -5, "completion_tokens": 10**30}}, (0, 0, 100_000_000, True)),
        ({"usage": {"prompt_tokens": 1e300, "completion_tokens": 1e300}}, (100_000_000, 0, 100_000_000, True)),
        ([], (0, 0, 0, False)),
    ],
)
def test_counts_of_every_api(answer: object, counts: tuple[int, int, int, bool]) -> None:
    usage = Usage()
    read_usage(json.dumps(answer).encode(), usage)
    assert (usage.prompt, usage.cached, usage.completion, usage.exact) == counts


@pytest.mark.parametrize(
    ("counted", "written"),
    [
        ({"input_tokens": 5, "cache_read_input_tokens": 3, "cache_creation_input_tokens": 4}, (12, 3, 4, 0)),
        ({"input_tokens": 5, "cache_creation_input_tokens": None, "cache_creation": None}, (5, 0, 0, 0)),
        ({"input_tokens": 5, "cache_creation_input_tokens": 4, "cache_creation": parted(1, 3)}, (9, 0, 4, 3)),
        # A sum that has grown since it was parted, as with tools that run there, is parted likewise, and none is lost.
        ({"input_tokens": 5, "cache_creation_input_tokens": 10, "cache_creation": parted(0, 3)}, (15, 0, 10, 10)),
        ({"input_tokens": 5, "cache_creation_input_tokens": 10, "cache_creation": parted(3, 0)}, (15, 0, 10, 0)),
        ({"input_tokens": 5, "cache_creation_input_tokens": 10, "cache_creation": parted(2, 1)}, (15, 0, 10, 4)),
        ({"input_tokens": 5, "cache_creation_input_tokens": 1, "cache_creation": parted(-2, 9)}, (6, 0, 1, 1)),
        ({"input_tokens": 5, "cache_creation_input_tokens": 1, "cache_creation": parted(None, None)}, (6, 0, 1, 0)),
        # OpenAI's, in both of its APIs, and LiteLLM's: the prompt's tokens hold all.
        ({"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 4}}, (9, 2, 4, 0)),
        ({"input_tokens": 9, "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 4}}, (9, 2, 4, 0)),
        (
            {
                "prompt_tokens": 9,
                "prompt_tokens_details": {
                    "cached_tokens": 2,
                    "cache_creation_tokens": 4,
                    "cache_creation_token_details": parted(3, 1),
                },
                "cache_creation_input_tokens": 4,
            },
            (9, 2, 4, 1),
        ),
        ({"prompt_tokens": 9, "prompt_tokens_details": None, "cache_creation_input_tokens": 4}, (9, 0, 4, 0)),
        # Qwen's, of what a request has marked.
        (
            {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 2, "cache_creation_input_tokens": 4}},
            (9, 2, 4, 0),
        ),
        # No token is counted twice.
        ({"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 7, "cache_write_tokens": 4}}, (9, 7, 2, 0)),
        ({"prompt_tokens": 9, "prompt_tokens_details": {"cache_write_tokens": -4}}, (9, 0, 0, 0)),
    ],
)
def test_what_was_written_into_a_cache(counted: dict[str, Any], written: tuple[int, int, int, int]) -> None:
    usage = Usage()
    read_usage(json.dumps({"usage": counted}).encode(), usage)
    assert usage.exact
    assert (usage.prompt, usage.cached, usage.written, usage.written_hour) == written


def test_a_stream_says_at_its_begin_for_how_long_and_at_its_end_how_much_was_written() -> None:
    begin = {"input_tokens": 5, "cache_creation_input_tokens": 4, "cache_creation": parted(1, 3), "output_tokens": 1}
    events = (
        {"type": "message_start", "message": {"usage": begin}},
        {"type": "message_delta", "usage": {"cache_creation_input_tokens": 8, "output_tokens": 6}},
    )
    usage = Usage()
    tap = StreamUsage(usage, EventTokens())
    tap.feed(b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events))
    tap.finish()
    assert usage == Usage(13, 0, 6, exact=True, written=8, written_hour=6)


@pytest.mark.parametrize(
    ("answer", "speculative"),
    [
        ({"completion_tokens_details": {"accepted_prediction_tokens": 4, "rejected_prediction_tokens": 2}}, (4, 2)),
        ({"completion_tokens_details": {"accepted_prediction_tokens": None}}, (0, 0)),
        ({"completion_tokens_details": None}, (0, 0)),
        ({"metrics": {"speculative_decoding": {"num_accepted_draft_tokens": 5, "num_draft_tokens": 8}}}, (5, 3)),
        ({"metrics": {"speculative_decoding": None, "queue_time_ms": 1.5}}, (0, 0)),
        ({"metrics": ["of another server"]}, (0, 0)),
        ({"metrics": {"speculative_decoding": {"num_draft_tokens": "many"}}}, (0, 0)),
        ({}, (0, 0)),
    ],
)
def test_speculative_tokens_are_what_openai_and_vllm_state(
    answer: dict[str, Any], speculative: tuple[int, int]
) -> None:
    said = {"prompt_tokens": 3, "completion_tokens": 7}
    details = {name: answer.pop(name) for name in list(answer) if name.startswith("completion")}
    usage = Usage()
    read_usage(json.dumps({"usage": {**said, **details}, **answer}).encode(), usage)
    assert (usage.prompt, usage.completion, usage.exact) == (3, 7, True)
    assert (usage.accepted, usage.rejected) == speculative


@pytest.mark.parametrize("gap", [b"\n\n", b"\r\n\r\n"])
def test_stream_counts_events_until_it_is_told(gap: bytes) -> None:
    usage = Usage()
    tap = StreamUsage(usage, EventTokens())
    for _ in range(3):
        tap.feed(KEPT[0] + gap)
    tap.finish()
    assert (usage.completion, usage.exact) == (3, False)
    tap.feed(USAGE + gap + b"data: [DONE]" + gap)
    tap.finish()
    assert (usage.prompt, usage.completion, usage.exact) == (3, 2, True)


def test_the_last_event_need_not_end() -> None:
    usage = Usage()
    tap = StreamUsage(usage, EventTokens())
    tap.feed(KEPT[0] + b"\n\n" + USAGE)
    tap.finish()
    assert (usage.prompt, usage.completion, usage.exact) == (3, 2, True)


COMPLETED = {
    "type": "response.completed",
    "response": {"output": "x" * 20_000, "usage": {"input_tokens": 9, "output_tokens": 4}},
}
PICTURED = {"usage": {"input_tokens": 9, "output_tokens": 4}}
MESSAGE = (
    {"type": "message_start", "message": {"usage": {"input_tokens": 9, "cache_read_input_tokens": 5}}},
    *[{"type": "content_block_delta", "delta": {"type": "text_delta", "text": "word " * 10}}] * 200,
    {"type": "message_delta", "usage": {"input_tokens": None, "output_tokens": 4}},
    {"type": "message_stop"},
)


@pytest.mark.parametrize("size", [1, 7, 1000, 4096, 1 << 16])
@pytest.mark.parametrize("gap", [b"\n\n", b"\r\n\r\n"])
@pytest.mark.parametrize(
    ("events", "counts"),
    [
        # The last event of the Responses API repeats the whole answer.
        (({"type": "response.output_text.delta", "delta": "x"},) * 100 + (COMPLETED,), (9, 0, 4, True)),
        # A picture is longer than what is kept of a stream, whatever stands behind the usage.
        (({"type": "image_generation.completed", "b64_json": "x" * 1_100_000, **PICTURED},), (9, 0, 4, True)),
        (
            (
                {
                    "type": "response.completed",
                    "response": {"output": "x" * 1_100_000, **PICTURED, "metadata": {"a": "b"}},
                    "sequence_number": 7,
                },
            ),
            (9, 0, 4, True),
        ),
        (({"b64_json": "x" * 1_100_000, "usage": "much"},), (0, 0, 1, False)),
        # The Messages API states the prompt's tokens in the first event, and in the last one only some servers do.
        (MESSAGE, (14, 5, 4, True)),
        (MESSAGE[:1] + MESSAGE[-2:], (14, 5, 4, True)),
        (
            (
                {"type": "message_start", "message": {}},
                {"type": "message_delta", "usage": {"input_tokens": 9, "output_tokens": 4}},
            ),
            (9, 0, 4, True),
        ),
        # It states them also where it is cut before it says what was generated.
        (MESSAGE[:-2], (14, 5, 2513, False)),
        (MESSAGE[:3], (14, 5, 38, False)),
        ((*MESSAGE[:1], {"type": "error", "error": {"type": "overloaded_error"}}), (14, 5, 2, False)),
        # Some servers say nothing there.
        (({"type": "message_start", "message": {"usage": {"input_tokens": 0}}}, *MESSAGE[1:3]), (0, 0, 38, False)),
        # Nobody counts: each event is one, wherever the network cuts it.
        (({"delta": "x"},) * 2000, (0, 0, 2000, False)),
    ],
)
def test_counts_are_found_wherever_a_stream_is_cut(
    size: int, gap: bytes, events: Sequence[dict[str, Any]], counts: tuple[int, int, int, bool]
) -> None:
    stream = b"".join(b"data: " + json.dumps(event).encode() + gap for event in events)
    usage = Usage()
    tap = StreamUsage(usage, EventTokens())
    for start in range(0, len(stream), size):
        tap.feed(stream[start : start + size])
    tap.finish()
    assert (usage.prompt, usage.cached, usage.completion, usage.exact) == counts


def test_an_event_without_end_is_not_kept() -> None:
    """Bytes of a recording, for one."""
    tap = StreamUsage(Usage(), EventTokens())
    for _ in range(100):
        tap.feed(b"x" * (1 << 16))
        assert sum(map(len, tap._parts)) < 3 << 20


def streamed(known: EventTokens, *events: bytes) -> int:
    """The completion tokens of a stream, in chunks of one event."""
    usage = Usage()
    tap = StreamUsage(usage, known)
    for event in events:
        tap.feed(event + b"\n\n")
    tap.finish()
    return usage.completion


def content(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}).encode()


def counted(tokens: int) -> bytes:
    usage = {"prompt_tokens": 1, "completion_tokens": tokens}
    return b"data: " + json.dumps({"choices": [], "usage": usage}).encode()


ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}'


@pytest.mark.parametrize(
    ("first", "end"), [((), ()), ((ROLE,), ()), ((), (b"data: [DONE]",)), ((ROLE,), (b"data: [DONE]",))]
)
def test_cut_stream_is_one_token_an_event_where_that_is_so(first: tuple[bytes, ...], end: tuple[bytes, ...]) -> None:
    known = EventTokens()
    for tokens in (1, 40, 3000, 5000, 7):
        assert streamed(known, *first, *[content("w ")] * tokens, counted(tokens), *end) == tokens
        assert streamed(known, *[content("w ")] * 19) == 19


def test_cut_stream_counts_what_an_event_held_in_others() -> None:
    known = EventTokens()
    text = "ten tokens of which each is short, "
    assert streamed(known, *[content(text)] * 19) == -(-19 * len(text) // 4)
    assert streamed(known, *[content(text)] * 20, counted(200), b"data: [DONE]") == 200
    assert streamed(known, *[content(text)] * 19) == 190
    assert streamed(known, *[content("w ")] * 3) == 30
    # The server was started anew, with an event for each token.
    for _ in range(60):
        streamed(known, *[content("w ")] * 1000, counted(1000), b"data: [DONE]")
    assert streamed(known, *[content("w ")] * 50) in (50, 51)


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"choices":[{"delta":{"reasoning_content":"%s"}}]}',
        b'data: {"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":"%s"}}]}}]}',
        b'data: {"choices":[{"text":"%s","logprobs":{"content":[{"token":"x"}]}}]}',
        b'event: response.output_text.delta\r\ndata: {"type":"response.output_text.delta","delta":"%s"}',
    ],
)
def test_unknown_server_is_estimated_by_its_text(event: bytes) -> None:
    assert streamed(EventTokens(), *[event % (b"x" * 40)] * 6, b'data: {"choices') == 7 * 10
    assert streamed(EventTokens(), *[event % (b"x" * 8)] * 6) == 6
