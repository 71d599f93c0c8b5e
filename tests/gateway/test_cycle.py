"""An answer on its way to a client's socket: what is written, and what must never be."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tokenmill.engine.gateway.cycle import Application, Cycle, Message

Headers = list[tuple[bytes, bytes]]


class Wire:
    """Stands for the connection: keeps what is written."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.writable: asyncio.Future[None] | None = None
        self.written = b""
        self.writes = 0
        self.closed = False
        self.ended = 0

    def write(self, data: bytes) -> None:
        """Keeps it."""
        self.written += data
        self.writes += 1

    def close(self) -> None:
        """Notes it."""
        self.closed = True

    def answered(self, _cycle: Cycle) -> None:
        """Counts."""
        self.ended += 1

    def default_headers(self) -> bytes:
        """None."""
        return b""

    def pause_reading(self) -> None:
        """Nothing to do."""

    def read_on(self) -> None:
        """Nothing to do."""


def answer(status: int, headers: Headers, *bodies: bytes) -> Application:
    """An application that sends this."""

    async def application(_scope: Message, _receive: object, send: Callable[[Message], Awaitable[None]]) -> None:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for number, body in enumerate(bodies, 1):
            await send({"type": "http.response.body", "body": body, "more_body": number < len(bodies)})

    return application


def whole(status: int, headers: Headers, body: bytes) -> Application:
    """An application that gives its answer whole."""

    async def application(scope: Message, _receive: object, _send: object) -> None:
        assert scope["answer"](status, headers, body) is True

    return application


def run(application: Application, method: str = "POST", keep_alive: bool = True) -> Any:
    """What comes over the wire, and how it ends."""

    async def main() -> Wire:
        wire = Wire()
        cycle = Cycle(wire, {"method": method}, keep_alive, False)  # type: ignore[arg-type]
        cycle.scope |= {"connection": wire, "answer": cycle.answer}
        await cycle.run(application)
        return wire

    wire = asyncio.run(main())
    head, _, body = wire.written.partition(b"\r\n\r\n")
    return SimpleNamespace(head=head, body=body, closed=wire.closed, ended=wire.ended, writes=wire.writes)


def test_whole_answer_is_framed_by_its_length() -> None:
    seen = run(answer(200, [(b"X-Name", b"v"), (b"content-length", b"3")], b"abc"))
    assert seen.head == b"HTTP/1.1 200 OK\r\nx-name: v\r\ncontent-length: 3"
    assert (seen.body, seen.closed, seen.ended) == (b"abc", False, 1)


def test_answer_without_a_length_is_chunked() -> None:
    seen = run(answer(200, [], b"abc", b"", b"d" * 17, b""), keep_alive=False)
    assert seen.head == b"HTTP/1.1 200 OK\r\nconnection: close\r\ntransfer-encoding: chunked"
    assert seen.body == b"3\r\nabc\r\n11\r\n" + b"d" * 17 + b"\r\n0\r\n\r\n"


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("POST", 204)])
def test_some_answers_have_no_body(method: str, status: int) -> None:
    seen = run(
        answer(status, [(b"content-length", b"3")] if method == "HEAD" else [], b"abc"[: 3 * (status == 200)]), method
    )
    assert (seen.body, seen.ended) == (b"", 1)
    assert b"chunked" not in seen.head


@pytest.mark.parametrize(
    "header", [(b"x-a", b"1\r\nx-b: 2"), (b"x-a", b"\x00"), (b"x a", b"1"), (b"x-a\r\nx-b", b"1"), (b"", b"1")]
)
def test_header_that_could_be_read_as_another_is_never_sent(header: tuple[bytes, bytes]) -> None:
    seen = run(answer(200, [header, (b"content-length", b"0")], b""))
    assert not seen.head.startswith(b"HTTP/1.1 200")
    assert b"x-b" not in seen.head


@pytest.mark.parametrize("bodies", [(b"ab",), (b"abcd",), (b"abc", b"d")])
def test_answer_of_another_length_than_stated_breaks_the_connection(bodies: tuple[bytes, ...]) -> None:
    seen = run(answer(200, [(b"content-length", b"3")], *bodies))
    assert (seen.closed, seen.ended) == (True, 0)


def test_answer_that_ends_too_soon_breaks_the_connection() -> None:
    async def application(_scope: Message, _receive: object, send: Callable[[Message], Awaitable[None]]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"abc", "more_body": True})

    seen = run(application)
    assert seen.body == b"3\r\nabc\r\n"
    assert (seen.closed, seen.ended) == (True, 0)


def test_whole_answer_is_written_in_one_piece() -> None:
    seen = run(whole(200, [(b"X-Name", b"v"), (b"content-length", b"3")], b"abc"))
    assert (seen.head, seen.body) == (b"HTTP/1.1 200 OK\r\nx-name: v\r\ncontent-length: 3", b"abc")
    assert (seen.writes, seen.closed, seen.ended) == (1, False, 1)


@pytest.mark.parametrize(
    "headers", [[(b"x-a", b"1\r\nx-b: 2"), (b"content-length", b"3")], [(b"content-length", b"2")]]
)
def test_whole_answer_is_looked_at_like_any_other(headers: Headers) -> None:
    seen = run(whole(200, headers, b"abc"))
    assert not seen.body
    assert b"x-b" not in seen.head


def test_whole_answer_waits_for_no_slow_client_and_is_given_once() -> None:
    taken: list[bool] = []

    async def application(scope: Message, _receive: object, send: Callable[[Message], Awaitable[None]]) -> None:
        connection = scope["connection"]
        connection.writable = connection.loop.create_future()
        taken.append(scope["answer"](200, [], b"never"))
        connection.writable = None
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
        taken.append(scope["answer"](200, [], b"never"))
        await send({"type": "http.response.body", "body": b"a"})

    seen = run(application)
    assert taken == [False, False]
    assert (seen.head.split(b"\r\n")[0], seen.body) == (b"HTTP/1.1 200 OK", b"a")
