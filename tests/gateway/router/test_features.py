"""What is read off a request: enough to route by, and nothing that costs time with its length."""

import json
import math
from typing import Any

import pytest

from tokenmill.engine.gateway.body import Body
from tokenmill.engine.gateway.pipeline import Exchange
from tokenmill.engine.gateway.router.classifier import bundled, complexity, logistic
from tokenmill.engine.gateway.router.features import END_BYTES, FEATURES, Features, features_of


def features(endpoint: str = "/v1/chat/completions", **fields: Any) -> Features:
    raw = json.dumps(fields).encode()
    return features_of(Exchange(endpoint, [], raw, body=Body(raw), model="auto", request_id="r", forward=[]))


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


def test_a_long_message_is_looked_at_from_both_ends() -> None:
    found = features(messages=user("Prove it. " + "x " * 200_000 + " def f(): pass"))
    assert {"reasoning", "code"} <= set(found.values)
    assert len(found.question) <= 2 * END_BYTES + 1
    assert found.prompt_tokens == pytest.approx(100_000, rel=0.01)


@pytest.mark.parametrize(
    ("fields", "endpoint", "needs"),
    [
        ({"messages": user("hi")}, "/v1/chat/completions", set()),
        ({"messages": user("hi"), "tools": [{}]}, "/v1/chat/completions", {"tools"}),
        ({"messages": user("hi"), "tools": []}, "/v1/chat/completions", set()),
        ({"messages": user("hi"), "response_format": {"type": "json_schema"}}, "/v1/chat/completions", {"json"}),
        ({"messages": user("hi"), "response_format": {"type": "text"}}, "/v1/chat/completions", set()),
        ({"messages": user("hi"), "logprobs": True}, "/v1/chat/completions", {"logprobs"}),
        ({"messages": user("hi"), "logprobs": False}, "/v1/chat/completions", set()),
        ({"messages": user([{"type": "image_url", "image_url": {"url": "x"}}])}, "/v1/chat/completions", {"vision"}),
        ({"messages": user([{"type": "input_audio", "input_audio": {}}])}, "/v1/chat/completions", {"audio"}),
        ({"messages": user('say "image_url" and "input_audio"')}, "/v1/chat/completions", set()),
        ({"input": "a"}, "/v1/embeddings", {"embeddings"}),
        ({"query": "a", "documents": ["b"]}, "/v1/rerank", {"rerank"}),
    ],
)
def test_what_it_needs(fields: dict[str, Any], endpoint: str, needs: set[str]) -> None:
    assert features(endpoint, **fields).needs == needs


@pytest.mark.parametrize("messages", [[], "text", {}, 3, None, [3], [{"role": 1}], [{"content": None}], [[]]])
def test_odd_messages_are_the_backends_to_refuse(messages: Any) -> None:
    assert features(messages=messages).values["bias"] == 1.0


def test_the_limit_of_the_answer() -> None:
    assert features(messages=user("hi"), max_tokens=7).completion_limit == 7
    assert features(messages=user("hi"), max_completion_tokens=9, max_tokens=7).completion_limit == 9
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
