"""Streams of chat completion chunks as streams of the Responses API's events."""

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import orjson

from tokenmill.engine.gateway.body import Body
from tokenmill.engine.gateway.connection import CutError, SilenceError
from tokenmill.engine.gateway.responses_answer import Growing
from tokenmill.engine.gateway.sse import Events, data_of


async def translated(chunks: AsyncGenerator[bytes, None], asked: Body) -> AsyncGenerator[bytes, None]:
    """The events of an answer.

    Args:
        chunks: Chunks of a chat completion as the gateway makes them itself, with its usage.
        asked: The request.

    Raises:
        CutError, SilenceError: The chunks broke off; `response.failed` has been said before.
    """
    events, translator = Events(), _Translator(asked)
    async with contextlib.aclosing(chunks):
        try:
            async for chunk in chunks:
                for event in events.feed(chunk):
                    translator.take(data_of(event) or b"")
                if said := translator.said():
                    yield said
        except (CutError, SilenceError) as error:
            silent = isinstance(error, SilenceError)
            translator.fail(
                "The backend was silent." if silent else "The backend broke off in the middle of its answer."
            )
            if said := translator.said():
                yield said
            raise


class _Translator:
    """Chunks of one stream, one after another."""

    def __init__(self, asked: Body) -> None:
        self._asked = asked
        self._growing: Growing | None = None
        self._said: list[bytes] = []
        self._number = 0
        self._failed = False

    def said(self) -> bytes:
        """The events that have come since it was asked last."""
        said, self._said = b"".join(self._said), []
        return said

    def take(self, data: bytes) -> None:
        """One event's data."""
        if self._failed:
            return
        if data == b"[DONE]":
            if self._growing is not None:
                self._growing.end()
            return
        chunk: dict[str, Any] = orjson.loads(data)
        error = chunk.get("error")
        if error is not None:
            self.fail(error["message"], error["type"])
            return
        if self._growing is None:
            self._growing = Growing(self._asked, chunk, self._tell)
        growing = self._growing
        if chunk.get("usage"):
            growing.usage(chunk["usage"])
        for choice in chunk["choices"]:
            delta = choice["delta"]
            growing.thought(delta.get("reasoning_content") or "")
            for block in delta.get("thinking_blocks") or ():
                growing.sign(block)
            growing.text(delta.get("content") or "")
            for call in delta.get("tool_calls") or ():
                growing.call(call)
            if choice["finish_reason"]:
                growing.stopped(choice["finish_reason"])

    def fail(self, message: str, kind: str = "") -> None:
        """The stream ends here, and has not come to its end."""
        if not self._failed and self._growing is not None:
            self._growing.fail(message, kind)
        self._failed = True

    def _tell(self, kind: str, members: dict[str, Any]) -> None:
        event = orjson.dumps({"type": kind, "sequence_number": self._number, **members})
        self._number += 1
        self._said.append(b"event: " + kind.encode() + b"\ndata: " + event + b"\n\n")
