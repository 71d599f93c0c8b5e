"""Web pages of other origins that may use the API from a browser (the Fetch standard, "CORS protocol").

A browser keeps an answer from a page of another origin, and asks beforehand whether it may send a key, unless the
server says that it may. Only what takes a key in a header is opened; cookies never count.
"""

from collections.abc import Awaitable, Callable, Collection, Sequence

from tokenmill.engine.gateway.api_error import Header, Headers
from tokenmill.engine.gateway.heads import first_values
from tokenmill.engine.gateway.request import ANSWER, Receive, Scope, Send

#: Any page may.
ANY = "*"
#: Seconds for which a browser remembers that it may.
_REMEMBERED_S = 600
_METHODS: Header = (b"access-control-allow-methods", b"GET, HEAD, POST, DELETE, OPTIONS")


def encoded(origins: Collection[str]) -> frozenset[bytes]:
    """Origins as they stand in headers."""
    return frozenset(origin.encode() for origin in origins)


def told(origins: Collection[bytes], origin: bytes | None) -> Headers:
    """What every answer says where some origins may read them, the one that asked perhaps among them.

    Also to others: who keeps an answer for later must not show it to one that it does not name.

    Args:
        origins: Those that may.
        origin: The one that asks; None: none does.
    """
    if ANY.encode() in origins:
        return [(b"access-control-allow-origin", b"*")] if origin is not None else []
    vary: Header = (b"vary", b"origin")
    return [(b"access-control-allow-origin", origin), vary] if origin is not None and origin in origins else [vary]


class Cors:
    """Tells browsers what pages of these origins may do.

    Args:
        origins: `scheme://host[:port]` of each, or `*` for every page.
        application: Answers the requests.
    """

    def __init__(self, origins: Sequence[str], application: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._any = ANY in origins
        self._origins = encoded(origins)
        self._application = application

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """See ASGI."""
        fields = first_values(scope["headers"])
        origin = fields.get(b"origin")
        allowed = told(self._origins, origin)
        if origin is None or not (self._any or origin in self._origins):
            return self._application(scope, receive, _with(allowed, scope, send) if allowed else send)
        if scope["method"] == "OPTIONS" and b"access-control-request-method" in fields:
            allowed += (_METHODS, (b"access-control-max-age", b"%d" % _REMEMBERED_S))
            asked = fields.get(b"access-control-request-headers")
            if asked:
                # `*` would not cover `Authorization`.
                allowed.append((b"access-control-allow-headers", asked))
            return _preflight(send, allowed)
        allowed.append((b"access-control-expose-headers", b"*"))
        return self._application(scope, receive, _with(allowed, scope, send))


async def _preflight(send: Send, headers: Headers) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def _with(more: Headers, scope: Scope, send: Send) -> Send:
    """Has every answer say more."""
    answer: Callable[[int, Collection[Header], bytes], bool] = scope[ANSWER]

    def answer_more(status: int, headers: Collection[Header], body: bytes) -> bool:
        return answer(status, [*headers, *more], body)

    def send_more(message: Scope) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *more]}
        return send(message)

    scope[ANSWER] = answer_more
    return send_more
