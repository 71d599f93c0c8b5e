"""From an ASGI request to an `Exchange`: identity, body within its limits, the model it asks for."""

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from tokenmill.engine.gateway.api_error import ApiError, Headers, model_not_found
from tokenmill.engine.gateway.body import Body, check_utf8, parsed
from tokenmill.engine.gateway.form import Form, form_of, is_form
from tokenmill.engine.gateway.heads import without
from tokenmill.engine.gateway.pipeline import Exchange
from tokenmill.engine.gateway.settings import MOST_OF_A_NAME, Settings
from tokenmill.engine.gateway.upstream import forwarded_headers

Scope = MutableMapping[str, Any]
#: The first value of each header, by its name in lower case.
Fields = Mapping[bytes, bytes]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

#: A member of a scope: call it with a function that is to be called when the client hangs up before its answer is
#: written.
ON_HANGUP = "tokenmill.on_hangup"
#: A member of a scope: call it with status, headers and body of a whole answer instead of sending ASGI's two messages.
#: It does not wait for a client that takes nothing at the moment, but returns False, and nothing has been done.
ANSWER = "tokenmill.answer"
#: A member of a scope: call it to break the connection of an answer that has begun and will not come to its end, where
#: the application does not return at once. Of an answer that is whole it does nothing.
BREAK_OFF = "tokenmill.break_off"
#: How much of a body that is too long is read and dropped before the refusal, so that a client that sends it all
#: first reads the refusal and not a reset connection.
DRAINED = 4
#: A longer body takes a millisecond or more to put together.
JOINED_HERE_BYTES = 1 << 20

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_JSON = b"application/json"
_IDENTITY = b"identity"
_FLAGS = (None, b"false", b"true", b"null")
_CONTENT_TYPE = frozenset({b"content-type"})
#: Headers that say how a body is to be read.
_READ_BY = (b"content-type", b"content-encoding")


class ClientGoneError(Exception):
    """The client hung up."""


def request_id(fields: Fields) -> str:
    """The client's `x-request-id` where it is printable and short, or a new one."""
    said = fields.get(b"x-request-id")
    if said is not None and _REQUEST_ID.fullmatch(said):
        return said.decode("ascii")
    return random.randbytes(16).hex()


async def read_body(receive: Receive, fields: Fields, settings: Settings) -> bytes:
    """The request's whole body.

    Args:
        receive: ASGI's.
        fields: The request's headers, the first value of each.
        settings: Limits.

    Raises:
        ApiError: 413 when it is too long, 408 when the client pauses too long or is too slow in all.
        ClientGoneError: it hung up.
    """
    limit = settings.max_body_bytes
    if int(fields.get(b"content-length", 0)) > limit * DRAINED:
        raise _too_long(limit)
    try:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        first: bytes = message.get("body", b"")
        if not message.get("more_body"):
            if len(first) > limit:
                raise _too_long(limit)
            return first
        parts = [first]
        size = len(first)
        begun = time.monotonic()
        while message.get("more_body"):
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            part: bytes = message.get("body", b"")
            size += len(part)
            if size <= limit:
                parts.append(part)
            elif size > limit * DRAINED:
                break
            if time.monotonic() - begun > settings.body_timeout_s + size / settings.body_bytes_per_s:
                raise _too_slow(f"came at fewer than {settings.body_bytes_per_s} bytes a second")
    except TimeoutError:
        raise _too_slow(f"paused for more than {settings.body_timeout_s:g} s") from None
    if size > limit:
        raise _too_long(limit)
    # In a thread: that many bytes are joined without the interpreter, and other requests run meanwhile.
    return await asyncio.to_thread(b"".join, parts) if size > JOINED_HERE_BYTES else b"".join(parts)


def _too_slow(how: str) -> ApiError:
    return ApiError(408, f"The request body {how}.", code="timeout", headers=[(b"connection", b"close")])


def _too_long(limit: int) -> ApiError:
    return ApiError(
        413,
        f"The request body is longer than {limit} bytes.",
        code="request_too_large",
        headers=[(b"connection", b"close")],
    )


async def with_model(payload: bytes, model: str) -> bytes:
    """A body in JSON that asks for this model, whatever it asks for.

    Raises:
        ApiError: 400 when it is not a JSON object.
    """
    await check_utf8(payload)
    return (await parsed(payload)).with_fields({"model": model})


def _check_single(headers: Headers) -> None:
    """Refuses what says twice how the body is to be read: a backend might go by the other one."""
    names = [name for name, _ in headers]
    for name in _READ_BY:
        if names.count(name) > 1:
            raise ApiError(400, f"The request has two headers `{name.decode()}`; send one.", code="invalid_header")


async def exchange_of(scope: Scope, fields: Fields, payload: bytes, identity: str, started: float) -> Exchange:
    """The exchange of a request to a model.

    Args:
        scope: ASGI's.
        fields: The request's headers, the first value of each.
        payload: Its body.
        identity: Its id.
        started: When its head had arrived, by `time.perf_counter()`.

    Raises:
        ApiError: 400 when the body is not a JSON object (or a form that `form_of` takes), or `model` is not a string
            or `stream` no truth value; 404 when that is longer than `MOST_OF_A_NAME`; 415 when it is compressed.
    """
    headers: Headers = scope["headers"]
    body: Body | None = None
    form: Form | None = None
    kind = fields.get(b"content-type", b"")
    if len(fields) < len(headers):
        _check_single(headers)
    if is_form(kind):
        form = await form_of(payload, fields)
        model = form.model
    else:
        if fields.get(b"content-encoding", _IDENTITY) != _IDENTITY:
            # It is read as it is, and a backend might read something else.
            raise ApiError(
                415,
                "The request body has a `content-encoding`; send it as it is.",
                code="unsupported_encoding",
                headers=[(b"accept-encoding", _IDENTITY)],
            )
        await check_utf8(payload)
        body = await parsed(payload)
        model = body.get("model", str)
        if body.raw_field("stream") not in _FLAGS:
            # Some backends take a 1 or a "true" for it, and such a stream's tokens nobody would have asked for.
            body.get("stream", bool)
    if model is not None and len(model) > MOST_OF_A_NAME:
        raise model_not_found(model)
    if len(scope["path"]) > MOST_OF_A_NAME:
        raise ApiError(404, f"No path here is longer than {MOST_OF_A_NAME} characters.", code="not_found")
    exchange = Exchange(
        scope["path"],
        headers,
        payload,
        fields=fields,
        body=body,
        model=model,
        request_id=identity,
        forward=forwarded_headers(headers, fields, identity),
        query=scope["query_string"],
        started=started,
    )
    if form is not None:
        exchange.form = form
    elif kind and kind != _JSON:
        # It was read as JSON in UTF-8, as curl's `-d` means it; nobody may read it as a form, or in another charset,
        # after that.
        exchange.forward = [*without(exchange.forward, _CONTENT_TYPE), (b"content-type", _JSON)]
    return exchange
