"""Chat completions on a backend that speaks Anthropic's Messages API.

Requests, answers, errors and streams are translated field by field; what has no counterpart there and would change
the answer is refused with 400 rather than dropped. Format: https://docs.anthropic.com/en/api/messages.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import orjson

from tokenmill.engine.gateway.api_error import ApiError, Headers, invalid_json

PATH = b"/v1/messages"
VERSION = b"2023-06-01"
#: `max_tokens` is required there and optional here.
DEFAULT_MAX_TOKENS = 4096

_FINISH = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
#: Fields without a counterpart, with the value that asks for nothing.
_NO_COUNTERPART: dict[str, Any] = {
    "n": 1,
    "logprobs": False,
    "top_logprobs": 0,
    "logit_bias": {},
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "response_format": {"type": "text"},
    "audio": None,
    "functions": [],
}


def headers(forward: Headers, api_key: str | None) -> Headers:
    """A client's headers as this API wants them."""
    kept = [header for header in forward if header[0] not in (b"authorization", b"x-api-key", b"anthropic-version")]
    kept.append((b"anthropic-version", VERSION))
    given = next((value.removeprefix(b"Bearer ") for name, value in forward if name == b"authorization"), b"")
    kept.append((b"x-api-key", given if api_key is None else api_key.encode()))
    return kept


def request(raw: bytes, model: str) -> bytes:
    """A chat completion request as a Messages request.

    Args:
        raw: The body, valid JSON.
        model: The backend's own name of the model.

    Raises:
        ApiError: 400 for what this API cannot do or is malformed.
    """
    try:
        asked: dict[str, Any] = orjson.loads(raw)
    except orjson.JSONDecodeError as problem:
        raise invalid_json(str(problem)) from None
    for name, nothing in _NO_COUNTERPART.items():
        if asked.get(name, nothing) not in (nothing, None):
            raise _refusal(f"`{name}` has no counterpart in the API of this model's backend; leave it out.", name)
    try:
        system, messages = _messages(asked.get("messages"))
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": asked.get("max_completion_tokens") or asked.get("max_tokens") or DEFAULT_MAX_TOKENS,
            "messages": messages,
        }
        if system:
            body["system"] = system
        stop = asked.get("stop")
        if stop:
            body["stop_sequences"] = [stop] if isinstance(stop, str) else stop
        for name in ("temperature", "top_p", "top_k", "stream", "thinking"):
            if asked.get(name) is not None:
                body[name] = asked[name]
        if asked.get("user"):
            body["metadata"] = {"user_id": asked["user"]}
        if asked.get("tools"):
            body["tools"] = [_tool(tool) for tool in asked["tools"]]
            body.update(_tool_choice(asked))
    except (KeyError, TypeError, AttributeError, ValueError):
        raise _refusal("The request is not a well-formed chat completion request.", "messages") from None
    return orjson.dumps(body)


def _refusal(message: str, param: str) -> ApiError:
    return ApiError(400, message, code="unsupported_value", param=param)


def _messages(asked: Any) -> tuple[str, list[dict[str, Any]]]:
    """The system prompt and the messages; neighbours of one role become one message, as this API wants them."""
    if not isinstance(asked, list):
        raise TypeError("messages must be a list")
    system: list[str] = []
    messages: list[dict[str, Any]] = []
    for message in asked:
        role = message["role"]
        if role in ("system", "developer"):
            system.append(_text(message["content"]))
            continue
        if role == "tool":
            blocks: list[dict[str, Any]] = [
                {
                    "type": "tool_result",
                    "tool_use_id": message["tool_call_id"],
                    "content": _text(message["content"]),
                }
            ]
        else:
            blocks = _blocks(message.get("content"))
            for call in message.get("tool_calls") or ():
                function = call["function"]
                given = orjson.loads(function["arguments"] or "{}")
                blocks.append({"type": "tool_use", "id": call["id"], "name": function["name"], "input": given})
        speaker = "assistant" if role == "assistant" else "user"
        if messages and messages[-1]["role"] == speaker:
            messages[-1]["content"].extend(blocks)
        else:
            messages.append({"role": speaker, "content": blocks})
    return "\n\n".join(system), messages


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content)


def _blocks(content: Any) -> list[dict[str, Any]]:
    if content is None or content == "":
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [_block(part) for part in content]


def _block(part: dict[str, Any]) -> dict[str, Any]:
    kind = part["type"]
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":
        url: str = part["image_url"]["url"]
        if not url.startswith("data:"):
            return {"type": "image", "source": {"type": "url", "url": url}}
        media, _, data = url.removeprefix("data:").partition(";base64,")
        return {"type": "image", "source": {"type": "base64", "media_type": media, "data": data}}
    raise _refusal(f"Content of type `{kind}` has no counterpart in the API of this model's backend.", "messages")


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool["function"]
    made = {"name": function["name"], "input_schema": function.get("parameters") or {"type": "object"}}
    if function.get("description"):
        made["description"] = function["description"]
    return made


def _tool_choice(asked: dict[str, Any]) -> dict[str, Any]:
    choice = asked.get("tool_choice")
    made: dict[str, Any] | None = None
    if isinstance(choice, dict):
        made = {"type": "tool", "name": choice["function"]["name"]}
    elif choice is not None:
        made = {"type": {"auto": "auto", "none": "none", "required": "any"}[choice]}
    if asked.get("parallel_tool_calls") is False:
        made = {**(made or {"type": "auto"}), "disable_parallel_tool_use": True}
    return {"tool_choice": made} if made else {}


def _usage(counted: dict[str, Any]) -> dict[str, Any]:
    """Prompt tokens here include the cached ones, which that API counts apart."""
    cached = counted.get("cache_read_input_tokens") or 0
    prompt = (counted.get("input_tokens") or 0) + cached + (counted.get("cache_creation_input_tokens") or 0)
    completion = counted.get("output_tokens") or 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def answer(raw: bytes) -> bytes:
    """A Messages answer as a chat completion; raises `ApiError` 502 when it is none."""
    try:
        return _completion(orjson.loads(raw))
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ApiError(502, "The backend's answer is not one of the Messages API.", code="bad_answer") from None


def _completion(given: dict[str, Any]) -> bytes:
    text: list[str] = []
    thinking: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in given.get("content") or ():
        if block["type"] == "text":
            text.append(block["text"])
        elif block["type"] == "thinking":
            thinking.append(block["thinking"])
        elif block["type"] == "tool_use":
            function = {"name": block["name"], "arguments": orjson.dumps(block["input"]).decode()}
            calls.append({"id": block["id"], "type": "function", "function": function})
    message: dict[str, Any] = {"role": "assistant", "content": "".join(text) if text or not calls else None}
    if thinking:
        message["reasoning_content"] = "".join(thinking)
    if calls:
        message["tool_calls"] = calls
    finish = _FINISH.get(given.get("stop_reason") or "", "stop")
    return orjson.dumps(
        {
            "id": given.get("id"),
            "object": "chat.completion",
            "created": int(time.time()),
            "model": given.get("model"),
            "choices": [
                {
                    "index": 0,
                    "message": message,
                    "logprobs": None,
                    "finish_reason": finish,
                    "stop_reason": given.get("stop_sequence"),
                }
            ],
            "usage": _usage(given.get("usage") or {}),
        }
    )


def error(status: int, raw: bytes) -> tuple[int, bytes]:
    """(status, body) of an error in OpenAI's shape; 529 (overloaded) becomes 503."""
    try:
        said = orjson.loads(raw)["error"]
        kind, message = str(said["type"]), str(said["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        kind, message = "", raw.decode("utf-8", "replace")[:500] or f"The backend answered with status {status}."
    if status == 529:
        status = 503
    return status, ApiError(status, message, kind=kind or None).body()


async def stream(chunks: AsyncIterator[bytes], include_usage: bool) -> AsyncGenerator[bytes, None]:
    """A Messages stream as a stream of chat completion chunks.

    Args:
        chunks: The backend's server-sent events, cut anywhere.
        include_usage: Whether the client asked for a last chunk with the usage.
    """
    translator = _StreamTranslator(include_usage)
    rest = b""
    async for chunk in chunks:
        *events, rest = (rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        out = b"".join(translator.event(event) for event in events)
        if out:
            yield out


class _StreamTranslator:
    def __init__(self, include_usage: bool) -> None:
        self._include_usage = include_usage
        self._common: dict[str, Any] = {}
        self._counted: dict[str, Any] = {}
        self._calls: dict[int, int] = {}

    def event(self, text: bytes) -> bytes:
        """The chunks that one event becomes."""
        data = b"".join(line[5:].strip() for line in text.split(b"\n") if line.startswith(b"data:"))
        if not data:
            return b""
        event: dict[str, Any] = orjson.loads(data)
        translate = getattr(self, "_on_" + str(event.get("type")), None)
        return translate(event) if translate is not None else b""

    def _on_message_start(self, event: dict[str, Any]) -> bytes:
        message = event["message"]
        self._counted.update(message.get("usage") or {})
        self._common = {
            "id": message["id"],
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": message["model"],
        }
        return self._chunk({"role": "assistant", "content": ""})

    def _on_content_block_start(self, event: dict[str, Any]) -> bytes:
        block = event["content_block"]
        if block["type"] != "tool_use":
            return b""
        index = self._calls[event["index"]] = len(self._calls)
        function = {"name": block["name"], "arguments": ""}
        return self._chunk(
            {"tool_calls": [{"index": index, "id": block["id"], "type": "function", "function": function}]}
        )

    def _on_content_block_delta(self, event: dict[str, Any]) -> bytes:
        delta = event["delta"]
        if delta["type"] == "text_delta":
            return self._chunk({"content": delta["text"]})
        if delta["type"] == "thinking_delta":
            return self._chunk({"reasoning_content": delta["thinking"]})
        if delta["type"] == "input_json_delta":
            call = {"index": self._calls[event["index"]], "function": {"arguments": delta["partial_json"]}}
            return self._chunk({"tool_calls": [call]})
        return b""

    def _on_message_delta(self, event: dict[str, Any]) -> bytes:
        self._counted.update(event.get("usage") or {})
        reason = event["delta"].get("stop_reason")
        return self._chunk({}, _FINISH.get(reason, "stop")) if reason else b""

    def _on_message_stop(self, _: dict[str, Any]) -> bytes:
        last = b"data: [DONE]\n\n"
        if self._include_usage:
            last = _event({**self._common, "choices": [], "usage": _usage(self._counted)}) + last
        return last

    def _on_error(self, event: dict[str, Any]) -> bytes:
        _, body = error(502, orjson.dumps(event))
        return b"data: " + body + b"\n\n"

    def _chunk(self, delta: dict[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return _event({**self._common, "choices": [choice]})


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"
