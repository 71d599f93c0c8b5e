"""The HTTP client towards the backends: which headers pass, a pool of connections, timeouts.

Closing an answer before its end closes its connection, which is what makes a server stop generating; a finished
answer's connection goes back to the pool.
"""

import asyncio
import contextlib
import errno
import os
import socket
import ssl
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tokenmill.engine.gateway.api_error import Headers
from tokenmill.engine.gateway.connection import ConnectFailedError, Connection, NoAnswerError, SilenceError
from tokenmill.engine.gateway.heads import first_values, lines, without
from tokenmill.engine.gateway.names import Names
from tokenmill.engine.gateway.settings import Settings

#: Idle connections to a backend are dropped before its own keep-alive ends (uvicorn, so vLLM: 5 s): a connection
#: that the backend closes just as a request is written to it would lose that request.
POOL_KEEP_ALIVE_S = 4.0
#: A backend may close one sooner. Where a connection that was idle for so long ends without a byte, it had been closed
#: before the request came, and that goes out again. (Of busy ones no backend tires: there it is the request.)
_MAY_BE_CLOSED_S = 1.5
#: That shows after one way there and back. One that ends later had taken the request, and died of it perhaps.
_SHOWS_WITHIN_S = 1.0

#: Headers that belong to one connection or to the framing, never passed on in either direction.
HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"content-length",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
#: What a browser tells a server of a page of another origin: it is the gateway that this page asks.
_BROWSERS = frozenset({b"origin", b"access-control-request-method", b"access-control-request-headers"})
#: Not passed to a backend: it is another host, and answers that are read for accounting must come uncompressed.
_NOT_FORWARDED = HOP_BY_HOP | _BROWSERS | {b"host", b"accept-encoding", b"expect", b"x-request-id"}
#: What a gateway says of an answer. A backend that is one says it of its own tiers and keys, and any may pretend to.
_GATEWAYS = frozenset(
    f"x-tokenmill-{name}".encode()
    for name in ("tier", "backend", "version", "reason", "confidence", "escalated", "fallback", "cost", "key-spend")
)
#: What a server tells a browser: whose pages may read an answer is the gateway's to say.
_OPENINGS = frozenset(
    f"access-control-{name}".encode()
    for name in ("allow-origin", "allow-credentials", "allow-headers", "allow-methods", "expose-headers", "max-age")
)
#: What a server says of its own host, and a browser or a client's cookie jar would keep of the gateway's.
_OF_A_HOST = frozenset(
    {
        *(b"set-cookie", b"set-cookie2", b"alt-svc", b"strict-transport-security", b"public-key-pins", b"expect-ct"),
        *(b"nel", b"report-to", b"reporting-endpoints", b"clear-site-data", b"accept-ch", b"critical-ch"),
        *(b"service-worker-allowed", b"location", b"content-location", b"refresh", b"link"),
    }
)
#: What a proxy in front of the gateway (nginx, Apache, lighttpd) would obey: which of its files to send, whom to ask.
_TO_PROXIES = frozenset(
    {
        *(b"x-accel-redirect", b"x-accel-expires", b"x-accel-limit-rate", b"x-accel-charset"),
        *(b"x-sendfile", b"x-lighttpd-send-file", b"x-reproxy-url", b"x-reproxy-file", b"surrogate-control"),
    }
)
#: Not passed to the client: the server writes its own.
_NOT_RETURNED = HOP_BY_HOP | _GATEWAYS | _OPENINGS | _OF_A_HOST | _TO_PROXIES | {b"date"}


def forwarded_headers(headers: Headers, fields: Mapping[bytes, bytes], request_id: str) -> Headers:
    """A client's headers as they go to a backend, without those that its `Connection` header names.

    Args:
        headers: All of them.
        fields: The first value of each.
        request_id: The request's id here.
    """
    kept = without(headers, _NOT_FORWARDED)
    if b"connection" in fields:
        values = [value for name, value in headers if name == b"connection"]
        named = frozenset(token.strip().lower() for value in values for token in value.split(b","))
        kept = without(kept, named)
    kept.append((b"accept-encoding", b"identity"))
    kept.append((b"x-request-id", request_id.encode()))
    return kept


@dataclass(frozen=True, eq=False)
class Origin:
    """Where connections go; each has a pool of its own.

    Attributes:
        host: Name or address.
        port: TCP port.
        tls: Whether the connection is encrypted.
        authority: What the `Host` header says.
        prefix: Path before every request's own.
        has_version: The prefix names a version: a request's own path follows without its `/v1`.
        longest_silence_s: How long it may be silent; None: `Settings.read_timeout_s`.
    """

    host: str
    port: int
    tls: bool
    authority: bytes
    prefix: bytes
    has_version: bool = False
    longest_silence_s: float | None = None

    @classmethod
    def of(cls, root: str, has_version: bool = False, longest_silence_s: float | None = None) -> "Origin":
        """The origin of `http(s)://host[:port][/prefix]`."""
        parts = urlsplit(root)
        tls = parts.scheme == "https"
        authority = parts.netloc.rpartition("@")[2].encode("idna")
        port = parts.port or (443 if tls else 80)
        prefix = parts.path.encode()
        return cls(parts.hostname or "", port, tls, authority, prefix, has_version, longest_silence_s)


def _why(error: Exception, limit_s: float) -> str:
    """Why there is no connection, in a few words."""
    if isinstance(error, TimeoutError):
        return f"no connection within {limit_s:g} s"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return "it speaks no TLS that is understood"
    if isinstance(error, socket.gaierror | UnicodeError):
        return "its name cannot be resolved"
    number = (error.errno if isinstance(error, OSError) else None) or errno.ECONNREFUSED
    return os.strerror(number).lower()


class Answer:
    """A backend's answer whose head has arrived.

    Attributes:
        status: HTTP status.
        headers: Its headers that go on to the client, names in lower case.
        content_type: Its media type without parameters, in lower case.
    """

    __slots__ = ("_connection", "_upstream", "begun", "content_type", "headers", "next_chunk", "read", "status")

    def __init__(self, connection: Connection, upstream: "Upstream", origin: Origin) -> None:
        self._connection: Connection | None = connection
        self._upstream = (upstream, origin)
        self.status = connection.status
        #: Returns when the body has begun; raises `NoAnswerError` or `SilenceError`.
        self.begun = connection.begun
        #: The whole body; raises `CutError` or `SilenceError`.
        self.read = connection.read_whole
        #: The next bytes of the body as they arrive, empty at its end; raises the same.
        self.next_chunk = connection.read
        self.headers = without(connection.headers, _NOT_RETURNED)
        content_type = first_values(self.headers).get(b"content-type", b"")
        self.content_type = content_type.partition(b";")[0].strip().lower()

    def arrived(self) -> bytes:
        """What has come of the body and was not read yet; it stays to be read."""
        return b"" if self._connection is None else self._connection.arrived()

    async def more(self) -> bool:
        """Returns when more of it has come, or False at its end; raises `NoAnswerError` or `SilenceError`."""
        return self._connection is not None and await self._connection.more()

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body as it arrives; raises `CutError` or `SilenceError`."""
        while chunk := await self.next_chunk():
            yield chunk

    def close(self) -> None:
        """Gives the connection back if the body was read to its end; closes it otherwise, which stops the backend."""
        connection, self._connection = self._connection, None
        if connection is not None:
            upstream, origin = self._upstream
            upstream.give_back(connection, origin)


class Upstream:
    """The client. Create it inside a running event loop; `close` when done.

    Args:
        settings: Timeouts.
    """

    def __init__(self, settings: Settings) -> None:
        self._loop = asyncio.get_running_loop()
        self._settings = settings
        self._idle: dict[Origin, list[Connection]] = {}
        self._active: set[Connection] = set()
        self._tls: ssl.SSLContext | None = None
        self._names = Names()
        self._sweeper = self._loop.create_task(self._sweep())

    async def send(
        self, method: bytes, origin: Origin, path: bytes, headers: Headers, body: bytes | bytearray | None = None
    ) -> Answer:
        """Sends one request and returns when the head of its answer has arrived; follows no redirect.

        A connection from the pool that the backend was just closing is replaced by a new one, once.

        Args:
            method: HTTP method.
            origin: Where to.
            path: Path below the origin's prefix, with the query, encoded.
            headers: All headers but `Host` and the framing.
            body: The body's bytes.

        Raises:
            ConnectFailedError, NoAnswerError, SilenceError: as their names say.
        """
        if origin.has_version:
            path = path.removeprefix(b"/v1")
        end = b"\r\n" if body is None else b"content-length: %d\r\n\r\n" % len(body)
        begin = (method, b" ", origin.prefix, path, b" HTTP/1.1\r\nhost: ", origin.authority, b"\r\n")
        head = b"".join((*begin, lines(headers), end))
        connection = self._pooled(origin)
        if connection is not None:
            sent_at = self._loop.time()
            try:
                return await self._answer(connection, origin, head, body)
            except NoAnswerError:
                was_busy = sent_at - connection.idle_since < _MAY_BE_CLOSED_S
                if was_busy or not connection.unheard or self._loop.time() - sent_at > _SHOWS_WITHIN_S:
                    raise
        return await self._answer(await self._connect(origin), origin, head, body)

    async def _answer(
        self, connection: Connection, origin: Origin, head: bytes, body: bytes | bytearray | None
    ) -> Answer:
        """The head of the answer to one request on one connection."""
        self._active.add(connection)
        try:
            await connection.request(head, body)
        except BaseException:
            self._active.discard(connection)
            connection.abort()
            raise
        return Answer(connection, self, origin)

    def give_back(self, connection: Connection, origin: Origin) -> None:
        """An answer was closed: its connection goes to the pool or, not read to its end, away."""
        self._active.discard(connection)
        if connection.reusable() and not self._sweeper.done():
            connection.idle_since = self._loop.time()
            self._idle.setdefault(origin, []).append(connection)
        else:
            connection.abort()

    async def close(self) -> None:
        """Closes every connection."""
        self._sweeper.cancel()
        for connection in [*self._active, *(one for idle in self._idle.values() for one in idle)]:
            connection.abort()
        self._idle.clear()
        await asyncio.sleep(0)

    def _pooled(self, origin: Origin) -> Connection | None:
        """The connection that was used last, which is the least likely to be closed by the backend."""
        idle = self._idle.get(origin)
        while idle:
            connection = idle.pop()
            if connection.usable and self._loop.time() - connection.idle_since < POOL_KEEP_ALIVE_S:
                return connection
            connection.abort()
        return None

    async def _connect(self, origin: Origin) -> Connection:
        if origin.tls and self._tls is None:
            self._tls = ssl.create_default_context()
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                connection = await self._connect_to(origin, await self._names.addresses(origin.host))
        except (OSError, UnicodeError) as error:
            raise ConnectFailedError(_why(error, self._settings.connect_timeout_s)) from None
        connection.longest_silence_s = origin.longest_silence_s
        return connection

    async def _connect_to(self, origin: Origin, addresses: list[str]) -> Connection:
        """Tries one after the other; the last one was the last hope."""
        tls: dict[str, Any] = {"ssl": self._tls, "server_hostname": origin.host} if origin.tls else {}
        for address in addresses[:-1]:
            with contextlib.suppress(OSError):
                return (await self._loop.create_connection(self._new, address, origin.port, **tls))[1]
        return (await self._loop.create_connection(self._new, addresses[-1], origin.port, **tls))[1]

    def _new(self) -> Connection:
        return Connection(self._loop)

    async def _sweep(self) -> None:
        """Ends answers that have been silent for too long, and idle connections: cheaper than a timer for each."""
        limit = self._settings.read_timeout_s
        while True:
            await asyncio.sleep(max(0.01, min(1.0, limit / 4)))
            now = self._loop.time()
            for connection in [one for one in self._active if one.waits]:
                if now - connection.active_at > (connection.longest_silence_s or limit):
                    connection.fail(SilenceError)
            for idle in self._idle.values():
                stale = [one for one in idle if not one.usable or now - one.idle_since > POOL_KEEP_ALIVE_S]
                for connection in stale:
                    idle.remove(connection)
                    connection.abort()
