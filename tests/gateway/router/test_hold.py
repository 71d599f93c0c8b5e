"""A stream that is held back: how much of it is waited for, and that nothing of it is lost."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator

import pytest

from tokenmill.engine.gateway.connection import CutError
from tokenmill.engine.gateway.router import hold as holding
from tokenmill.engine.gateway.router.hold import Held, hold


def token(text: str) -> bytes:
    choice = {"delta": {"content": text}, "logprobs": {"content": [{"token": text, "logprob": -0.5}]}}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


PING = b": ping\n\n"
EVENTS = (PING, token("a"), token("b"), token("c"), b"data: [DONE]\n\n")


class Source:
    """A backend's stream: its chunks, then its failure, if any.

    Attributes:
        read: How many chunks were taken.
        go: Set: the chunk after the first may come.
    """

    def __init__(self, *chunks: bytes, fails: Exception | None = None) -> None:
        self.read = 0
        self.closed = False
        self.go = asyncio.Event()
        self.go.set()
        self._chunks = chunks
        self._fails = fails

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        try:
            for chunk in self._chunks:
                if self.read == 1:
                    await self.go.wait()
                self.read += 1
                yield chunk
            if self._fails is not None:
                raise self._fails
        finally:
            self.closed = True


async def rest(held: Held) -> bytes:
    return b"".join([chunk async for chunk in held.chunks()])


@pytest.mark.parametrize(("tokens", "read", "probable"), [(0, 2, 1), (1, 2, 1), (2, 3, 2), (9, 5, 3), (None, 5, 3)])
def test_as_much_is_held_as_is_asked_for_and_all_of_it_comes(tokens: int | None, read: int, probable: int) -> None:
    async def main() -> None:
        source = Source(*EVENTS)
        held = await hold(source.chunks(), tokens, 60)
        assert (source.read, held.logprobs) == (read, [-0.5] * probable)
        assert (held.late, held.broken, held.error) == (False, None, None)
        assert await rest(held) == b"".join(EVENTS)
        assert source.closed

    asyncio.run(main())


def test_an_event_may_be_cut_and_the_last_one_without_end() -> None:
    async def main() -> None:
        stream = token("a") + token("b").rstrip()
        source = Source(*[stream[start : start + 7] for start in range(0, len(stream), 7)])
        held = await hold(source.chunks(), None, 60)
        assert held.logprobs == [-0.5] * 2
        assert await rest(held) == stream

    asyncio.run(main())


def test_no_more_is_held_than_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "MOST_BYTES", 2 * len(token("a")))

    async def main() -> None:
        source = Source(*[token("a")] * 5)
        held = await hold(source.chunks(), None, 60)
        assert source.read == 2
        assert await rest(held) == token("a") * 5

    asyncio.run(main())


@pytest.mark.parametrize("more", [(), (token("b"), token("c"))])
def test_what_comes_too_late_is_not_lost(more: tuple[bytes, ...]) -> None:
    async def main() -> None:
        source = Source(token("a"), *more)
        source.go.clear()
        held = await hold(source.chunks(), None, 0.5) if more else await hold(source.chunks(), 1, 60)
        assert (held.late, held.logprobs, source.closed) == (bool(more), [-0.5], False)
        source.go.set()
        assert await rest(held) == token("a") + b"".join(more)
        assert source.closed

    asyncio.run(main())


@pytest.mark.parametrize("reads", [False, True])
def test_a_stream_that_is_left_is_ended(reads: bool) -> None:
    """Also while a chunk of it is awaited."""

    async def main() -> None:
        source = Source(token("a"), token("b"))
        source.go.clear()
        held = await hold(source.chunks(), None, 0.5)
        if reads:
            chunks = held.chunks()
            assert await anext(chunks) == token("a")
            await chunks.aclose()
        else:
            await held.close()
        assert (source.closed, source.read) == (True, 1)

    asyncio.run(main())


def test_whoever_stops_waiting_ends_the_stream() -> None:
    async def main() -> None:
        source = Source(token("a"), token("b"))
        source.go.clear()
        waiting = asyncio.create_task(hold(source.chunks(), None, 60))
        while source.read < 1:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        assert source.closed

    asyncio.run(main())


def test_a_stream_that_breaks_says_why() -> None:
    async def main() -> None:
        broken = CutError("gone")
        held = await hold(Source(token("a"), fails=broken).chunks(), None, 60)
        assert (held.broken, held.logprobs, held.late) == (broken, [-0.5], False)
        assert await rest(held) == token("a")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("event", "status"),
    [
        ({"error": {"message": "full", "code": 503}}, 503),
        ({"error": {"message": "no", "code": 400}}, 400),
        ({"error": {"message": "no", "code": 599}}, 599),
        ({"error": {"message": "no", "code": 399}}, 502),
        ({"error": {"message": "no", "code": 600}}, 502),
        ({"error": {"message": "no", "code": "full"}}, 502),
        ({"error": {"message": "no"}}, 502),
        ({"error": None}, None),
        ({"error": "a text"}, None),
        ({"choices": [{"delta": {"content": '"error"'}}]}, None),
    ],
)
def test_an_event_may_be_an_error(event: object, status: int | None) -> None:
    async def main() -> None:
        source = Source(token("a"), b"data: " + json.dumps(event).encode() + b"\n\n", token("b"))
        held = await hold(source.chunks(), None, 60)
        if status is None:
            assert (held.error, source.read) == (None, 3)
        else:
            assert held.error is not None
            assert (held.error.status, json.loads(held.error.body or b"")) == (status, event)
            assert source.read == 2
        await held.close()

    asyncio.run(main())
