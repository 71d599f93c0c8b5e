"""One request on a client's connection and the answer to it: ASGI's `receive` and `send` on raw bytes."""

import asyncio
import http
import logging
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import TYPE_CHECKING, Any

from tokenmill.engine.gateway.heads import layout
from tokenmill.engine.gateway.request import ANSWER, BREAK_OFF, ON_HANGUP

if TYPE_CHECKING:
    from tokenmill.engine.gateway.protocol import GatewayProtocol

log = logging.getLogger("tokenmill.gateway")

Message = MutableMapping[str, Any]
Application = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]

#: A client is not read further while this much of its body waits to be taken, in bytes.
HIGH_WATER = 256 * 1024
#: What may stand in no header's value (RFC 9110, 5.5), tab aside.
_CONTROLS = bytes([*range(9), *range(10, 32), 127])


def _status_line(status: int) -> bytes:
    try:
        phrase = http.HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()


STATUS_LINES = {status: _status_line(status) for status in range(100, 600)}


class Cycle:
    """One request and its answer.

    Args:
        connection: Where it came from.
        scope: ASGI's.
        keep_alive: The connection serves more requests afterwards.
        expects: The client waits for `100 Continue` before it sends the body.

    Attributes:
        begun: The answer's head is written, or kept to be written with its body.
        more_body: The request's end has not arrived.
        complete: The answer is written.
    """

    __slots__ = (
        "_chunked",
        "_connection",
        "_expects",
        "_gone",
        "_head",
        "_left",
        "_open_ended",
        "_parts",
        "_size",
        "_taken",
        "_told",
        "_waiter",
        "begun",
        "complete",
        "keep_alive",
        "more_body",
        "scope",
    )

    def __init__(self, connection: "GatewayProtocol", scope: Message, keep_alive: bool, expects: bool) -> None:
        self._connection = connection
        self.scope = scope
        self.keep_alive = keep_alive
        self.more_body = True
        self.complete = False
        self._expects = expects
        self._gone = False
        self._told: Callable[[], None] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._parts: list[bytes] = []
        self._size = 0
        #: The application has the end of the body: what it may still hear of is the client's hang-up.
        self._taken = False
        self.begun = False
        self._chunked = False
        #: The answer ends with its connection: HTTP/1.0 knows no chunks.
        self._open_ended = False
        #: Bytes that a stated `content-length` still promises.
        self._left = 0
        #: An answer's head that is written together with its body.
        self._head = b""

    def on_hangup(self, tell: Callable[[], None]) -> None:
        """Has `tell()` called when the client hangs up before the answer is written."""
        self._told = tell
        if self._gone:
            tell()

    # What the connection calls.

    def feed(self, body: bytes) -> None:
        """A part of the request's body has arrived."""
        if not self.complete:
            self._parts.append(body)
            self._size += len(body)
            if self._size > HIGH_WATER:
                self._connection.pause_reading()
            self._wake()

    def end_of_body(self) -> None:
        """All of it has."""
        self.more_body = False
        self._wake()

    def lost(self) -> None:
        """The client hung up."""
        self._gone = True
        self._wake()
        if self._told is not None and not self.complete:
            self._told()

    async def run(self, application: Application) -> None:
        """Has the application answer."""
        try:
            await application(self.scope, self.receive, self.send)
        except asyncio.CancelledError:
            self._connection.close()
        except Exception:
            log.exception("a request failed")
            if self.begun:
                self._connection.close()
            else:
                await self._fail()
        else:
            if not self.begun and not self._gone:
                log.error("a request was not answered")
                await self._fail()
            else:
                self.break_off()
        finally:
            # It leads back here: nothing that a request leaves may need the collector.
            self.scope.pop(ON_HANGUP, None)
            self.scope.pop(ANSWER, None)
            self.scope.pop(BREAK_OFF, None)

    async def _fail(self) -> None:
        headers = [(b"content-length", b"0"), (b"connection", b"close")]
        await self.send({"type": "http.response.start", "status": 500, "headers": headers})
        await self.send({"type": "http.response.body"})

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # What the application calls.

    async def receive(self) -> Message:
        """See ASGI. A body that pauses for longer than `body_timeout_s` raises `TimeoutError`."""
        connection = self._connection
        if self._expects:
            self._expects = False
            connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while not (self._gone or self.complete or self._parts) and (self.more_body or self._taken):
            connection.read_on()
            self._waiter = connection.loop.create_future()
            try:
                if self._taken:
                    await self._waiter
                else:
                    async with asyncio.timeout(connection.settings.body_timeout_s):
                        await self._waiter
            finally:
                self._waiter = None
        if self._gone or self.complete:
            return {"type": "http.disconnect"}
        parts, self._parts = self._parts, []
        self._size = 0
        self._taken = not self.more_body
        connection.read_on()
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        return {"type": "http.request", "body": body, "more_body": self.more_body}

    async def send(self, message: Message) -> None:
        """See ASGI."""
        connection = self._connection
        if connection.writable is not None and not self._gone:
            await connection.writable
        if self._gone:
            return
        if self.begun:
            self._body(message.get("body", b""), message.get("more_body", False))
        else:
            self._begin(message["status"], message["headers"])

    def answer(self, status: int, headers: Collection[tuple[bytes, bytes]], body: bytes) -> bool:
        """The whole answer at once, without a coroutine and two messages for it; see `request.ANSWER`."""
        if self.begun or (self._connection.writable is not None and not self._gone):
            return False
        if not self._gone:
            self._begin(status, headers)
            self._body(body, False)
        return True

    def break_off(self) -> None:
        """Ends the connection of an answer that has begun: the client must see that it is not whole."""
        if self.begun and not self.complete and not self._gone:
            self._connection.close()

    def _begin(self, status: int, headers: Collection[tuple[bytes, bytes]]) -> None:
        """Writes the head, or keeps it to be written together with the body."""
        self.begun = True
        self._expects = False
        head = self._start(status, headers)
        if self._left:
            self._head = head
        else:
            self._connection.write(head)

    def _start(self, status: int, headers: Collection[tuple[bytes, bytes]]) -> bytes:
        """The head of the answer."""
        lines = [STATUS_LINES[status], self._connection.default_headers()]
        framed = closes = False
        if headers:
            names, values = zip(*headers, strict=True)
            template, framing = layout(names)
            for at, name in framing:
                value = values[at]
                if name == b"content-length" and not framed:
                    self._left = int(value)
                    framed = True
                elif name == b"transfer-encoding" and value.lower() == b"chunked":
                    self._chunked = framed = True
                elif name == b"connection" and b"close" in value.lower():
                    self.keep_alive = False
                    closes = True
            joined = b"".join(values)
            if len(joined.translate(None, _CONTROLS)) != len(joined):
                raise ValueError("a header's value holds control characters")
            lines.append(template % values)
        if not self.keep_alive and not closes:
            lines.append(b"connection: close\r\n")
        if self.scope["method"] == "HEAD":
            self._left = 0
            self._chunked = False
        elif not framed and status not in (204, 304):
            self._open_ended = self.scope.get("http_version") == "1.0"
            self._chunked = not self._open_ended
            if self._chunked:
                lines.append(b"transfer-encoding: chunked\r\n")
        lines.append(b"\r\n")
        return b"".join(lines)

    def _body(self, body: bytes, more: bool) -> None:
        if self.complete:
            raise RuntimeError("an answer goes on after its end")
        connection = self._connection
        if self._chunked:
            framed = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            connection.write(framed if more else framed + b"0\r\n\r\n")
        elif self._open_ended:
            connection.write(body)
        elif self.scope["method"] != "HEAD":
            self._left -= len(body)
            if self._left < 0 or (self._left and not more):
                raise RuntimeError("an answer is not as long as it says")
            head, self._head = self._head, b""
            connection.write(head + body if head else body)
        if not more:
            self.complete = True
            self._wake()
            connection.answered(self)
