"""The statistics of confidence, and taking log probabilities out of an answer."""

import json
import math
import random

import pytest

from tokenmill.engine.gateway.router.confidence import WINDOW, confidence, logprobs_of, without_logprobs


def test_statistics_against_their_definition() -> None:
    dice = random.Random(0)
    for count in (1, 2, 7, 8, 9, 10, 11, 100, 101):
        values = [-dice.expovariate(1) for _ in range(count)]
        lowest = sorted(values)[: math.ceil(count / 10)]
        assert confidence(values, "mean") == pytest.approx(math.exp(sum(values) / count))
        assert confidence(values, "lowest_tenth") == pytest.approx(math.exp(sum(lowest) / len(lowest)))
        size = min(WINDOW, count)
        means = [sum(values[start : start + size]) / size for start in range(count - size + 1)]
        assert confidence(values, "lowest_window") == pytest.approx(math.exp(min(means)))
    assert confidence([], "mean") is None
    assert confidence([-9999.0], "mean") == pytest.approx(math.exp(-100))
    assert confidence([float("-inf"), 0.5], "lowest_tenth") == pytest.approx(math.exp(-100))


ANSWER = (
    b'{ "id":"c",  "choices": [ {"index": 0, "logprobs": {"content":[{"token":"a","logprob":-0.25}]},'
    b' "message": {"content":"1.50 \\u00e9"} } ], "n":1.50 }'
)


def test_log_probabilities_are_read_and_taken_out() -> None:
    assert logprobs_of(ANSWER) == [-0.25]
    cleaned = without_logprobs(ANSWER)
    assert json.loads(cleaned)["choices"][0]["logprobs"] is None
    for kept in (b'"message":{"content":"1.50 \\u00e9"}', b'"n":1.50', b'"id":"c"'):
        assert kept in cleaned or kept.replace(b'":', b'": ') in cleaned
    without = json.dumps({"choices": [{"message": {"content": 'say "logprobs"'}}]}).encode()
    assert json.loads(without_logprobs(without)) == json.loads(without)


def test_tokens_without_a_probability_say_nothing() -> None:
    tokens = [{"token": "a", "logprob": None}, {"token": "b", "logprob": -3}, {"token": "c"}]
    answer = json.dumps({"choices": [{"logprobs": {"content": tokens}}]}).encode()
    assert logprobs_of(answer) == [-3.0]
    assert logprobs_of(answer.replace(b"-3", b"null")) == []


ODD = [
    *(b"", b"[DONE]", b"{}", b"[1]", b'{"choices": []}', b'{"choices": "logprobs"}'),
    *(b'{"choices": [{"logprobs": null}]}', b'{"choices": [{"logprobs": {"content": null}}]}'),
]


@pytest.mark.parametrize("odd", ODD)
def test_odd_answers_hold_none(odd: bytes) -> None:
    assert logprobs_of(odd) == []
    cleaned = without_logprobs(odd)
    assert cleaned == odd or json.loads(cleaned) == {"choices": [{"logprobs": None}]}
