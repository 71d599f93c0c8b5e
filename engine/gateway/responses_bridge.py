"""Requests to the Responses API as chat completion requests, for backends that speak Anthropic's API.

Nothing is kept there: what goes on from an earlier response, a conversation or a prompt that is kept is refused, as is
what the API itself would run. All else that a chat completion has under the same name passes to its translation, which
says what has no counterpart. `responses_answer` has the answers. Format:
https://platform.openai.com/docs/api-reference/responses.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import orjson

from tokenmill.engine.gateway.anthropic_messages import PDF, THERE
from tokenmill.engine.gateway.api_error import UntranslatableError, invalid_json, quote
from tokenmill.engine.gateway.body import Body, too_deep

#: What asks for something to be kept: the value that asks for nothing, and what to do instead.
_KEPT: dict[str, tuple[Any, str]] = {
    "previous_response_id": (None, "send the earlier items in `input` again"),
    "conversation": (None, "send the earlier items in `input` again"),
    "prompt": (None, "send its text in `instructions` and `input`"),
    "background": (False, "leave it out, and wait or ask for a stream"),
    "store": (False, "leave it out or send false"),
}
#: Fields of chat completions alone, which would say otherwise what is said here.
_CHATS = ("messages", "max_tokens", "max_completion_tokens", "response_format", "reasoning_effort", "verbosity")
#: Fields that are translated here, or that change nothing of an answer without the API's own tools.
_DONE = frozenset(
    {
        *("input", "instructions", "tools", "tool_choice", "text", "reasoning", "max_output_tokens"),
        *("include", "stream_options", "max_tool_calls", *_KEPT),
    }
)
_LOGPROBS = "message.output_text.logprobs"
#: What the translation of chat completions calls by other names.
_NAMES = {
    "messages": "input",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "verbosity": "text.verbosity",
    "max_completion_tokens": "max_output_tokens",
}


@contextlib.contextmanager
def own_words() -> Iterator[None]:
    """What cannot be translated is named as it is in this API."""
    try:
        yield
    except UntranslatableError as error:
        message = error.message.replace("chat completion request", "Responses request")
        for name, own in _NAMES.items():
            message = message.replace(f"`{name}`", f"`{own}`")
        raise UntranslatableError(message, _NAMES.get(error.param or "", error.param)) from None


def chat_of(body: Body, *, drop: bool) -> Body:
    """A Responses request as a chat completion request.

    Args:
        body: The request's.
        drop: What has no counterpart is left out, but for what an answer cannot do without.

    Raises:
        ApiError: 400 for what a backend without a memory cannot do, or what is malformed.
    """
    try:
        asked: dict[str, Any] = orjson.loads(body.raw)
    except orjson.JSONDecodeError as problem:
        raise invalid_json(str(problem)) from None
    for name, (nothing, remedy) in _KEPT.items():
        if asked.get(name) is not None and asked[name] != nothing:
            raise UntranslatableError(f"`{name}` needs a backend that keeps responses; {remedy}.", name)
    for name in _CHATS:
        if asked.get(name) is not None:
            raise UntranslatableError(f"`{name}` is a field of chat completions and none of responses.", name)
    if _LOGPROBS in (body.get("include", list[str]) or ()) and not drop:
        raise UntranslatableError(f"`{_LOGPROBS}` has no counterpart {THERE}; leave it out.", "include")
    try:
        chat = {name: value for name, value in asked.items() if name not in _DONE}
        if chat.get("truncation") == "disabled":
            del chat["truncation"]
        system = [{"role": "system", "content": asked["instructions"]}] if asked.get("instructions") else []
        chat["messages"] = system + _messages(asked.get("input"))
        if asked.get("max_output_tokens") is not None:
            chat["max_completion_tokens"] = asked["max_output_tokens"]
        if asked.get("tools"):
            chat["tools"] = [_tool(tool) for tool in asked["tools"]]
        choice = asked.get("tool_choice")
        if isinstance(choice, dict) and choice["type"] == "function":
            choice = {"type": "function", "function": {"name": choice["name"]}}
        chat["tool_choice"] = choice
        text, reasoning = asked.get("text") or {}, asked.get("reasoning") or {}
        if text.get("format"):
            chat["response_format"] = {"type": text["format"]["type"], "json_schema": text["format"]}
        chat["verbosity"] = text.get("verbosity")
        chat["reasoning_effort"] = reasoning.get("effort")
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UntranslatableError("The request is not a well-formed Responses request.", "input") from None
    except RecursionError:
        raise too_deep() from None
    try:
        return Body(orjson.dumps(chat))
    except orjson.JSONEncodeError:
        raise too_deep() from None


def _messages(said: Any) -> list[dict[str, Any]]:
    """The input as messages; those of one speaker are put together later."""
    if isinstance(said, str):
        return [{"role": "user", "content": said}]
    if not isinstance(said, list):
        raise TypeError("input must be a text or a list")
    return [_message(item) for item in said]


def _message(item: dict[str, Any]) -> dict[str, Any]:
    kind = item.get("type") or ("message" if "role" in item else "item_reference")
    if kind == "message":
        return {"role": item["role"], "content": _content(item["content"])}
    if kind == "function_call":
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    if kind == "function_call_output":
        return {"role": "tool", "tool_call_id": item["call_id"], "content": _content(item["output"])}
    if kind == "reasoning":
        return {"role": "assistant", "content": None, "thinking_blocks": _thoughts(item)}
    if kind == "item_reference":
        raise UntranslatableError(
            "An `item_reference` needs a backend that keeps items; send the item itself.", "input"
        )
    kind = quote(str(kind))
    raise UntranslatableError(f"An item of type `{kind}` has no counterpart {THERE}; leave it out.", "input")


def signed(block: dict[str, Any]) -> str:
    """What an item of reasoning carries, so that the block can be made of it again."""
    return f"{block['type']}:{block.get('signature') or block.get('data')}"


def _thoughts(item: dict[str, Any]) -> list[dict[str, Any]]:
    """The block that an item of reasoning was made of; none where it was another backend's."""
    kind, _, mark = str(item.get("signature") or item.get("encrypted_content") or "").partition(":")
    if kind == "thinking":
        text = "".join(part["text"] for part in item.get("summary") or ())
        return [{"type": kind, "thinking": text, "signature": mark}]
    return [{"type": kind, "data": mark}] if kind == "redacted_thinking" else []


def _content(said: Any) -> Any:
    return said if isinstance(said, str) else [_part(part) for part in said]


def _part(part: dict[str, Any]) -> dict[str, Any]:
    kind = part["type"]
    marked = {"cache_control": part["cache_control"]} if part.get("cache_control") else {}
    if kind in ("input_text", "output_text"):
        return {"type": "text", "text": part["text"], **marked}
    if kind == "refusal":
        return {"type": "refusal", "refusal": part["refusal"]}
    if kind in ("input_image", "input_file") and part.get("file_id"):
        instead = "`image_url`" if kind == "input_image" else "`file_data` or `file_url`"
        raise UntranslatableError(f"`file_id` needs a backend that keeps files; send {instead}.", "input")
    if kind == "input_image":
        return {"type": "image_url", "image_url": {"url": part["image_url"]}, **marked}
    if kind == "input_file":
        if not part.get("file_url") and not part["file_data"].startswith(PDF):
            raise UntranslatableError(
                f"Of files only PDFs have a counterpart {THERE}: `file_data` of `{PDF}...`.", "input"
            )
        file = {name: part[name] for name in ("file_url", "file_data", "filename") if part.get(name)}
        return {"type": "file", "file": file, **marked}
    kind = quote(str(kind))
    raise UntranslatableError(f"Content of type `{kind}` has no counterpart {THERE}; leave it out.", "input")


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    if tool["type"] != "function":
        return {"type": tool["type"]}
    marked = {"cache_control": tool["cache_control"]} if tool.get("cache_control") else {}
    function = {"name": tool["name"], "description": tool.get("description"), "parameters": tool.get("parameters")}
    return {"type": "function", "function": function, **marked}
