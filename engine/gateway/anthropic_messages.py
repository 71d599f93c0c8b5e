"""Messages of a chat completion as those of Anthropic's Messages API."""

import re
from typing import Any

import orjson

from tokenmill.engine.gateway.api_error import UntranslatableError, quote

#: Where something has no counterpart, in words to a client.
THERE = "in the API of this model's backend"
#: What may not stand there in an id of a call; some models have `functions.weather:0`.
_NOT_IN_IDS = re.compile(r"[^a-zA-Z0-9_-]")
#: What a PDF begins with that stands in a message itself.
PDF = "data:application/pdf;base64,"


def messages_of(asked: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The system prompt's blocks, and the messages: neighbours of one role become one, as that API wants them.

    Raises:
        UntranslatableError: That API has nothing for it.
        KeyError, TypeError, AttributeError, ValueError: They are not a chat completion's.
    """
    if not isinstance(asked, list):
        raise TypeError("messages must be a list")
    system: list[dict[str, Any]] = []
    messages: list[dict[str, Any]] = []
    for message in asked:
        role = message["role"]
        if role in ("system", "developer"):
            system += _system(message["content"])
            continue
        if role not in ("user", "assistant", "tool"):
            raise UntranslatableError(
                f"A message's role is `{quote(str(role))}`; it must be system, developer, user, assistant or tool.",
                "messages",
            )
        if role == "tool":
            blocks: list[dict[str, Any]] = [
                {
                    "type": "tool_result",
                    "tool_use_id": _NOT_IN_IDS.sub("_", message["tool_call_id"]),
                    "content": _result(message["content"]),
                }
            ]
        else:
            blocks = _blocks(message.get("content"))
            if role == "assistant":
                blocks += _blocks(message.get("refusal"))
                # Where it thinks and calls tools, that API wants its thoughts back as they were, and before all else.
                blocks[:0] = [thought for block in message.get("thinking_blocks") or () if (thought := thoughts(block))]
            for call in message.get("tool_calls") or ():
                function = call["function"]
                given = _arguments(function["arguments"])
                identity = _NOT_IN_IDS.sub("_", call["id"])
                blocks.append({"type": "tool_use", "id": identity, "name": function["name"], "input": given})
            if role == "assistant" and not blocks:
                continue  # an answer without a word, as one that was broken off; that API takes none
        speaker = "assistant" if role == "assistant" else "user"
        if messages and messages[-1]["role"] == speaker:
            messages[-1]["content"].extend(blocks)
        else:
            messages.append({"role": speaker, "content": blocks})
    return system, messages


def thoughts(block: dict[str, Any]) -> dict[str, Any] | None:
    """A block of thoughts as it goes to and fro, in LiteLLM's `thinking_blocks`; None: it is none that counts.

    Without the signature, as other models' are, it is refused there.
    """
    if block["type"] == "thinking" and block.get("signature"):
        return {"type": "thinking", "thinking": block["thinking"], "signature": block["signature"]}
    if block["type"] == "redacted_thinking":
        return {"type": "redacted_thinking", "data": block["data"]}
    return None


def _system(content: Any) -> list[dict[str, Any]]:
    """A message's text as one block, or as those whose end its client wants to have cached."""
    if not isinstance(content, str) and any("cache_control" in part for part in content):
        return _blocks(content)
    return [{"type": "text", "text": _text(content)}]


def _arguments(said: str) -> dict[str, Any]:
    """Arguments of a call as an object; what is none, as a call that was broken off, in the words that API names.

    Source: https://platform.claude.com/docs/en/agents-and-tools/tool-use/fine-grained-tool-streaming.
    """
    try:
        given = orjson.loads(said or "{}")
    except orjson.JSONDecodeError:
        given = said
    return given if isinstance(given, dict) else {"INVALID_JSON": said}


def _result(content: Any) -> str | list[dict[str, Any]]:
    """What a tool said: text, or blocks where there is more to it than text."""
    if isinstance(content, list) and any(part["type"] != "text" or "cache_control" in part for part in content):
        return _blocks(content)
    return _text(content or "")


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content)


def _blocks(content: Any) -> list[dict[str, Any]]:
    """Content as blocks, without texts of white space alone, which that API refuses."""
    parts = [{"type": "text", "text": content or ""}] if content is None or isinstance(content, str) else content
    blocks = [_block(part) for part in parts]
    return [block for block in blocks if block["type"] != "text" or block["text"].strip()]


def _block(part: dict[str, Any]) -> dict[str, Any]:
    kind = part["type"]
    marked = {"cache_control": part["cache_control"]} if part.get("cache_control") else {}
    if kind == "text":
        return {"type": "text", "text": part["text"], **marked}
    if kind == "refusal":
        return {"type": "text", "text": part["refusal"]}
    if kind == "file" and (part["file"].get("file_url") or str(part["file"].get("file_data")).startswith(PDF)):
        file: dict[str, Any] = part["file"]
        if file.get("file_url"):
            source = {"type": "url", "url": file["file_url"]}
        else:
            source = {"type": "base64", "media_type": "application/pdf", "data": file["file_data"].removeprefix(PDF)}
        title = {"title": file["filename"]} if file.get("filename") else {}
        return {"type": "document", "source": source, **title, **marked}
    if kind == "image_url":
        url: str = part["image_url"]["url"]
        if not url.startswith("data:"):
            return {"type": "image", "source": {"type": "url", "url": url}, **marked}
        media, _, data = url.removeprefix("data:").partition(";base64,")
        return {"type": "image", "source": {"type": "base64", "media_type": media, "data": data}, **marked}
    raise UntranslatableError(f"Content of type `{quote(str(kind))}` has no counterpart {THERE}.", "messages")
