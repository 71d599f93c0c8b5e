"""What is read off a request: enough to route by, and nothing that costs time with its length."""

import json
import math
from typing import Any

import pytest

from tokenmill.engine.gateway.api_error import ApiError
from tokenmill.engine.gateway.body import Body
from tokenmill.engine.gateway.pipeline import Exchange
from tokenmill.engine.gateway.router.classifier import bundled, complexity, logistic
from tokenmill.engine.gateway.router.features import FEATURES, MEDIA_TOKENS, Features, features_of
from tokenmill.engine.gateway.router.question import END_BYTES
from tokenmill.engine.gateway.router.rules import Matcher
from tokenmill.engine.gateway.router.settings import Rule

CHAT = "/v1/chat/completions"


def features(endpoint: str = CHAT, **fields: Any) -> Features:
    raw = json.dumps(fields).encode()
    return features_of(Exchange(endpoint, [], raw, body=Body(raw), model="auto", request_id="r", forward=[]))


#: What a tool gave, by Anthropic's API.
PICTURED_RESULT = {"type": "tool_result", "content": [{"type": "text", "text": "a"}, {"type": "image", "source": {}}]}


def user(text: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def test_signs_of_the_last_user_message() -> None:
    messages = [{"role": "system", "content": "prove it"}, *user("def f(): pass  # why?"),
                {"role": "assistant", "content": "translate"}]  # fmt: skip
    found = features(messages=messages)
    assert {"code", "reasoning"} <= set(found.values)
    assert "lookup" not in found.values
    assert set(features(messages=user("What is 3 = x?")).values) >= {"lookup", "math"}
    assert "constraints" in features(messages=user([{"type": "text", "text": "It must rhyme"}])).values
    assert "steps" in features(prompt="first this, then that", endpoint="/v1/completions").values
    assert set(found.values) <= set(FEATURES)


@pytest.mark.usefixtures("usual_depth")
def test_what_is_nested_too_deeply_is_the_clients_fault() -> None:
    def at_depth(calls: int, exchange: Exchange) -> Features:
        return at_depth(calls - 1, exchange) if calls else features_of(exchange)

    for field in (b"x", b"content"):
        seen = set()
        for levels in range(700, 1000):
            raw = b'{"messages":[{"role":"user","%b":%b%b}]}' % (field, b"[" * levels, b"]" * levels)
            try:
                exchange = Exchange(CHAT, [], raw, body=Body(raw), model="auto", request_id="r", forward=[])
                at_depth(40, exchange)
                seen.add("taken")
            except ApiError as error:
                seen.add(error.message)
        assert seen == {"taken", "The request body is not valid JSON: nested too deeply."}


@pytest.mark.parametrize("nothing", [b"[]", b"[ ]", b"{ }", b"[\n  ]", b"null"])
@pytest.mark.parametrize("field", [b"tools", b"functions", b"structured_outputs", b"logprobs", b"response_format"])
def test_what_is_empty_asks_for_nothing(field: bytes, nothing: bytes) -> None:
    raw = b'{"messages": [], "%b" : %b }' % (field, nothing)
    exchange = Exchange(CHAT, [], raw, body=Body(raw), model="auto", request_id="r", forward=[])
    assert features_of(exchange).needs == frozenset()


def test_of_many_inputs_the_longest_must_fit() -> None:
    """Each of them is read for itself; together they only cost more."""
    texts = ["word " * 40] * 100
    for endpoint, field in (("/v1/embeddings", "input"), ("/v1/completions", "prompt"), ("/v1/rerank", "documents"),
                            ("/v1/score", "text_2")):  # fmt: skip
        found = features(endpoint, **{field: texts})
        assert found.prompt_tokens > 5000
        assert 45 < found.at_once < 60
        assert features(endpoint, **{field: texts[0]}).at_once == features(endpoint, **{field: texts[0]}).prompt_tokens
        assert features(endpoint, **{field: []}).at_once <= 1
    asked = features("/v1/rerank", query="why " * 1000, documents=texts)
    assert 1000 < asked.at_once < 1100
    tokens = list(range(10_000, 10_300))
    assert features("/v1/embeddings", input=tokens).at_once == 300
    assert features("/v1/embeddings", input=[tokens, tokens[:7]]).at_once == 300
    many = features("/v1/embeddings", input=["a, b"] * 40_000)
    assert many.at_once < 10 < many.prompt_tokens  # not taken apart: the backend says what is too long
    one = features("/v1/completions", prompt=["a, b" * 40_000])
    assert one.at_once > 30_000
    small = features("/v1/embeddings", input=["about twenty letters"] * 80)
    assert small.at_once < 20 < small.prompt_tokens
    chat = features(messages=[*user("word " * 40)] * 100)
    assert chat.at_once == chat.prompt_tokens > 5000


def test_a_long_message_is_looked_at_from_both_ends() -> None:
    found = features(messages=user("Prove it. " + "x " * 200_000 + " def f(): pass"))
    assert {"reasoning", "code"} <= set(found.values)
    assert len(found.question) <= 2 * END_BYTES + 1
    assert found.prompt_tokens == pytest.approx(100_000, rel=0.01)


@pytest.mark.parametrize("ascii", [True, False])
@pytest.mark.parametrize("size", [1, 9_000, 100_000])
def test_rules_read_long_messages_as_short_ones(size: int, ascii: bool) -> None:
    head, middle, tail = 'Vertr\u00e4ge: "pr\u00fcfen"\n1. a', "\u00fc\U0001f600\\" * size, "x\n2. \u00e4nderbar\tz"
    patterns = ["^Vertr\u00e4ge", 'e: "pr\u00fcf', "(?m)^1\\.", "(?m)^2\\. \u00e4nder", "bar\tz$"]
    for content in (head + middle + tail, [{"type": "text", "text": head}, {"type": "text", "text": middle},
                                           {"type": "text", "text": tail}],
                    [{"type": "image_url", "image_url": {"url": "A" * size}}, {"type": "text", "text": head + tail}],
                    [{"type": "text", "text": head + middle + tail}]):  # fmt: skip
        raw = json.dumps({"messages": user(content)}, ensure_ascii=ascii).encode()
        found = features_of(Exchange(CHAT, [], raw, body=Body(raw), model="auto", request_id="r", forward=[]))
        assert len(found.question) <= 2 * END_BYTES + 40
        for pattern in patterns:
            rule = Rule(matches=pattern, tier="t")
            assert Matcher([rule]).first(found) is rule, (pattern, found.question[:40], found.question[-40:])


def test_what_is_cut_loses_one_character_at_most() -> None:
    for shift in range(30):
        text = "a" * shift + "\U0001f600\u00fc\\\n" * 9000 + "b" * shift
        for ascii in (True, False):
            raw = json.dumps({"prompt": text}, ensure_ascii=ascii).encode()
            exchange = Exchange("/v1/completions", [], raw, body=Body(raw), model="auto", request_id="r", forward=[])
            question = features_of(exchange).question
            assert question.startswith(b"a" * shift + b"?\xfc\\\n")
            assert question.endswith(b"?\xfc\\\n" + b"b" * shift)
            assert len(question) > 1000


@pytest.mark.parametrize(
    ("fields", "endpoint", "needs"),
    [
        ({"messages": user("hi")}, "/v1/chat/completions", set()),
        ({"messages": user("hi"), "tools": [{}]}, "/v1/chat/completions", {"tools"}),
        ({"messages": user("hi"), "tools": []}, "/v1/chat/completions", set()),
        ({"messages": user("hi"), "tools": None, "functions": [{}]}, "/v1/chat/completions", {"tools"}),
        ({"messages": user("hi"), "response_format": {"type": "json_schema"}}, "/v1/chat/completions", {"json"}),
        ({"messages": user("hi"), "response_format": {"type": "text"}}, "/v1/chat/completions", set()),
        ({"messages": user("hi"), "logprobs": True}, "/v1/chat/completions", {"logprobs"}),
        ({"messages": user("hi"), "logprobs": False}, "/v1/chat/completions", set()),
        ({"messages": user([{"type": "image_url", "image_url": {"url": "x"}}])}, "/v1/chat/completions", {"vision"}),
        ({"messages": user([{"type": "input_audio", "input_audio": {}}])}, "/v1/chat/completions", {"audio"}),
        ({"messages": user('say "image_url" and "input_audio"')}, "/v1/chat/completions", set()),
        ({"messages": user([{"type": "file", "file": {"file_data": "JVBE"}}])}, "/v1/chat/completions", {"vision"}),
        ({"messages": user([{"image_url": {"url": "x"}}, "text"])}, "/v1/chat/completions", {"vision"}),
        ({"messages": user([{"type": "text", "text": "image"}])}, "/v1/chat/completions", set()),
        ({"messages": user("hi"), "modalities": ["text", "audio"]}, "/v1/chat/completions", {"audio"}),
        ({"messages": user("hi"), "modalities": ["text"]}, "/v1/chat/completions", set()),
        ({"messages": user("hi"), "structured_outputs": {"choice": ["a"]}}, "/v1/chat/completions", {"json"}),
        ({"messages": user("hi"), "structured_outputs": None}, "/v1/chat/completions", set()),
        ({"prompt": "hi", "guided_json": {"type": "object"}}, "/v1/completions", {"json"}),
        ({"prompt": "hi", "guided_regex": "a+", "prompt_logprobs": 1}, "/v1/completions", {"json", "logprobs"}),
        ({"input": "hi", "text": {"format": {"type": "json_schema", "schema": {}}}}, "/v1/responses", {"json"}),
        ({"input": "hi", "text": {"format": {"type": "text"}, "verbosity": "low"}}, "/v1/responses", set()),
        ({"input": "hi", "include": ["message.output_text.logprobs"]}, "/v1/responses", {"logprobs"}),
        ({"input": "hi", "include": ["file_search_call.results"]}, "/v1/responses", set()),
        ({"input": user([{"type": "input_image", "image_url": "data:,x"}])}, "/v1/responses", {"vision"}),
        (
            {"input": [{"type": "function_call_output", "output": [{"type": "input_image", "file_id": "f"}]}]},
            "/v1/responses",
            {"vision"},
        ),
        ({"messages": user([{"type": "image", "source": {}}])}, "/v1/messages", {"vision"}),
        ({"messages": user([PICTURED_RESULT])}, "/v1/messages", {"vision"}),
        ({"messages": user([{"type": "tool_use", "input": {"type": "image"}}])}, "/v1/messages", set()),
        ({"messages": user([{"type": "document", "source": {"type": "text", "data": "x"}}])}, "/v1/messages", set()),
        ({"messages": user([{"type": "document", "source": {"type": "url"}}])}, "/v1/messages", {"vision"}),
        ({"messages": user("hi"), "output_format": {"type": "json_schema"}}, "/v1/messages", {"json"}),
        ({"input": "a"}, "/v1/embeddings", {"embeddings"}),
        ({"query": "a", "documents": ["b"]}, "/v1/rerank", {"rerank"}),
    ],
)
def test_what_it_needs(fields: dict[str, Any], endpoint: str, needs: set[str]) -> None:
    assert features(endpoint, **fields).needs == needs


#: Parts that are none.
ODD = [{"content": [3, None, {"type": 3}, {"content": [3]}]}, {"role": None, "output": [[]]}]
LONG = "word " * 2000


@pytest.mark.parametrize(
    ("fields", "endpoint"),
    [
        ({"input": "hi", "instructions": LONG}, "/v1/responses"),
        ({"input": "hi", "instructions": LONG, "prompt": {"id": "p"}}, "/v1/responses"),
        ({"messages": user("hi"), "system": LONG}, "/v1/messages"),
        ({"messages": user("hi"), "system": [{"type": "text", "text": LONG}]}, "/v1/messages"),
        ({"messages": user("hi"), "documents": [{"text": LONG}]}, "/v1/chat/completions"),
        ({"query": LONG, "documents": ["a"]}, "/v1/rerank"),
        ({"text_1": "a", "text_2": [LONG]}, "/v1/score"),
        ({"prompt": "a", "suffix": LONG}, "/v1/completions"),
    ],
)
def test_everything_that_a_model_reads_is_counted(fields: dict[str, Any], endpoint: str) -> None:
    assert features(endpoint, **fields).prompt_tokens == pytest.approx(len(LONG) / 4, rel=0.02)


DATA = "iVBORw0KGgo+" * 60_000


@pytest.mark.parametrize(
    ("part", "endpoint"),
    [
        ({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{DATA}"}}, "/v1/chat/completions"),
        ({"type": "input_audio", "input_audio": {"data": DATA, "format": "wav"}}, "/v1/chat/completions"),
        ({"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{DATA}"}}, "/v1/chat/completions"),
        ({"type": "file", "file": {"file_data": DATA}}, "/v1/chat/completions"),
        ({"type": "input_image", "image_url": f"data:image/png;base64,{DATA}"}, "/v1/responses"),
        ({"type": "input_file", "file_data": DATA}, "/v1/responses"),
        ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": DATA}}, "/v1/messages"),
        ({"type": "document", "source": {"type": "base64", "data": DATA}}, "/v1/messages"),
        ({"type": "tool_result", "content": [{"type": "image", "source": {"data": DATA}}]}, "/v1/messages"),
    ],
)
def test_a_picture_counts_as_one_however_many_bytes_it_has(part: dict[str, Any], endpoint: str) -> None:
    name = "input" if endpoint == "/v1/responses" else "messages"
    for number in (1, 3):
        fields = {name: user([{"type": "text", "text": "What is it?"}, *([part] * number)])}
        assert features(endpoint, **fields).prompt_tokens == pytest.approx(number * MEDIA_TOKENS, rel=0.06)


def test_what_is_a_text_is_no_picture() -> None:
    texts = [{"type": "text", "text": f'"image_url": "data:image/png;base64,{DATA}"'}, {"type": "text", "text": DATA}]
    texts += [{"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": DATA}}]
    for part in texts:
        assert features(messages=user([part])).prompt_tokens > len(DATA) / 4
    small = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + DATA[:400]}}
    assert features(messages=user([small])).prompt_tokens < 200


@pytest.mark.parametrize("messages", [[], "text", {}, 3, None, [3], [{"role": 1}], [{"content": None}], [[]], ODD])
def test_odd_messages_are_the_backends_to_refuse(messages: Any) -> None:
    assert features(messages=messages).values["bias"] == 1.0


def test_the_limit_of_the_answer() -> None:
    assert features(messages=user("hi"), max_tokens=7).completion_limit == 7
    assert features(messages=user("hi"), max_completion_tokens=9, max_tokens=7).completion_limit == 9
    assert features("/v1/responses", input="hi", max_output_tokens=8).completion_limit == 8
    # What a server ignores, or minds in another way, is no limit.
    for said in ({"max_output_tokens": 1}, {"max_tokens": -1}, {"max_tokens": 0}):
        assert features(messages=user("hi"), **said).completion_limit is None
    assert features(messages=user("hi"), max_completion_tokens=1, max_tokens=5).completion_limit == 5
    assert features(messages=user("hi"), max_tokens=5, n_predict=500).completion_limit == 500
    assert features(messages=user("hi"), n=3).several


def test_complexity_grows_with_what_makes_it_hard() -> None:
    easy = complexity(features(messages=user("What is the capital of Peru?")).values, bundled())
    middling = complexity(features(messages=user("Explain why the sky is blue.")).values, bundled())
    hard = complexity(features(messages=user("Prove that x = y, explain why it must hold. " * 20)).values, bundled())
    assert 0 < easy < middling < hard < 1
    assert set(bundled()) == set(FEATURES)


def test_the_logistic_function_does_not_overflow() -> None:
    assert logistic(0) == 0.5
    assert logistic(1000) == 1.0
    assert logistic(-1000) == 0.0
    assert logistic(-2) == pytest.approx(math.exp(-2) / (1 + math.exp(-2)))
