"""How sure a model was of its answer, from the probabilities of the tokens that it chose.

Three statistics, each a probability from 0 to 1 (the exponential of a mean of log probabilities):

* `lowest_tenth`: over the least probable tenth of the tokens, at least one: a wrong number or name is a few improbable
  tokens in fluent text, which a mean over all of them hides.
* `mean`: over all tokens; the inverse of the answer's perplexity.
* `lowest_window`: the lowest mean over eight tokens in a row.
"""

import math
from collections.abc import Sequence

import msgspec

from tokenmill.engine.gateway.router.settings import Statistic

#: Tokens in a window of `lowest_window`.
WINDOW = 8
#: Servers write -9999 or so for "no probability".
_LEAST = -100.0


class _Token(msgspec.Struct):
    logprob: float | None = None


class _Logprobs(msgspec.Struct):
    content: list[_Token] | None = None


class _Choice(msgspec.Struct):
    logprobs: _Logprobs | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice] = msgspec.field(default_factory=list)


_ANSWER = msgspec.json.Decoder(_Answer)
_MEMBERS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_CHOICES = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])


def confidence(logprobs: Sequence[float], statistic: Statistic) -> float | None:
    """The statistic of an answer's log probabilities, 0 to 1; None where there are none."""
    if not logprobs:
        return None
    values = [min(0.0, max(value, _LEAST)) for value in logprobs]
    if statistic == "mean":
        return math.exp(sum(values) / len(values))
    if statistic == "lowest_tenth":
        lowest = sorted(values)[: math.ceil(len(values) / 10)]
        return math.exp(sum(lowest) / len(lowest))
    size = min(WINDOW, len(values))
    return math.exp(min(sum(values[start : start + size]) / size for start in range(len(values) - size + 1)))


def logprobs_of(answer: bytes) -> list[float]:
    """The log probabilities of an answer's, or a stream event's, first choice."""
    try:
        choices = _ANSWER.decode(answer).choices
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return []
    found = choices[0].logprobs if choices else None
    return [token.logprob for token in found.content or () if token.logprob is not None] if found else []


def without_logprobs(answer: bytes) -> bytes:
    """The answer or event as it would be had nobody asked for log probabilities; all other members keep their bytes."""
    if b'"logprobs"' not in answer:
        return answer
    try:
        members = _MEMBERS.decode(answer)
        choices = _CHOICES.decode(members["choices"])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, KeyError):
        return answer
    for choice in choices:
        if "logprobs" in choice:
            choice["logprobs"] = msgspec.Raw(b"null")
    members["choices"] = msgspec.Raw(msgspec.json.encode(choices))
    return msgspec.json.encode(members)
