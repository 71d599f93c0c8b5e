"""What can be read off a request in microseconds: what it needs, how long it is, how hard it looks.

Only the last message is decoded, and of a long one only its two ends; the rest is measured as bytes.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import re2

from tokenmill.engine.gateway.body import Body
from tokenmill.engine.gateway.pipeline import Exchange

#: Bytes of JSON text to a token, about; prose has more, code and other scripts fewer.
BYTES_PER_TOKEN = 4
#: Of a longer last message, this much of its beginning and of its end is looked at.
END_BYTES = 4096
#: Messages above this are not decoded at all.
_LONG = 16_384
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

#: Where the prompt may stand, and what else is looked at of a body.
_PROMPTS = ("messages", "prompt", "input", "documents")
_FIELDS = frozenset({"tools", "functions", "response_format", "logprobs", "max_completion_tokens", "max_tokens", "n"})

#: What makes a capability necessary, as bytes in the messages; inside a text the quotes would be escaped.
_PARTS = {
    "vision": (b'"image_url"', b'"input_image"', b'"video_url"'),
    "audio": (b'"input_audio"', b'"audio_url"'),
}
#: Endpoints that ask for something else than text.
_NEEDED_AT = {
    **dict.fromkeys(("/v1/embeddings", "/pooling"), "embeddings"),
    **dict.fromkeys(("/v1/rerank", "/v2/rerank", "/rerank", "/v1/score", "/score"), "rerank"),
}


class _Message(msgspec.Struct):
    role: str = ""
    content: msgspec.Raw = msgspec.Raw(b"null")


class _Part(msgspec.Struct):
    text: str = ""


_MESSAGES = msgspec.json.Decoder(list[_Message])
_PARTS_OF_TEXT = msgspec.json.Decoder(list[_Part])
_TEXT = msgspec.json.Decoder(str)


class Features(msgspec.Struct, frozen=True):
    """A request at a glance.

    Attributes:
        endpoint: Its path.
        question: Its last message, or the two ends of it.
        prompt_tokens: Estimated tokens of its prompt.
        completion_limit: Most tokens that it lets the answer have; None: it does not say.
        needs: Capabilities without which it cannot be answered.
        values: The classifier's features but for those that are 0.
        several: It asks for more than one answer.
    """

    endpoint: str
    question: bytes
    prompt_tokens: int
    completion_limit: int | None
    needs: frozenset[str]
    values: Mapping[str, float]
    several: bool = False


def features_of(exchange: Exchange) -> Features:
    """Reads them.

    Raises:
        ApiError: 400 where a field that must be looked at is of another type.
    """
    endpoint, body = exchange.endpoint, exchange.body
    if body is None:
        needs = frozenset({"audio"}) if endpoint.startswith("/v1/audio/") else frozenset[str]()
        return Features(endpoint, b"", 0, None, needs, {"bias": 1.0})
    prompt = memoryview(b"")
    for name in _PROMPTS:
        found = body.view(name)
        if found is not None:
            prompt = found
            break
    question, turns, parts = _read(prompt)
    stated = body.those_of(_FIELDS)
    tools = _tools(body) if "tools" in stated or "functions" in stated else 0
    needs = _needs(endpoint, body, stated, parts, tools)
    size = len(prompt) + tools
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
    limit = body.get("max_completion_tokens", int) if "max_completion_tokens" in stated else None
    if not limit and "max_tokens" in stated:
        limit = body.get("max_tokens", int)
    several = "n" in stated and (body.get("n", int) or 1) != 1
    return Features(endpoint, question, size // BYTES_PER_TOKEN, limit, needs, values, several)


def _tools(body: Body) -> int:
    """Bytes of the tools that it offers; 0 where it offers none."""
    tools = body.raw_field("tools") or body.raw_field("functions") or b""
    return len(tools) if len(tools) > 2 and tools != b"null" else 0


def _needs(endpoint: str, body: Body, stated: frozenset[str], parts: Sequence[bytes], tools: int) -> frozenset[str]:
    needs: set[str] = set()
    if parts:
        needs.update(name for name, forms in _PARTS.items() if any(form in part for part in parts for form in forms))
    if tools:
        needs.add("tools")
    if "response_format" in stated and b"json" in (body.raw_field("response_format") or b""):
        needs.add("json")
    if "logprobs" in stated and body.raw_field("logprobs") not in (b"null", b"false", b"0"):
        needs.add("logprobs")
    if endpoint in _NEEDED_AT:
        needs.add(_NEEDED_AT[endpoint])
    elif endpoint.startswith("/v1/audio/"):
        needs.add("audio")
    return frozenset(needs)


def _read(prompt: memoryview) -> tuple[bytes, int, list[bytes]]:
    """The last message's text, shortened; how many messages there are; the contents that are lists of parts."""
    if not prompt or prompt[0] != _LIST:
        return _text(prompt), 1, []
    try:
        messages = _MESSAGES.decode(prompt) or [_Message()]
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return _text(prompt), 1, []
    asked = content = None
    parts = []
    for message in messages:
        content = memoryview(message.content)
        if content[0] == _LIST:
            parts.append(content.tobytes())
        if message.role == "user":
            asked = content
    return _text(asked or content or prompt), len(messages), parts


def _text(raw: memoryview) -> bytes:
    """A JSON string, or the texts of a list of parts, in Latin-1."""
    if len(raw) > _LONG:
        return _ends(raw)
    try:
        if raw and raw[0] == _LIST:
            text = "\n".join([part.text for part in _PARTS_OF_TEXT.decode(raw)])
        else:
            text = _TEXT.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return _ends(raw)
    return _ends(text.encode("latin-1", "replace"))


def _ends(raw: memoryview | bytes) -> bytes:
    return bytes(raw) if len(raw) <= 2 * END_BYTES else bytes(raw[:END_BYTES]) + b"\n" + bytes(raw[-END_BYTES:])


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


def sentence(text: str) -> str:
    """A text fit for a response header: one line of ASCII."""
    return text if text.isascii() and text.isprintable() else re.sub(r"[^\x20-\x7e]+", " ", text)
