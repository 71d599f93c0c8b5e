"""What can be read off a request in microseconds: what it needs, how long it is, how hard it looks.

Only the last message is decoded, and of a long one only its two ends; the rest is measured as bytes.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import msgspec
import re2

from tokenmill.engine.gateway.body import MOST_ITEMS, Body, most_items, too_deep
from tokenmill.engine.gateway.governance import bounds
from tokenmill.engine.gateway.pipeline import Exchange
from tokenmill.engine.gateway.router.question import text_of, text_of_parts

#: Bytes of JSON text to a token, about; prose has more, code and other scripts fewer.
BYTES_PER_TOKEN = 4
#: How a JSON list begins.
_LIST = ord("[")

#: Words and forms by the feature that they speak for.
_SIGNS: dict[str, bytes] = {
    "code": rb"```|(?i)\b(?:def|class|function|import|const|public|struct|impl) [a-z_]|#include"
    rb"|\bselect\b.{1,80}\bfrom\b|traceback|stack trace|\bregex|[a-z_]\(\)|=>|\bcompile",
    "math": rb"(?i)\\(?:frac|int|sum|sqrt|begin)|[0-9a-z)] ?[=^*/] ?[0-9a-z(]|\b(?:integral|derivative|theorem|equation"
    rb"|probability|matrix|polynomial|modulo|prime|logarithm|calculate|how many|percent)",
    "reasoning": rb"(?i)\b(?:why|explain|compare|analy[sz]e|evaluate|design|prove|derive|trade-?off|step by step|reason"
    rb"|optimi[sz]e|debug|refactor|critique|plan|strategy|implication|argue|architect|root cause)",
    "lookup": rb"(?i)\b(?:what is|what's|who|when|where|define|translate|summari[sz]e|rephrase|spell|list|extract"
    rb"|classify|yes or no|capital of|synonym|correct the)\b",
    "constraints": rb"(?i)\b(?:must|at least|at most|exactly|without|unless|except|only if|ensure|no more than"
    rb"|given that)\b",
    "steps": rb"(?i)\b(?:first|then|finally|afterwards|step [0-9])\b|\n\s*[0-9]+[.)] ",
}
#: The classifier's features, in the order in which they are logged.
FEATURES = ("bias", "prompt", "question", "turns", *_SIGNS, "tools", "json", "vision")
_SIGN_NAMES = tuple(_SIGNS)

#: Tokens that a picture, recording or file counts for at most, however many bytes of base64 it has: what the largest
#: picture takes by OpenAI's rule (eight tiles of 170 tokens and 85 more) and by Anthropic's (about 1,600). For other
#: media it is a guess; a backend that finds the whole too long passes it on to the next tier.
MEDIA_TOKENS = 1700

#: Where the question may stand, and what else of a body a model reads.
_PROMPTS = ("messages", "input", "prompt", "documents")
_READ = frozenset({*_PROMPTS, "instructions", "system", "query", "queries", "suffix", "text_1", "text_2"})
#: Ask for an answer of a certain form where they hold a schema or the word; by vLLM where they hold anything.
_FORMATS = frozenset({"response_format", "text", "output_format", "output_config"})
_CONSTRAINTS = frozenset({"structured_outputs", *(f"guided_{kind}" for kind in ("json", "regex", "choice", "grammar"))})
_LOGPROBS = frozenset({"logprobs", "top_logprobs", "prompt_logprobs"})
#: Fields that make a capability necessary, beside tools.
_ASKING = _FORMATS | _CONSTRAINTS | _LOGPROBS | {"modalities", "include"}
_FIELDS = _READ | _ASKING | {"tools", "functions", "n"} | bounds.LENGTHS
_NOTHING, _LONGEST_NOTHING = frozenset({b"null", b"false", b"0", b"{}", b"[]", b'""'}), 8

#: Types of the parts of a message that are no text, by the capability that they need.
_MEDIA = {
    **dict.fromkeys(("image_url", "input_image", "image", "image_embeds", "video_url", "input_video"), "vision"),
    **dict.fromkeys(("input_file", "file", "document"), "vision"),
    **dict.fromkeys(("input_audio", "audio_url", "audio_embeds"), "audio"),
}
_TEXTS = frozenset({"text", "input_text", "output_text"})
#: Where their bytes stand.
_HOLDING = ("image_url", "video_url", "audio_url", "input_audio", "file", "file_data", "source")
#: Of a document that is a text.
_TEXT_SOURCE = re2.compile(rb'"type"\s*:\s*"text"')
#: Endpoints that ask for something else than text.
_NEEDED_AT = {
    **dict.fromkeys(("/v1/embeddings", "/pooling"), "embeddings"),
    **dict.fromkeys(("/v1/rerank", "/v2/rerank", "/rerank", "/v1/score", "/score"), "rerank"),
}
#: Fields with a list of inputs each of which a model reads for itself, by the endpoint.
_EACH = {
    **dict.fromkeys(("/v1/embeddings", "/pooling"), "input"),
    **dict.fromkeys(("/v1/rerank", "/v2/rerank", "/rerank"), "documents"),
    **dict.fromkeys(("/v1/score", "/score"), "text_2"),
    "/v1/completions": "prompt",
}

#: As many tokens fit into any model: of fewer nobody asks for the longest input.
_FITS_ANYWHERE = 64
_NONE = msgspec.Raw(b"null")


class _Message(msgspec.Struct):
    """A message, or an item of the Responses API: what a tool gave stands in `output`."""

    role: str | None = None
    content: msgspec.Raw = _NONE
    output: msgspec.Raw = _NONE


class _Part(msgspec.Struct):
    """A part of a message, by any of the APIs; what is no text stands in one of the fields but `text` and the last."""

    type: str | None = None
    text: msgspec.Raw = _NONE
    image_url: msgspec.Raw = _NONE
    video_url: msgspec.Raw = _NONE
    audio_url: msgspec.Raw = _NONE
    input_audio: msgspec.Raw = _NONE
    file: msgspec.Raw = _NONE
    file_data: msgspec.Raw = _NONE
    source: msgspec.Raw = _NONE
    content: msgspec.Raw = _NONE


_MESSAGES = msgspec.json.Decoder(list[_Message])
_PARTS = msgspec.json.Decoder(list[_Part | str])
_ITEMS = msgspec.json.Decoder(list[msgspec.Raw])


class Features(msgspec.Struct, frozen=True):
    """A request at a glance.

    Attributes:
        endpoint: Its path.
        question: Its last message, or the two ends of it.
        prompt_tokens: Estimated tokens of its prompt.
        completion_limit: Most tokens that it lets the answer have; None: it does not say so that every server minds.
        needs: Capabilities without which it cannot be answered.
        values: The classifier's features but for those that are 0.
        several: It asks for more than one answer.
        at_once: Estimated tokens of what a model reads in one go: of a list of inputs the longest.
    """

    endpoint: str
    question: bytes
    prompt_tokens: int
    completion_limit: int | None
    needs: frozenset[str]
    values: Mapping[str, float]
    several: bool
    at_once: int


def _at_once(prompt_tokens: int, inputs: memoryview | None) -> int:
    """See `Features`; `inputs` is what may be a list of them."""
    if inputs is None or inputs[0] != _LIST:
        return prompt_tokens
    raw = bytes(inputs)
    rest = max(prompt_tokens - len(raw) // BYTES_PER_TOKEN, 0)
    if raw[1:64].lstrip()[:1].isdigit():
        return rest + raw.count(b",") + 1  # one input, in tokens
    if most_items(raw) > MOST_ITEMS:
        return rest  # to look for the longest would take seconds: its backend says what is too long
    try:
        items = [bytes(item) for item in _ITEMS.decode(raw)] or [b"0"]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return prompt_tokens
    return rest + max(map(_tokens, items))


def _tokens(item: bytes) -> int:
    return item.count(b",") + 1 if item[0] == _LIST else len(item) // BYTES_PER_TOKEN


def features_of(exchange: Exchange) -> Features:
    """Reads them.

    Raises:
        ApiError: 400 where a field that must be looked at is of another type, or nested too deeply.
    """
    endpoint, body = exchange.endpoint, exchange.body
    if body is None:
        needs = frozenset({"audio"}) if endpoint.startswith("/v1/audio/") else frozenset[str]()
        return Features(endpoint, b"", 0, None, needs, {"bias": 1.0}, several=False, at_once=0)
    prompt = memoryview(b"")
    for name in _PROMPTS:
        found = body.view(name)
        if found is not None:
            prompt = found
            break
    try:
        question, turns, media = _read(prompt)
    except RecursionError:
        raise too_deep() from None
    stated = body.those_of(_FIELDS)
    tools = _tools(body) if "tools" in stated or "functions" in stated else 0
    needs = _needs(endpoint, body, stated, media, tools)
    size = tools if media is None else tools - media.surplus
    for name in stated & _READ:
        size += len(body.view(name) or b"")
    values = {
        "bias": 1.0,
        "prompt": math.log1p(size / BYTES_PER_TOKEN) / 10,
        "question": math.log1p(len(question) / BYTES_PER_TOKEN) / 10,
        "turns": math.log1p(turns) / 5,
    }
    for name in signs(question):
        values[name] = 1.0
    if needs:
        for name in ("tools", "json", "vision"):
            if name in needs:
                values[name] = 1.0
    several = "n" in stated and (body.get("n", int) or 1) != 1
    tokens = size // BYTES_PER_TOKEN
    several_inputs = endpoint in _EACH and tokens > _FITS_ANYWHERE
    at_once = _at_once(tokens, body.view(_EACH[endpoint])) if several_inputs else tokens
    limit = bounds.stated_length(endpoint, body, stated)
    return Features(endpoint, question, tokens, limit, needs, values, several, at_once)


def _tools(body: Body) -> int:
    """Bytes of the tools that it offers; 0 where it offers none."""
    offered = [body.raw_field(name) or b"null" for name in ("tools", "functions")]
    return sum([len(raw) for raw in offered if not _is_nothing(raw)])


def _needs(endpoint: str, body: Body, stated: frozenset[str], media: "_Media | None", tools: int) -> frozenset[str]:
    needs = set() if media is None else media.needs
    if tools:
        needs.add("tools")
    asking = stated & _ASKING
    if asking:
        said = {name: body.raw_field(name) or b"null" for name in asking}
        needs.update(need for name, raw in said.items() if (need := _need(name, raw, endpoint)))
    if endpoint in _NEEDED_AT:
        needs.add(_NEEDED_AT[endpoint])
    elif endpoint.startswith("/v1/audio/"):
        needs.add("audio")
    return frozenset(needs)


def _is_nothing(raw: bytes) -> bool:
    """Whether a value asks for nothing; some write an empty list or object with a blank in it."""
    return raw in _NOTHING or (len(raw) < _LONGEST_NOTHING and b"".join(raw.split()) in _NOTHING)


def _need(name: str, raw: bytes, endpoint: str) -> str | None:
    """The capability that a field makes necessary; None: none."""
    if _is_nothing(raw):
        return None
    if name in _LOGPROBS:
        return "logprobs"
    if name in _CONSTRAINTS:
        return "json"
    if name in _FORMATS:
        return "json" if b"json" in raw and (name != "text" or endpoint == "/v1/responses") else None
    if name == "modalities":
        return "audio" if b'"audio"' in raw else None
    return "logprobs" if b"logprobs" in raw else None


class _Media:
    """What is no text in the messages.

    Attributes:
        needs: Capabilities that it makes necessary.
        surplus: Bytes beyond those that `MEDIA_TOKENS` stand for.
    """

    __slots__ = ("needs", "surplus")

    def __init__(self) -> None:
        self.needs: set[str] = set()
        self.surplus = 0

    def look(self, raw: memoryview, *, within: bool = False) -> list[_Part | str] | None:
        """Takes in a list of parts, and returns it; `within`: of a part that is what a tool gave."""
        try:
            parts = _PARTS.decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return None
        for part in parts:
            if isinstance(part, str) or part.type in _TEXTS:
                continue
            inner = memoryview(part.content)
            if inner[0] != _LIST:
                self._take(part)
            elif not within:
                self.look(inner, within=True)
        return parts

    def _take(self, part: _Part) -> None:
        held = [name for name in _HOLDING if getattr(part, name) is not _NONE]
        kind = part.type if part.type in _MEDIA else next((name for name in held if name in _MEDIA), None)
        if kind is None or (kind == "document" and _TEXT_SOURCE.search(bytes(part.source))):
            return
        self.needs.add(_MEDIA[kind])
        size = sum([len(getattr(part, name)) for name in held])
        self.surplus += max(0, size - MEDIA_TOKENS * BYTES_PER_TOKEN)


def _read(prompt: memoryview) -> tuple[bytes, int, _Media | None]:
    """(the last message's text, shortened; how many messages there are; what their lists of parts hold)."""
    if not prompt or prompt[0] != _LIST:
        return text_of(prompt), 1, None
    try:
        messages = _MESSAGES.decode(prompt) or [_Message()]
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return text_of(prompt), 1, None
    asked = content = media = None
    asked_parts = parts = None
    for message in messages:
        content, parts = memoryview(message.content), None
        if content[0] == _LIST:
            media = media or _Media()
            parts = media.look(content)
        if message.output is not _NONE and (output := memoryview(message.output))[0] == _LIST:
            media = media or _Media()
            media.look(output)
        if message.role == "user":
            asked, asked_parts = content, parts
    if asked is None:
        asked, asked_parts = content, parts
    if asked_parts is None:
        return text_of(asked or prompt), len(messages), media
    return text_of_parts([one if isinstance(one, str) else one.text for one in asked_parts]), len(messages), media


@functools.cache
def _sign_set() -> Any:
    options = re2.Options()
    options.encoding = re2.Options.Encoding.LATIN1
    options.never_capture = True
    found = re2.Set.SearchSet(options)
    for pattern in _SIGNS.values():
        found.Add(pattern)
    found.Compile()
    return found


def signs(question: bytes) -> list[str]:
    """Which of the classifier's words and forms a text holds."""
    return [_SIGN_NAMES[number] for number in _sign_set().Match(question) or ()]
