"""The client towards the backends against servers that answer in every legal way, and in some that are not."""

import asyncio
import contextlib
import errno
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tokenmill.engine.gateway import upstream as upstream_module
from tokenmill.engine.gateway.connection import (
    HIGH_WATER,
    ConnectFailedError,
    CutError,
    NoAnswerError,
    SilenceError,
)
from tokenmill.engine.gateway.heads import first_values
from tokenmill.engine.gateway.names import Names
from tokenmill.engine.gateway.settings import Settings
from tokenmill.engine.gateway.upstream import Answer, Origin, Upstream, forwarded_headers

Use = Callable[[Upstream, Origin], Awaitable[None]]


class Server:
    """Answers every request on a connection with the same bytes; closes after it where told to."""

    def __init__(self, answer: bytes, close: bool = False) -> None:
        self.answer = answer
        self.close = close
        self.connections = 0
        self.requests: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                size = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or 0)
                self.requests.append(head + await reader.readexactly(size))
                writer.write(self.answer)
                await writer.drain()
                if self.close:
                    break
        except (asyncio.IncompleteReadError, ConnectionResetError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


def talk(server: Server, use: Use, settings: Settings | None = None) -> None:
    """Runs `use` with a client against the server."""

    async def main() -> None:
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        upstream = Upstream(settings or Settings())
        try:
            await use(upstream, Origin.of(f"http://127.0.0.1:{port}/prefix"))
        finally:
            await upstream.close()
            listening.close()
            await listening.wait_closed()

    asyncio.run(main())


async def fetch(upstream: Upstream, origin: Origin, body: bytes | None = b"{}") -> tuple[Answer, bytes]:
    """One whole exchange."""
    answer = await upstream.send(b"POST", origin, b"/v1/x?a=b", [(b"x-one", b"1")], body)
    try:
        return answer, await answer.read()
    finally:
        answer.close()


LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Kept: yes\r\n\r\nhello"


@pytest.mark.parametrize(
    ("raw", "closes", "reused"),
    [
        (LENGTH, False, True),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nx-early: x\r\n\r\n" + LENGTH, False, True),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\nTrailer: t\r\n\r\n",
            False,
            True,
        ),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello", True, False),
        (b"HTTP/1.1 200 OK\r\n\r\nhello", True, False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", True, False),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\nhello", False, True),
    ],
)
def test_every_framing_is_understood(raw: bytes, closes: bool, reused: bool) -> None:
    server = Server(raw, close=closes)

    async def use(upstream: Upstream, origin: Origin) -> None:
        for _ in range(3):
            answer, body = await fetch(upstream, origin)
            assert (answer.status, body) == (200, b"hello")
            assert not {name for name, _ in answer.headers} & {b"content-length", b"transfer-encoding", b"connection"}
            assert not {name for name, _ in answer.headers} & {b"x-early", b"trailer"}

    talk(server, use)
    assert server.connections == (1 if reused else 3)
    assert server.requests[0].startswith(b"POST /prefix/v1/x?a=b HTTP/1.1\r\nhost: 127.0.0.1:")
    assert server.requests[0].endswith(b"\r\nx-one: 1\r\ncontent-length: 2\r\n\r\n{}")


class Tiring(Server):
    """Closes each connection at its second request, with as much of an answer as it is told to give to that."""

    last = b""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.connections += 1
        try:
            for answer in (self.answer, self.last):
                self.requests.append(await reader.readuntil(b"\r\n\r\n") + await reader.readexactly(2))
                writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionResetError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


@pytest.mark.parametrize(
    ("idle", "late", "last"),
    [(True, False, b""), (True, True, b""), (True, False, b"HTTP/1.1 200"), (False, False, b"")],
)
def test_a_request_that_meets_a_closing_connection_goes_out_on_a_new_one(
    monkeypatch: pytest.MonkeyPatch, idle: bool, late: bool, last: bytes
) -> None:
    if idle:
        monkeypatch.setattr(upstream_module, "_MAY_BE_CLOSED_S", 0.0)
    monkeypatch.setattr(upstream_module, "_SHOWS_WITHIN_S", -1.0 if late else 60.0)
    again = idle and not late and not last
    server = Tiring(LENGTH)
    server.last = last

    async def use(upstream: Upstream, origin: Origin) -> None:
        assert (await fetch(upstream, origin))[1] == b"hello"
        if again:
            assert (await fetch(upstream, origin))[1] == b"hello"
            return
        # The backend was at work a moment ago, had begun to answer or had the request for long: that ended it.
        with pytest.raises(NoAnswerError):
            await fetch(upstream, origin)

    talk(server, use)
    assert len(server.requests) == (3 if again else 2)


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
def test_answers_without_a_body(status: bytes) -> None:
    server = Server(b"HTTP/1.1 " + status + b"\r\n\r\n")

    async def use(upstream: Upstream, origin: Origin) -> None:
        for _ in range(2):
            assert (await fetch(upstream, origin, None))[1] == b""

    talk(server, use)
    assert server.connections == 1


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", NoAnswerError),
        (b"HTTP/1.1 200 O", NoAnswerError),
        (b"SSH-2.0-OpenSSH\r\n", NoAnswerError),
        (b"HTTP/1.1 999 No\r\ncontent-length: 0\r\n\r\n", NoAnswerError),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 400_000 + b"\r\n\r\n", NoAnswerError),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello", CutError),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n", CutError),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nhello\r\n", CutError),
    ],
    ids=["nothing", "half a line", "not http", "no status", "endless head", "short", "no last chunk", "bad chunk"],
)
def test_broken_answers_are_told_apart(raw: bytes, problem: type[Exception]) -> None:
    async def use(upstream: Upstream, origin: Origin) -> None:
        with pytest.raises(problem):
            await fetch(upstream, origin)

    talk(Server(raw, close=True), use)


def test_silence_before_and_during_an_answer() -> None:
    async def use(upstream: Upstream, origin: Origin) -> None:
        with pytest.raises(SilenceError):
            await fetch(upstream, origin)

    settings = Settings(read_timeout_s=0.1)
    talk(Server(b""), use, settings)
    talk(Server(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello"), use, settings)


def test_a_backend_that_is_not_read_for_now_is_not_silent() -> None:
    """A slow client's answer waits: it is not the backend's turn."""
    slow = Server(b"HTTP/1.1 200 OK\r\ncontent-length: 8000000\r\n\r\n" + b"x" * 8_000_000)
    silent = Server(b"")

    async def use(upstream: Upstream, origin: Origin) -> None:
        listening = await asyncio.start_server(silent.serve, "127.0.0.1", 0)
        answer = await upstream.send(b"POST", origin, b"/", [], b"{}")
        while await answer.more() and len(answer.arrived()) < HIGH_WATER:
            pass
        other = Origin.of(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
        with pytest.raises(SilenceError):  # later asked and given up: the first one would have been, too
            await fetch(upstream, other)
        assert len(await answer.read()) == 8_000_000
        answer.close()
        listening.close()

    talk(slow, use, Settings(read_timeout_s=0.3))


def test_an_answer_of_no_stated_length_is_whole_when_it_ends_and_not_when_it_breaks() -> None:
    class Breaking(Server):
        async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            """Resets the connection once all was read."""
            await reader.readuntil(b"\r\n\r\n")
            writer.write(self.answer)
            await taken.wait()
            end = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, end)
            writer.transport.abort()

    taken = asyncio.Event()

    async def use(upstream: Upstream, origin: Origin) -> None:
        answer = await upstream.send(b"POST", origin, b"/", [], b"{}")
        assert await answer.next_chunk() == b"hello"
        taken.set()
        with pytest.raises(CutError):
            await answer.next_chunk()
        answer.close()

    talk(Breaking(b"HTTP/1.1 200 OK\r\n\r\nhello"), use)


def test_a_body_that_the_backend_does_not_take_is_silence_too() -> None:
    class Deaf(Server):
        async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            """Reads nothing."""
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            writer.transport.abort()

    async def use(upstream: Upstream, origin: Origin) -> None:
        async with asyncio.timeout(20):
            with pytest.raises(SilenceError):
                await fetch(upstream, origin, b"x" * 50_000_000)

    talk(Deaf(b""), use, Settings(read_timeout_s=0.2))


def test_a_connection_whose_request_was_answered_before_its_end_takes_no_other() -> None:
    class Hasty(Server):
        async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            """Answers the head alone, and reads everything."""
            self.connections += 1
            await reader.readuntil(b"\r\n\r\n")
            writer.write(self.answer)
            with contextlib.suppress(asyncio.CancelledError, ConnectionResetError):
                await asyncio.sleep(0.1)
                while await reader.read(1 << 16):
                    pass
            writer.close()

    server = Hasty(LENGTH)

    async def use(upstream: Upstream, origin: Origin) -> None:
        for _ in range(2):
            # What is left of the first one's body would be taken for the second.
            assert (await fetch(upstream, origin, b"x" * 50_000_000))[1] == b"hello"

    talk(server, use)
    assert server.connections == 2


def test_an_answer_without_an_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenmill.engine.gateway.connection.MOST_WHOLE_BYTES", 1_000_000)
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    most = head + b"7a120\r\n" + b"x" * 500_000 + b"\r\n7a120\r\n" + b"x" * 500_000 + b"\r\n"
    server = Server(b"")

    async def use(upstream: Upstream, origin: Origin) -> None:
        server.answer = most + b"0\r\n\r\n"
        assert len((await fetch(upstream, origin))[1]) == 1_000_000
        server.answer = most + b"1\r\nx\r\n"
        with pytest.raises(CutError):
            await asyncio.wait_for(fetch(upstream, origin), 10)

    talk(server, use)


def test_trailers_are_no_headers() -> None:
    raw = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nx-late: a\r\n\r\n"

    async def use(upstream: Upstream, origin: Origin) -> None:
        answer, body = await fetch(upstream, origin)
        assert (answer.headers, body) == ([], b"hello")

    talk(Server(raw), use)


def test_no_connection_is_told_with_its_reason() -> None:
    def greet(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 a server of mail\r\n")
        writer.close()

    async def use(upstream: Upstream, _origin: Origin) -> None:
        plain = await asyncio.start_server(greet, "127.0.0.1", 0)
        port = plain.sockets[0].getsockname()[1]
        for root, reason in (
            ("http://127.0.0.1:9", "connection refused"),
            ("http://nowhere.invalid", "its name cannot be resolved"),
            (f"https://127.0.0.1:{port}", "it speaks no TLS"),
        ):
            with pytest.raises(ConnectFailedError, match=reason):
                await fetch(upstream, Origin.of(root))
        plain.close()

    talk(Server(b""), use)


def test_of_several_addresses_the_last_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(upstream: Upstream, _origin: Origin) -> None:
        loop = asyncio.get_running_loop()

        async def resolve(_: Any, host: str) -> list[str]:
            assert host == "two.example"
            return ["203.0.113.1", "203.0.113.2"]

        async def connect(_: socket.socket, address: tuple[str, int]) -> None:
            raise OSError(errno.ENETUNREACH, f"Connect call failed {address}")

        monkeypatch.setattr(Names, "addresses", resolve)
        monkeypatch.setattr(loop, "sock_connect", connect)
        with pytest.raises(ConnectFailedError, match="network is unreachable"):
            await fetch(upstream, Origin.of("http://two.example"))

    talk(Server(b""), use)


def test_cancelled_request_closes_its_connection() -> None:
    server = Server(b"")

    async def use(upstream: Upstream, origin: Origin) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(fetch(upstream, origin), 0.1)
        server.answer = LENGTH
        assert (await fetch(upstream, origin))[1] == b"hello"

    talk(server, use)
    assert server.connections == 2


def test_answer_closed_early_does_not_poison_the_pool() -> None:
    server = Server(LENGTH)

    async def use(upstream: Upstream, origin: Origin) -> None:
        answer = await upstream.send(b"POST", origin, b"/", [], b"{}")
        answer.close()
        answer.close()
        assert (await fetch(upstream, origin))[1] == b"hello"

    talk(server, use)
    assert server.connections == 2


def test_bytes_after_an_answer_do_not_become_the_next_one() -> None:
    server = Server(LENGTH + LENGTH.replace(b"hello", b"wrong"))

    async def use(upstream: Upstream, origin: Origin) -> None:
        for _ in range(3):
            answer, body = await fetch(upstream, origin)
            assert (answer.status, body) == (200, b"hello")
            await asyncio.sleep(0.02)

    talk(server, use)
    assert server.connections == 3


def test_closed_idle_connection_is_not_used() -> None:
    server = Server(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", close=True)

    async def use(upstream: Upstream, origin: Origin) -> None:
        for _ in range(5):
            assert (await fetch(upstream, origin))[1] == b"hello"
            await asyncio.sleep(0.02)

    talk(server, use)
    assert server.connections == 5


def test_long_bodies_both_ways() -> None:
    size = 20_000_000
    server = Server(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size + b"x" * size)

    async def use(upstream: Upstream, origin: Origin) -> None:
        answer = await upstream.send(b"POST", origin, b"/", [], b"y" * size)
        await asyncio.sleep(0.1)  # nobody reads meanwhile: what is held is bounded
        got = len(first := await answer.next_chunk())
        assert len(first) <= HIGH_WATER + 2**20
        while chunk := await answer.next_chunk():
            got += len(chunk)
        answer.close()
        assert got == size

    talk(server, use)
    assert server.requests[0].endswith(b"\r\n\r\n" + b"y" * size)


def test_origins() -> None:
    origin = Origin.of("https://api.example.com/prefix")
    assert (origin.host, origin.port, origin.tls) == ("api.example.com", 443, True)
    assert (origin.authority, origin.prefix) == (b"api.example.com", b"/prefix")
    assert Origin.of("http://[::1]:8000").host == "::1"
    assert Origin.of("http://[::1]:8000").authority == b"[::1]:8000"


def test_hop_by_hop_headers_stay_behind() -> None:
    given = [
        (b"host", b"a"),
        (b"connection", b"keep-alive, X-Secret"),
        (b"x-secret", b"1"),
        (b"keep-alive", b"5"),
        (b"te", b"trailers"),
        (b"x-request-id", b"theirs"),
        (b"x-kept", b"1"),
        (b"x-kept", b"2"),
    ]
    assert forwarded_headers(given, first_values(given), "ours") == [
        (b"x-kept", b"1"),
        (b"x-kept", b"2"),
        (b"accept-encoding", b"identity"),
        (b"x-request-id", b"ours"),
    ]
