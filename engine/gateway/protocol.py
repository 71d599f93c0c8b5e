"""HTTP/1.1 towards the clients: a protocol for uvicorn's server on httptools' parser, with limits on a request's head.

uvicorn's own protocol searches every header of every answer twice and keeps timers, an event, a buffer and a copy for
each request; where a backend answers at once that is a third of all that the gateway does. Beyond ASGI, a scope has
`request.ON_HANGUP`, which says at once when the client has gone, and `request.ANSWER`, which takes an answer whole.
"""

import asyncio
import fcntl
import functools
import operator
import re
import sys
import termios
from collections import deque
from typing import Any, cast
from urllib.parse import unquote

import httptools
import uvicorn
from uvicorn.server import ServerState

from tokenmill.engine.gateway import cors
from tokenmill.engine.gateway.api_error import ApiError, Headers
from tokenmill.engine.gateway.cycle import STATUS_LINES, Cycle
from tokenmill.engine.gateway.heads import lines
from tokenmill.engine.gateway.request import ANSWER, BREAK_OFF, ON_HANGUP
from tokenmill.engine.gateway.settings import Settings

_ASGI = {"version": "3.0", "spec_version": "2.3"}
_name_of = operator.itemgetter(0)
#: Most header fields of a request. Sets of names are remembered (`heads`), and whoever it is may send any.
MOST_FIELDS = 128
#: Longest target that is remembered.
_SHORT_TARGET = 1024
_EXPECTATION = re.compile(rb"100-continue", re.IGNORECASE)


@functools.lru_cache(maxsize=256)
def _parsed(target: bytes) -> tuple[str, bytes, bytes]:
    """(path, its raw form, query) of a request's target.

    Raises:
        HttpParserInvalidURLError: It is none.
    """
    url = httptools.parse_url(target)
    raw: bytes = url.path or b""
    path = raw.decode("ascii")
    return unquote(path) if "%" in path else path, raw, url.query or b""


def _head_size(target: bytes, headers: Headers) -> int:
    return len(target) + sum(len(name) + len(value) + 4 for name, value in headers)


class GatewayProtocol(asyncio.Protocol):
    """One client connection.

    Args:
        config, server_state, app_state: uvicorn's.

    Attributes:
        settings: Limits.
        loop: The event loop.
        writable: Done when the client takes more; None: it does now.
    """

    settings = Settings()
    _dated: tuple[list[tuple[bytes, bytes]], bytes] = ([], b"")

    def __init__(
        self, config: uvicorn.Config, server_state: ServerState, app_state: dict[str, Any], _loop: object = None
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self._application = config.loaded_app
        self._state = server_state
        self._app_state = app_state
        self._parser = self._new_parser()
        self._transport: asyncio.Transport = None  # type: ignore[assignment]
        self._addresses: tuple[Any, Any] = (None, None)
        self.writable: asyncio.Future[None] | None = None
        self._paused = False
        #: The request that is being answered, and those that came meanwhile.
        self._running: Cycle | None = None
        self._waiting: deque[Cycle] = deque()
        #: The request whose body is arriving.
        self._arriving: Cycle | None = None
        self._target = b""
        self._headers: Headers = []
        self._in_head = False
        #: Bytes received since the head began, the feed in which it began counted whole.
        self._head_bytes = 0
        #: Bytes received since the last one of a head or a body: framing and trailers.
        self._barren_bytes = 0
        #: When the connection is closed unless something happens; None: it is not.
        self._deadline: float | None = None
        self._deadline_is_heads = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        #: No request is taken after the next one.
        self._retires = False
        #: Looks whether a client that takes nothing more for now has taken something.
        self._stall: asyncio.TimerHandle | None = None

    # What a cycle asks for.

    def write(self, data: bytes) -> None:
        """Writes to the client."""
        self._transport.write(data)

    def close(self) -> None:
        """Ends the connection once everything is written."""
        self._transport.close()

    def pause_reading(self) -> None:
        """Reads no further."""
        if not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def read_on(self) -> None:
        """Reads on, unless requests that came ahead of their turn wait."""
        if self._paused and not self._waiting:
            self._paused = False
            self._transport.resume_reading()

    def default_headers(self) -> bytes:
        """Headers of every answer: the date. The server makes a new list of them every second."""
        headers, lines = self._dated
        if headers is not self._state.default_headers:
            headers = self._state.default_headers
            lines = b"".join(b"%b: %b\r\n" % header for header in headers)
            type(self)._dated = (headers, lines)
        return lines

    def answered(self, cycle: Cycle) -> None:
        """An answer is written: the next request's turn."""
        self._state.total_requests += 1
        self._running = None
        if not cycle.keep_alive:
            self._transport.close()
        if self._transport.is_closing():
            return
        if self._waiting:
            self._start(self._waiting.popleft())
        self.read_on()
        if self._running is None and not self._in_head:
            self._expect(self.settings.keep_alive_s)

    # What the server calls.

    def retire(self) -> None:
        """Has the next answer say that it is the last; who asks for nothing is not hurried."""
        self._retires = True

    def shutdown(self) -> None:
        """Closes as soon as nothing is being answered."""
        if self._running is None:
            self._transport.close()
        else:
            self._running.keep_alive = False

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self._transport = cast("asyncio.Transport", transport)
        self._addresses = (_address(transport, "sockname"), _address(transport, "peername"))
        self._state.connections.add(self)  # type: ignore[arg-type]
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._state.connections.discard(self)
        self._deadline = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._waiting.clear()
        self.resume_writing()
        running, self._running, self._arriving = self._running, None, None
        if running is not None:
            running.lost()
        # It holds our methods: as long as we hold it, only the collector could free the two.
        del self._parser

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        self._head_bytes = self._head_bytes + len(data) if self._in_head else len(data)
        self._barren_bytes += len(data)
        try:
            self._parse(data)
        except httptools.HttpParserError:
            if not self._transport.is_closing():
                self._refuse(ApiError(400, "Invalid HTTP request received.", code="invalid_http"))
            return
        if self._arriving is not None and self._barren_bytes > self.settings.max_header_bytes:
            # The parser keeps a line until its end, however long, and there may be any number of trailers.
            limit = self.settings.max_header_bytes
            text = f"The framing and trailers of the request's body are longer than {limit} bytes."
            self._refuse(ApiError(431, text, code="headers_too_large"))
            return
        if self._in_head or self._running is None:
            if self._transport.is_closing():
                return
            if self._in_head and self._head_bytes > self.settings.max_header_bytes:
                self._refuse_head()
            elif not self._deadline_is_heads and (self._in_head or self._arriving is None):
                self._expect_head()

    def pause_writing(self) -> None:
        """See asyncio."""
        if self.writable is None:
            self.writable = self.loop.create_future()
            self._await_progress(0)

    def resume_writing(self) -> None:
        """See asyncio."""
        writable, self.writable = self.writable, None
        if writable is not None and not writable.done():
            writable.set_result(None)
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _await_progress(self, before: int) -> None:
        """Cuts off a client that takes nothing: it holds a place at a backend.

        Args:
            before: Bytes that waited for it when it was looked at last; 0: it was not.
        """
        waiting = self._transport.get_write_buffer_size() + _in_kernel(self._transport)
        if before and waiting >= before:
            self._transport.abort()
        else:
            self._stall = self.loop.call_later(self.settings.stall_timeout_s, self._await_progress, waiting)

    # What the parser calls.

    def on_message_begin(self) -> None:
        """See httptools."""
        self._in_head = True
        self._target = b""
        self._headers = []

    def on_url(self, url: bytes) -> None:
        """See httptools."""
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """See httptools. Trailers are dropped: nobody may say after the body what counts before it."""
        if self._in_head:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """See httptools."""
        self._in_head = False
        self._barren_bytes = 0
        if self._parser.should_upgrade():
            if self._parser.get_method() == b"CONNECT":
                raise ValueError("nobody is connected to elsewhere")  # the parser refuses the request
            return  # see `_parse`
        self._deadline = None
        self._deadline_is_heads = False
        target, headers, parser = self._target, self._headers, self._parser
        limit = self.settings.max_header_bytes
        # The count may hold body bytes that came with the head: look at the head itself.
        if self._head_bytes > limit and _head_size(target, headers) > limit:
            self._refuse_head()
            return
        if len(headers) > MOST_FIELDS:
            self._refuse(ApiError(431, f"The request has more than {MOST_FIELDS} headers.", code="headers_too_large"))
            return
        path, raw_path, query = _parsed(target) if len(target) <= _SHORT_TARGET else _parsed.__wrapped__(target)
        version = parser.get_http_version()
        server, client = self._addresses
        scope = {
            "type": "http",
            "asgi": _ASGI,
            "http_version": version,
            "method": parser.get_method().decode("ascii"),
            "scheme": "http",
            "path": path,
            "raw_path": raw_path,
            "query_string": query,
            "root_path": "",
            "headers": headers,
            "server": server,
            "client": client,
            "state": self._app_state.copy(),
        }
        keep_alive = version != "1.0" and parser.should_keep_alive() and not self._retires
        cycle = Cycle(self, scope, keep_alive, version != "1.0" and _expects(headers))
        scope[ON_HANGUP] = cycle.on_hangup
        scope[ANSWER] = cycle.answer
        scope[BREAK_OFF] = cycle.break_off
        self._arriving = cycle
        if self._running is None:
            self._start(cycle)
        else:
            self.pause_reading()
            self._waiting.append(cycle)

    def on_body(self, body: bytes) -> None:
        """See httptools."""
        self._barren_bytes = 0
        if self._arriving is not None:
            self._arriving.feed(body)

    def on_message_complete(self) -> None:
        """See httptools."""
        arrived, self._arriving = self._arriving, None
        if arrived is not None:
            arrived.end_of_body()

    def _new_parser(self) -> httptools.HttpRequestParser:
        parser = httptools.HttpRequestParser(self)
        # What follows a request that ends the connection is not looked at.
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return parser

    def _parse(self, data: bytes) -> None:
        """Has the parser read on. A request that asks for another protocol is answered as if it had not.

        The parser takes what follows such a head for that protocol, also the body, and it cannot be told otherwise: it
        gets the head again without the wish. (Java's client asks for HTTP/2 in its first request, with a body.)
        """
        while True:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                kept = [header for header in self._headers if header[0] != b"upgrade"]
                begin = (self._parser.get_method(), self._target, self._parser.get_http_version().encode())
                self._parser = self._new_parser()
                data = b"%b %b HTTP/%b\r\n%b\r\n" % (*begin, lines(kept)) + data[upgrade.args[0] :]
            else:
                return

    def _start(self, cycle: Cycle) -> None:
        self._running = cycle
        tasks = self._state.tasks
        task = self.loop.create_task(cycle.run(self._application))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def _expect_head(self) -> None:
        self._deadline_is_heads = True
        self._expect(self.settings.header_timeout_s)

    def _expect(self, seconds: float) -> None:
        """Closes the connection after so long. Timers cost more than the time: one is kept and looks for itself."""
        self._deadline = deadline = self.loop.time() + seconds
        if self._timer is None or self._timer_at > deadline:
            self._arm(deadline)

    def _arm(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = self.loop.call_at(at, self._look)

    def _look(self) -> None:
        self._timer = None
        deadline = self._deadline
        if deadline is None or self._transport.is_closing():
            return
        if deadline <= self.loop.time() + 0.001:
            self._transport.close()
        else:
            self._arm(deadline)

    def _refuse_head(self) -> None:
        limit = self.settings.max_header_bytes
        self._refuse(ApiError(431, f"The request head is longer than {limit} bytes.", code="headers_too_large"))

    def _refuse(self, error: ApiError) -> None:
        """Answers outside of any request and closes; says nothing in the middle of another answer."""
        if self._running is not None and self._running.begun:
            self._transport.close()
            return
        body = error.body()
        head = STATUS_LINES[error.status] + b"content-type: application/json\r\nconnection: close\r\n"
        if self.settings.allowed_origins:
            # A page of theirs is to read what is wrong, as far as the head said whose request it is.
            origin = next((value for name, value in self._headers if name == b"origin"), None)
            head += lines(cors.told(cors.encoded(self.settings.allowed_origins), origin))
        self._transport.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        self._transport.close()


def _in_kernel(transport: asyncio.Transport) -> int:
    """Bytes that the system holds for the client: it takes no more from us before it is rid of many of them."""
    descriptor = transport.get_extra_info("socket").fileno()
    return int.from_bytes(fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def _expects(headers: Headers) -> bool:
    """Whether the client waits to be asked for the body; one of HTTP/1.0 knows no such answer."""
    if b"expect" not in map(_name_of, headers):
        return False
    return any(name == b"expect" and _EXPECTATION.fullmatch(value) for name, value in headers)


def protocol_class(settings: Settings) -> type[GatewayProtocol]:
    """A protocol class for `uvicorn.Config(http=...)` that holds these limits."""
    return type("LimitedProtocol", (GatewayProtocol,), {"settings": settings})


def _address(transport: asyncio.BaseTransport, name: str) -> tuple[str, int | None] | None:
    found = transport.get_extra_info(name)
    return (str(found[0]), int(found[1])) if isinstance(found, (tuple, list)) else None
