"""Streams of Anthropic's Messages API as streams of chat completion chunks."""

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import orjson

from tokenmill.engine.gateway.anthropic import FINISH, error, usage_of
from tokenmill.engine.gateway.anthropic_messages import thoughts
from tokenmill.engine.gateway.connection import CutError, NoAnswerError
from tokenmill.engine.gateway.pipeline import Usage
from tokenmill.engine.gateway.sse import LONGEST
from tokenmill.engine.gateway.usage import read_prompt


class RefusedError(Exception):
    """The stream began with an error.

    Attributes:
        status: What its status would have been.
        body: The error in OpenAI's shape.
    """

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(status)
        self.status = status
        self.body = body


async def begun(chunks: AsyncIterator[bytes], include_usage: bool, usage: Usage) -> AsyncGenerator[bytes, None]:
    """A Messages stream as a stream of chat completion chunks, once the first of them is there.

    Args:
        chunks: The backend's server-sent events, cut anywhere.
        include_usage: Whether the client asked for a last chunk with the usage.
        usage: Told at once what the prompt took: of a stream that breaks off, no chunk ever says so.

    Raises:
        RefusedError: It begins with an error, which another backend may not have: `overloaded_error`.
        NoAnswerError: It broke off, or was no such stream, before anything of the answer had come.
    """
    stream = _translated(chunks, include_usage, usage)
    try:
        first = await anext(stream)
    except CutError:
        raise NoAnswerError from None
    return _from(first, stream)


async def _from(first: bytes, stream: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(stream):
        yield first
        async for chunk in stream:
            yield chunk


async def _translated(chunks: AsyncIterator[bytes], include_usage: bool, usage: Usage) -> AsyncGenerator[bytes, None]:
    """The chunks; raises `CutError` where a stream does not come to its end, or an event is none or endless."""
    translator = _Translator(include_usage, usage)
    rest = b""
    try:
        async for chunk in chunks:
            *events, rest = (rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
            out = b"".join(translator.event(event) for event in events)
            if out:
                yield out
            if len(rest) > LONGEST:
                raise CutError
        if out := translator.event(rest):
            yield out
    except (KeyError, TypeError, AttributeError, ValueError):
        raise CutError from None
    if not translator.ended:
        raise CutError


class _Translator:
    """Events of one stream, one after another.

    Attributes:
        ended: The backend has said that the answer is complete.
    """

    def __init__(self, include_usage: bool, usage: Usage) -> None:
        self.ended = False
        self._usage = usage
        self._include_usage = include_usage
        self._common: dict[str, Any] = {}
        self._counted: dict[str, Any] = {}
        self._calls: dict[int, int] = {}
        #: The call that is coming, where nothing of its arguments has come yet.
        self._bare: int | None = None
        #: The block of thoughts that is coming, and the parts of its text.
        self._thoughts: dict[str, Any] = {}
        self._thinking: list[str] = []
        self._thought = 0

    def event(self, text: bytes) -> bytes:
        """The chunks that one event becomes."""
        data = b"".join(line[5:].strip() for line in text.split(b"\n") if line.startswith(b"data:"))
        if not data:
            return b""
        event: dict[str, Any] = orjson.loads(data)
        translate = getattr(self, "_on_" + str(event.get("type")), None)
        return translate(event) if translate is not None else b""

    def _count(self, usage: dict[str, Any] | None) -> None:
        """Later counts go before earlier ones; null says nothing."""
        self._counted.update((name, count) for name, count in (usage or {}).items() if count is not None)

    def _on_message_start(self, event: dict[str, Any]) -> bytes:
        message = event["message"]
        self._count(message.get("usage"))
        read_prompt(orjson.dumps({"message": {"usage": self._counted}}), self._usage)
        self._common = {
            "id": message["id"],
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": message["model"],
        }
        return self._chunk({"role": "assistant", "content": ""})

    def _on_content_block_start(self, event: dict[str, Any]) -> bytes:
        block = event["content_block"]
        self._thoughts = block if block["type"] in ("thinking", "redacted_thinking") else {}
        if block["type"] != "tool_use":
            return b""
        self._bare = index = self._calls[event["index"]] = len(self._calls)
        function = {"name": block["name"], "arguments": ""}
        return self._chunk(
            {"tool_calls": [{"index": index, "id": block["id"], "type": "function", "function": function}]}
        )

    def _on_content_block_delta(self, event: dict[str, Any]) -> bytes:
        delta = event["delta"]
        if delta["type"] == "text_delta":
            return self._chunk({"content": delta["text"]})
        if delta["type"] == "signature_delta" and self._thoughts:  # some servers sign other blocks, too
            self._thoughts["signature"] = delta["signature"]
        if delta["type"] == "thinking_delta":
            self._thinking.append(delta["thinking"])
            return self._chunk({"reasoning_content": delta["thinking"]})
        if delta["type"] == "input_json_delta":
            if delta["partial_json"]:
                self._bare = None
            return self._arguments(self._calls[event["index"]], delta["partial_json"])
        return b""

    def _arguments(self, index: int, text: str) -> bytes:
        return self._chunk({"tool_calls": [{"index": index, "function": {"arguments": text}}]})

    def _on_content_block_stop(self, _: dict[str, Any]) -> bytes:
        """Thoughts have come as they came; for the next turn's sake the whole block follows, with its signature.

        A call without arguments has none there, and an empty object in OpenAI's streams.
        """
        if self._bare is not None:
            index, self._bare = self._bare, None
            return self._arguments(index, "{}")
        block = {**self._thoughts, "thinking": "".join(self._thinking)} if self._thoughts else None
        self._thoughts, self._thinking = {}, []
        thought = None if block is None else thoughts(block)
        if thought is None:
            return b""
        # OpenAI's client puts a stream's lists together by the indices in them, and takes none without.
        thought["index"] = self._thought
        self._thought += 1
        return self._chunk({"thinking_blocks": [thought]})

    def _on_message_delta(self, event: dict[str, Any]) -> bytes:
        self._count(event.get("usage"))
        reason = event["delta"].get("stop_reason")
        return self._chunk({}, FINISH.get(reason, "stop")) if reason else b""

    def _on_message_stop(self, _: dict[str, Any]) -> bytes:
        self.ended = True
        last = b"data: [DONE]\n\n"
        if self._include_usage:
            last = _event({**self._common, "choices": [], "usage": usage_of(self._counted)}) + last
        return last

    def _on_error(self, event: dict[str, Any]) -> bytes:
        status, body = error(None, orjson.dumps(event))
        if not self._common:
            raise RefusedError(status, body)
        return b"data: " + body + b"\n\n"

    def _chunk(self, delta: dict[str, Any], finish: str | None = None) -> bytes:
        if not self._common:
            raise ValueError("an answer without a beginning")
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return _event({**self._common, "choices": [choice]})


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"
