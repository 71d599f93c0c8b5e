"""The most tokens that a request can use, worked out before it is sent.

Prompt: byte-level tokenizers make at most one token of each byte, so the bytes of the request's body bound its text;
what is not text there, or is added to it, is counted apart. A reranker reads the query again with each document.
What it costs depends on what is written into a backend's cache: Anthropic's API writes what a request marks, others
write what they like.
Completion: what the request states, times the answers asked for; else the backend's longest answer or its context
window; else the configured bound, or what Anthropic's API, which wants a length, is then asked for. A backend may still
use more (it may ignore `max_tokens`, or price things that are no tokens): `books` says what is done then.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from tokenmill.engine.gateway import anthropic, anthropic_effort, defaults
from tokenmill.engine.gateway.body import MOST_ITEMS, Body, most_items
from tokenmill.engine.gateway.governance.media import ENOUGH_TOKENS, UNSEEN_TOKENS, media_tokens, members
from tokenmill.engine.gateway.money import Writes
from tokenmill.engine.gateway.pipeline import Exchange
from tokenmill.engine.gateway.portfolio import Target

#: Tokens that a chat template may add to a prompt beyond what its JSON takes.
TEMPLATE_TOKENS = 64
#: Tokens that an API may add to a prompt with tools.
TOOL_TOKENS = 512
#: What a number of tokens counts for at most; 64-bit columns hold its cost at any price.
_MOST_TOKENS = ENOUGH_TOKENS
#: What bounds an answer at each path. A server ignores what another path's requests have for it.
_STATED: Mapping[str, tuple[str, ...]] = {
    "/v1/chat/completions": ("max_tokens", "max_completion_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/messages": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
}
#: What may bound it at some server (llama.cpp goes by `n_predict` first): it does not make a bound smaller.
LENGTHS = frozenset({*(name for names in _STATED.values() for name in names), "n_predict", "max_new_tokens"})
_ANSWERS = ("n", "best_of", "n_cmpl")
#: Members of a request to the Responses API that name what is read before it: an earlier answer and all before that,
#: a conversation, a prompt that is kept there.
_EARLIER = ("previous_response_id", "conversation", "prompt")
#: Begins a list of texts, of lists or of objects.
_SEVERAL = re.compile(rb"\[\s*[\"\[{]")
#: Fields that say something about a request's size.
_EFFORTS = frozenset({"reasoning_effort", "reasoning"})
_TELLING = frozenset({*LENGTHS, *_ANSWERS, *_EFFORTS, "tools", "functions", "chat_template", "thinking"})
#: Lists of what is scored, each with all else in the request.
_SCORED = ("documents", "texts", "text_1", "text_2", "queries", "items", "data_1", "data_2")
_SCORING = frozenset({"/v1/rerank", "/rerank", "/v2/rerank", "/v1/score", "/score"})
#: Paths whose answers are not generated.
_NOT_GENERATING = frozenset(
    {
        *(f"/v1/{name}" for name in ("embeddings", "rerank", "score", "pooling", "classify", "moderations")),
        *("/rerank", "/v2/rerank", "/score", "/pooling", "/classify", "/tokenize", "/detokenize"),
    }
)
#: Paths that run no model.
_FREE = frozenset({"/tokenize", "/detokenize", "/v1/messages/count_tokens", "/v1/responses/input_tokens"})
#: Marks where Anthropic's API writes what it has read into its cache, and says for how long; without, for minutes.
_MARK, _TIME = members(frozenset({"cache_control"})), members(frozenset({"ttl"}))


class Bound(NamedTuple):
    """Tokens; neither can be exceeded by a backend that does what it was asked.

    Attributes:
        prompt: Prompt tokens.
        completion: Generated tokens.
        writes: For how long prompt tokens may be kept in a cache that they are written into.
    """

    prompt: int
    completion: int
    writes: Writes = "hour"


class Asked(NamedTuple):
    """What a request says about its own size.

    Attributes:
        prompt: Bound of its prompt tokens.
        prompts: Prompts in it, each with answers of its own.
        answers: Answers to each prompt.
        completion: Stated bound of each answer's tokens; None: it states none.
        writes: For how long it may have Anthropic's API keep prompt tokens in a cache.
        thoughts: Tokens of thoughts that Anthropic's API may be asked for beside an answer whose length is not stated.
    """

    prompt: int
    prompts: int
    answers: int
    completion: int | None
    writes: Writes = "hour"
    thoughts: int = 0

    def at(self, target: Target, completion_bound: int) -> Bound:
        """The most that it can use at one backend."""
        prompt, prompts, answers, each, writes, thoughts = self
        window, longest = target.context_window, target.backend.max_output_tokens
        if each is None:
            each = longest or window or completion_bound
            usual = target.backend.defaults
            if target.backend.protocol == "anthropic":
                thoughts = max(
                    thoughts, anthropic_effort.most_thoughts(usual.get("thinking"), usual.get("reasoning_effort"))
                )
                each = max(each, anthropic.DEFAULT_MAX_TOKENS + thoughts)
            if usual:
                each = max(each, defaults.longest(usual))
        if longest is not None and longest < each:
            each = longest
        if window is not None:
            each = min(each, window)
            prompt = min(prompt, window * prompts)
        if target.backend.protocol != "anthropic":
            writes = "hour"
        return Bound(prompt, min(each * answers * prompts, _MOST_TOKENS), writes)


def asked(exchange: Exchange) -> Asked:
    """Reads a request's size from its body.

    Raises:
        ApiError: 400 for a field of a wrong type.
    """
    endpoint, body, payload = exchange.endpoint, exchange.body, exchange.payload
    if endpoint in _FREE:
        return Asked(0, 1, 1, 0)
    prompt = len(payload) + TEMPLATE_TOKENS
    if body is None:
        return Asked(prompt, 1, 1, None)
    named = body.those_of(_TELLING)
    if "tools" in named or "functions" in named:
        prompt += TOOL_TOKENS
    if "chat_template" in named:
        prompt += UNSEEN_TOKENS  # it may repeat whatever it likes
    prompt = min(prompt + media_tokens(payload), _MOST_TOKENS)
    if endpoint in _NOT_GENERATING:
        return _scored(body, prompt) if endpoint in _SCORING else _embedded(body, prompt)
    if endpoint == "/v1/responses":
        prompt += UNSEEN_TOKENS * sum(body.raw_field(name) not in (None, b"null") for name in _EARLIER)
    answers = max([_count(body, name) for name in _ANSWERS if name in named], default=1)
    prompts = _prompts(body, "prompt") if endpoint == "/v1/completions" else 1
    thinking: Any = body.get("thinking", Any) if "thinking" in named else None
    thoughts = anthropic_effort.most_thoughts(thinking, named & _EFFORTS)
    return Asked(prompt, prompts, answers, stated_length(endpoint, body, named), _writes(exchange), thoughts)


def stated_length(endpoint: str, body: Body, named: frozenset[str]) -> int | None:
    """The stated bound of each answer's tokens; None: there is none that every server keeps.

    Args:
        endpoint: The path.
        body: The request's.
        named: Of its fields at least those of `LENGTHS`.

    Raises:
        ApiError: 400 for a field of a wrong type.
    """
    own = _STATED.get(endpoint, ())
    stated = [value for name in own if name in named and (value := body.get(name, int)) is not None]
    if not stated:
        return None
    if len(named) > len(stated):
        for name in named.intersection(LENGTHS).difference(own):
            value = msgspec.json.decode(body.raw_field(name) or b"null")
            if value is not None:
                stated.append(value if isinstance(value, int) else 0)
    # Some servers take nothing, or a negative number, for "as many as there is room for".
    return min(max(stated), _MOST_TOKENS) if min(stated) > 0 else None


def _writes(exchange: Exchange) -> Writes:
    if not any(target.backend.protocol == "anthropic" for route in exchange.routes for target in route.targets):
        return "hour"  # nobody looks at its marks: long bodies are not searched for them
    if _MARK.search(exchange.payload) is None:
        return "none"
    return "minutes" if _TIME.search(exchange.payload) is None else "hour"


def _count(body: Body, name: str) -> int:
    return min(max(body.get(name, int) or 1, 1), _MOST_TOKENS)


def _embedded(body: Body, prompt: int) -> Asked:
    prompts = _prompts(body, "input")
    return Asked(min(prompt + TEMPLATE_TOKENS * (prompts - 1), _MOST_TOKENS), prompts, 1, 0)


def _scored(body: Body, prompt: int) -> Asked:
    """Each document is read with the query, the instruction and whatever else stands in no list of several."""
    pairs, listed = 1, 0
    for name in _SCORED:
        raw = body.raw_field(name)
        if raw is not None and raw.startswith(b"["):
            count = _count_items(body, name, raw)
            if count > 1:
                pairs = max(pairs, count)
                listed += len(raw) + media_tokens(raw)
    each = max(prompt - listed, 0) + TEMPLATE_TOKENS
    return Asked(min(prompt + (pairs - 1) * each, _MOST_TOKENS), pairs, 1, 0)


def _prompts(body: Body, field: str) -> int:
    """How many prompts a field holds: one text, a list of token ids, or a list of either."""
    raw = body.raw_field(field)
    if raw is None or _SEVERAL.match(raw) is None:
        return 1
    return _count_items(body, field, raw)


def _count_items(body: Body, field: str, raw: bytes) -> int:
    """How many items a list has; where they may be very many, as many as they may be: decoding them takes seconds."""
    most = most_items(raw)
    return most if most > MOST_ITEMS else len(body.get(field, list[msgspec.Raw]) or ())
