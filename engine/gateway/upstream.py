"""The HTTP client towards the backends.

One aiohttp session per process. A request's cancellation closes its connection, which is what makes a server stop
generating; a finished answer's connection goes back to the pool.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from tokenmill.engine.gateway.api_error import Headers
from tokenmill.engine.gateway.settings import Settings

#: Idle connections to a backend are dropped before its own keep-alive ends (uvicorn, so vLLM: 5 s): a connection
#: that the backend closes just as a request is written to it would lose that request.
POOL_KEEP_ALIVE_S = 4.0
#: Request bodies above this are written in slices, waiting for the socket in between.
SLICE_BYTES = 256 * 1024

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
#: Not passed to a backend: it is another host, and answers that are read for accounting must come uncompressed.
_NOT_FORWARDED = HOP_BY_HOP | {b"host", b"accept-encoding", b"expect", b"x-request-id"}
#: Not passed to the client: the server writes its own.
_NOT_RETURNED = HOP_BY_HOP | {b"date"}
_ALL_AUTOMATIC = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")


class ConnectFailedError(Exception):
    """No connection to the backend: it has certainly not seen the request."""


class NoAnswerError(Exception):
    """The connection broke before the backend's answer began: it may have seen the request, it answered nothing."""


class SilenceError(Exception):
    """The backend was silent for longer than `read_timeout_s`."""


class CutError(Exception):
    """The backend broke off in the middle of its answer."""


def forwarded_headers(headers: Headers, request_id: str) -> list[tuple[str, str]]:
    """A client's headers as they go to a backend, with those that its `Connection` header names left out."""
    named: set[bytes] = set()
    for name, value in headers:
        if name == b"connection":
            named.update(token.strip().lower() for token in value.split(b","))
    kept = [
        (name.decode("latin-1"), value.decode("latin-1"))
        for name, value in headers
        if name not in _NOT_FORWARDED and name not in named
    ]
    kept.append(("accept-encoding", "identity"))
    kept.append(("x-request-id", request_id))
    return kept


class Answer:
    """A backend's answer whose head has arrived.

    Attributes:
        status: HTTP status.
        headers: Its headers that go on to the client, names in lower case.
        content_type: Its media type without parameters, in lower case.
    """

    __slots__ = ("_response", "content_type", "headers", "status")

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        named: frozenset[bytes] = frozenset()
        headers: Headers = []
        content_type = b""
        for key, value in response.raw_headers:
            name = key.lower()
            if name == b"content-type":
                content_type = value
            elif name == b"connection":
                named = frozenset(token.strip().lower() for token in value.split(b","))
            if name not in _NOT_RETURNED:
                headers.append((name, value))
        self.headers = [header for header in headers if header[0] not in named] if named else headers
        self.content_type = content_type.partition(b";")[0].strip().lower()

    async def read(self) -> bytes:
        """The whole body; raises `CutError` or `SilenceError`."""
        try:
            return await self._response.read()
        except TimeoutError:
            raise SilenceError from None
        except (aiohttp.ClientError, OSError):
            raise CutError from None

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body as it arrives, whatever has arrived at once; raises `CutError` or `SilenceError`."""
        readany = self._response.content.readany
        try:
            while chunk := await readany():
                yield chunk
        except TimeoutError:
            raise SilenceError from None
        except (aiohttp.ClientError, OSError):
            raise CutError from None

    def close(self) -> None:
        """Gives the connection back if the body was read to its end; closes it otherwise, which stops the backend."""
        self._response.close()


class Upstream:
    """The client. Create it inside a running event loop; `close` when done."""

    def __init__(self, settings: Settings) -> None:
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=settings.connect_timeout_s, sock_read=settings.read_timeout_s
        )
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=POOL_KEEP_ALIVE_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=_ALL_AUTOMATIC,
            max_line_size=64 * 1024,
            max_field_size=64 * 1024,
        )

    async def send(
        self,
        method: str,
        url: URL,
        headers: list[tuple[str, str]],
        body: bytes | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Answer:
        """Sends one request and returns when the head of its answer has arrived; follows no redirect.

        Args:
            method: HTTP method.
            url: Already encoded.
            headers: All headers but the framing.
            body: The body's bytes.
            timeout_s: Bound on the whole exchange, for probes.

        Raises:
            ConnectFailedError, NoAnswerError, SilenceError: as their names say.
        """
        fields = CIMultiDict(headers)
        data: bytes | AsyncIterator[bytes] | None = body
        if body is not None and len(body) > SLICE_BYTES:
            fields["content-length"] = str(len(body))
            data = _slices(body)
        timeout = self._timeout if timeout_s is None else aiohttp.ClientTimeout(total=timeout_s)
        try:
            response = await self._session.request(
                method, url, data=data, headers=fields, allow_redirects=False, timeout=timeout
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL):
            raise ConnectFailedError from None
        except TimeoutError:
            raise SilenceError from None
        except (aiohttp.ClientError, OSError, asyncio.IncompleteReadError):
            raise NoAnswerError from None
        return Answer(response)

    async def close(self) -> None:
        """Closes every connection."""
        await self._session.close()


async def _slices(body: bytes) -> AsyncIterator[bytes]:
    view = memoryview(body)
    for start in range(0, len(view), SLICE_BYTES):
        yield bytes(view[start : start + SLICE_BYTES])
