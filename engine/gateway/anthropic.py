"""Chat completions on a backend that speaks Anthropic's Messages API.

Requests, answers and errors are translated field by field; what has no counterpart there and may change the answer is
refused with 400, unless it is to be dropped. `anthropic_messages` has the messages, `anthropic_stream` the streams.
Format: https://docs.anthropic.com/en/api/messages.
"""

import contextlib
import re
import time
from typing import Any

import orjson

from tokenmill.engine.gateway import anthropic_effort
from tokenmill.engine.gateway.anthropic_messages import THERE, messages_of, thoughts
from tokenmill.engine.gateway.api_error import ApiError, Headers, UntranslatableError, invalid_json, quote
from tokenmill.engine.gateway.body import too_deep

PATH = b"/v1/messages"
#: Paths of that API itself: their requests and answers pass as they are.
OWN_PATHS = frozenset({PATH.decode(), "/v1/messages/count_tokens"})
#: All that can be asked of such a backend.
PATHS = OWN_PATHS | {"/v1/chat/completions", "/v1/responses"}
OFFERED = "chat completions, responses and messages"
VERSION = b"2023-06-01"
#: Headers that hold a client's credentials for the gateway.
CREDENTIALS = frozenset(
    {
        *(b"authorization", b"x-api-key", b"api-key", b"x-litellm-api-key"),
        *(b"openai-organization", b"openai-project"),  # whose account: OpenAI's clients take it from their environment
    }
)
#: `max_tokens` is required there and optional here.
DEFAULT_MAX_TOKENS = 4096

FINISH = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
#: Fields that are translated.
_TRANSLATED = frozenset(
    {
        *("model", "messages", "max_tokens", "max_completion_tokens", "stop", "user"),
        *("temperature", "top_p", "top_k", "stream", "stream_options", "thinking", "output_config"),
        *("tools", "tool_choice", "parallel_tool_calls", "reasoning_effort", "response_format"),
    }
)
#: Fields that change nothing of an answer; a seed promises nothing.
_OF_NO_EFFECT = frozenset(
    {
        *("metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
        *("prediction", "seed"),
    }
)
#: Fields without a counterpart, with the value that asks for nothing.
_NO_COUNTERPART: dict[str, Any] = {
    "n": 1,
    "logprobs": False,
    "top_logprobs": 0,
    "logit_bias": {},
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "modalities": ["text"],
    "verbosity": "medium",
    "functions": [],
    "function_call": "auto",
}
#: Whoever sends these waits for calls of them.
_NEVER_DROPPED = frozenset({"functions", "function_call"})
#: What is so at Claude where nobody says it; other servers have defaults of their own.
_USUAL: dict[str, Any] = {"temperature": 1, "top_p": 1, "top_k": -1}
#: Users that are addresses or telephone numbers, which that API refuses, or longer than it takes.
_PERSONAL = re.compile(r".*@.*|\+?[\d ()-]{7,}|.{257,}", re.DOTALL)
#: What an error in the midst of an answer would have been as a status.
STATUS = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "timeout_error": 504,
    "overloaded_error": 529,
}
_NOT_KEPT = CREDENTIALS | {b"anthropic-version"}
_KINDS = {status: kind for kind, status in STATUS.items()}


def headers(forward: Headers, api_key: str | None, *, own: bool = False) -> Headers:
    """A client's headers as this API wants them; `own`: it speaks this API itself, of the version that it names."""
    kept = [header for header in forward if header[0] not in _NOT_KEPT]
    said = dict(reversed(forward))
    kept.append((b"anthropic-version", said.get(b"anthropic-version", VERSION) if own else VERSION))
    given = said.get(b"authorization", b"").removeprefix(b"Bearer ") or said.get(b"x-api-key", b"")
    kept.append((b"x-api-key", given if api_key is None else api_key.encode()))
    return kept


def request(raw: bytes, model: str, longest: int | None = None, drop: bool = False) -> bytes:
    """A chat completion request as a Messages request.

    Args:
        raw: The body, valid JSON.
        model: The backend's own name of the model.
        longest: Most tokens of an answer that does not say how long it may be; None: `DEFAULT_MAX_TOKENS`.
        drop: Fields without a counterpart are left out, but for those that an answer cannot do without.

    Raises:
        ApiError: 400 for what this API cannot do or is malformed.
    """
    try:
        asked: dict[str, Any] = orjson.loads(raw)
    except orjson.JSONDecodeError as problem:
        raise invalid_json(str(problem)) from None
    for name, value in asked.items():
        known = name in _TRANSLATED or name in _OF_NO_EFFECT or (drop and name not in _NEVER_DROPPED)
        if not known and value is not None and (name not in _NO_COUNTERPART or value != _NO_COUNTERPART[name]):
            name = quote(name)  # noqa: PLW2901
            raise UntranslatableError(f"`{name}` has no counterpart {THERE}; leave it out.", name)
    try:
        system, messages = messages_of(asked.get("messages"))
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": asked.get("max_completion_tokens") or asked.get("max_tokens") or None,
            "messages": messages,
        }
        if system:
            marked = any("cache_control" in block for block in system)
            body["system"] = system if marked else "\n\n".join(block["text"] for block in system)
        stop = asked.get("stop")
        if stop:
            stops = [stop] if isinstance(stop, str) else stop
            body["stop_sequences"] = [text for text in stops if text.strip()]
            if len(body["stop_sequences"]) < len(stops) and not drop:
                raise UntranslatableError(f"A `stop` of white space alone has no counterpart {THERE}.", "stop")
        usual = _USUAL if "claude" in model.lower() else {}
        for name in ("temperature", "top_p", "top_k", "stream", "thinking", "output_config"):
            # Newer models take no two ways of sampling at once, or none; many clients always state what is usual.
            if asked.get(name) is not None and asked[name] != usual.get(name):
                body[name] = asked[name]
        if asked.get("user") and not _PERSONAL.fullmatch(asked["user"]):
            body["metadata"] = {"user_id": asked["user"]}
        if asked.get("tools"):
            body["tools"] = [_tool(tool) for tool in asked["tools"]]
            body.update(_tool_choice(asked))
        dropping = contextlib.suppress(UntranslatableError) if drop else contextlib.nullcontext()
        with dropping:
            if asked.get("response_format"):
                _set_format(body, asked["response_format"])
        with dropping:
            if asked.get("reasoning_effort") is not None:
                anthropic_effort.apply(body, asked["reasoning_effort"])
        budget = body.get("thinking", {}).get("budget_tokens") or 0  # `max_tokens` holds thoughts, too
        body["max_tokens"] = body["max_tokens"] or longest or DEFAULT_MAX_TOKENS + budget
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UntranslatableError("The request is not a well-formed chat completion request.", "messages") from None
    except RecursionError:
        raise too_deep() from None
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError:
        raise too_deep() from None


def _set_format(body: dict[str, Any], asked: dict[str, Any]) -> None:
    """The shape that an answer is to have; that API knows schemas alone."""
    kind = asked["type"]
    if kind == "json_schema":
        shape = {"type": "json_schema", "schema": asked["json_schema"]["schema"]}
        body["output_config"] = {**body.get("output_config", {}), "format": shape}
    elif kind != "text":
        raise UntranslatableError(
            f"A `response_format` of type `{quote(str(kind))}` has no counterpart {THERE}; ask for a `json_schema`.",
            "response_format",
        )


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    if "input_schema" in tool and "function" not in tool:
        return tool  # some clients describe their tools to every Claude in that API's words
    if tool.get("type", "function") != "function":
        kind = quote(str(tool["type"]))
        raise UntranslatableError(f"A tool of type `{kind}` has no counterpart {THERE}; send functions.", "tools")
    function = tool["function"]
    made = {"name": function["name"], "input_schema": {"type": "object", **(function.get("parameters") or {})}}
    if function.get("description"):
        made["description"] = function["description"]
    if tool.get("cache_control"):
        made["cache_control"] = tool["cache_control"]
    return made


def _tool_choice(asked: dict[str, Any]) -> dict[str, Any]:
    choice = asked.get("tool_choice")
    made: dict[str, Any] | None = None
    if isinstance(choice, dict) and choice["type"] != "function":
        kind = quote(str(choice["type"]))
        raise UntranslatableError(f"A `tool_choice` of type `{kind}` has no counterpart {THERE}.", "tool_choice")
    if isinstance(choice, dict):
        made = {"type": "tool", "name": choice["function"]["name"]}
    elif choice is not None:
        made = {"type": {"auto": "auto", "none": "none", "required": "any"}[choice]}
    if asked.get("parallel_tool_calls") is False:
        made = {**(made or {"type": "auto"}), "disable_parallel_tool_use": True}
    return {"tool_choice": made} if made else {}


def usage_of(counted: dict[str, Any]) -> dict[str, Any]:
    """Prompt tokens here include the cached and the written ones, which that API counts apart.

    What was written stands where LiteLLM has it; OpenAI's API has no word for how long it is kept.
    """
    cached = counted.get("cache_read_input_tokens") or 0
    written = counted.get("cache_creation_input_tokens") or 0
    prompt = (counted.get("input_tokens") or 0) + cached + written
    completion = counted.get("output_tokens") or 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": cached,
            "cache_creation_tokens": written,
            "cache_creation_token_details": counted.get("cache_creation"),
        },
        "cache_creation_input_tokens": written,
        "cache_read_input_tokens": cached,
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
    signed: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    for block in given.get("content") or ():
        if block["type"] == "text":
            text.append(block["text"])
        elif block["type"] == "thinking":
            thinking.append(block["thinking"])
        elif block["type"] == "tool_use":
            function = {"name": block["name"], "arguments": orjson.dumps(block["input"]).decode()}
            calls.append({"id": block["id"], "type": "function", "function": function})
        if (thought := thoughts(block)) is not None:
            signed.append(thought)
    message: dict[str, Any] = {"role": "assistant", "content": "".join(text) if text or not calls else None}
    if thinking:
        message["reasoning_content"] = "".join(thinking)
    if signed:
        message["thinking_blocks"] = signed
    if calls:
        message["tool_calls"] = calls
    finish = FINISH.get(given.get("stop_reason") or "", "stop")
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
            "usage": usage_of(given.get("usage") or {}),
        }
    )


def own_error(said: ApiError) -> bytes:
    """The body of an error of the gateway's for a client of that API."""
    kind = _KINDS.get(said.status, "invalid_request_error" if said.status < 500 else "api_error")
    named = {name: value for name, value in said.error().items() if value is not None}
    return orjson.dumps({"type": "error", "error": {**named, "type": kind}})


def error(status: int | None, raw: bytes) -> tuple[int, bytes]:
    """(status, body) of an error in OpenAI's shape; 529 (overloaded) becomes 503, None what the kind of error says."""
    try:
        said = orjson.loads(raw)["error"]
        kind, message = str(said["type"]), str(said["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        kind, message = "", raw.decode("utf-8", "replace")[:500] or f"The backend answered with status {status}."
    if status is None:
        status = STATUS.get(kind, 500)
    if status == 529:
        status = 503
    return status, ApiError(status, message, kind=kind or None).body()
