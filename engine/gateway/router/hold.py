"""Holds a stream back until enough of it has come to be judged."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator

import msgspec

from tokenmill.engine.gateway.api_error import JSON
from tokenmill.engine.gateway.connection import CutError, SilenceError
from tokenmill.engine.gateway.pipeline import Exchange, Reply
from tokenmill.engine.gateway.router.confidence import logprobs_of
from tokenmill.engine.gateway.sse import Events, data_of

#: More than this of a stream is not held: what has come is judged.
MOST_BYTES = 4 * 1024 * 1024
#: Status of an error in a stream that states none.
_BAD_GATEWAY = 502


class _Said(msgspec.Struct):
    error: dict[str, msgspec.Raw] | None = None


_SAID = msgspec.json.Decoder(_Said)


class Held:
    """The beginning of a stream, or all of it, and what follows.

    Attributes:
        logprobs: The log probabilities of the tokens in it.
        late: The time was over before enough of it had come.
        broken: Why no more of it came; None: nothing broke.
        error: The error that it says instead of going on, as an answer; None: it says none.
    """

    def __init__(self, source: AsyncGenerator[bytes, None]) -> None:
        self.logprobs: list[float] = []
        self.late = False
        self.broken: CutError | SilenceError | None = None
        self.error: Reply | None = None
        self._source = source
        self._held: list[bytes] = []
        self._next: asyncio.Task[bytes | None] | None = None
        self._ended = self._said = False

    async def fill(self, tokens: int | None, left_s: float) -> None:
        """Reads until so many tokens have come, the time is over, or the stream ends, breaks or fails.

        Args:
            tokens: None: all; 0: until it is known what its first event says.
            left_s: The time.
        """
        events = Events()
        deadline = time.perf_counter() + left_s
        size = 0
        while size < MOST_BYTES and (tokens is None or not self._said or len(self.logprobs) < tokens):
            chunk = await self._read(deadline)
            if chunk is None:
                if self._ended:
                    self._take(events.rest())
                return
            size += len(chunk)
            self._held.append(chunk)
            for raw in events.feed(chunk):
                self._take(raw)
                if self.error is not None:
                    return

    def _take(self, raw: bytes) -> None:
        """Looks at an event."""
        data = data_of(raw)
        if data is None:
            return
        self._said = True
        if b'"error"' in data:
            self.error = _error(data)
        self.logprobs += logprobs_of(data)

    async def _read(self, deadline: float) -> bytes | None:
        """The next chunk; None at the stream's end, or when the time is over (it is then still awaited)."""
        if self._next is None:
            self._next = asyncio.ensure_future(_next(self._source))
        # A stream may not be broken off by a timeout: what is awaited goes on.
        done, _ = await asyncio.wait({self._next}, timeout=max(deadline - time.perf_counter(), 0))
        if not done:
            self.late = True
            return None
        task, self._next = self._next, None
        try:
            chunk = task.result()
        except (CutError, SilenceError) as error:
            self.broken, chunk = error, None
        self._ended = chunk is None
        return chunk

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The stream from its beginning."""
        try:
            for chunk in self._held:
                yield chunk
            self._held = []
            if self._next is not None:
                task, self._next = self._next, None
                late = await task
                if late is None:
                    return
                yield late
            if not self._ended:
                async for chunk in self._source:
                    yield chunk
        finally:
            await self.close()

    async def close(self) -> None:
        """Ends the stream, which stops its backend."""
        task, self._next = self._next, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, CutError, SilenceError):
                await task
        await self._source.aclose()

    def end(self, _exchange: Exchange) -> None:
        """The request has ended, perhaps before anyone read the stream."""
        if self._next is not None:
            self._next.cancel()


def _error(data: bytes) -> Reply | None:
    """The answer that an event with an error comes to; None: it is another event."""
    try:
        said = _SAID.decode(data).error
        code = None if said is None else msgspec.json.decode(said.get("code", b"null"))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if said is None:
        return None
    return Reply(code if isinstance(code, int) and 400 <= code <= 599 else _BAD_GATEWAY, [JSON], data)


async def _next(source: AsyncGenerator[bytes, None]) -> bytes | None:
    return await anext(source, None)


async def hold(source: AsyncGenerator[bytes, None], tokens: int | None, left_s: float) -> Held:
    """Holds a stream back.

    Args:
        source: The stream.
        tokens: Until so many tokens have come; None: until it ends; 0: until its first event has.
        left_s: But no longer than this.
    """
    held = Held(source)
    try:
        await held.fill(tokens, left_s)
    except BaseException:
        await held.close()
        raise
    return held
