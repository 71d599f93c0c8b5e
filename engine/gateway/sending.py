"""A reply on its way to the client: whole, or as a stream that is watched while it passes."""

import contextlib
import time
from typing import Any

import orjson

from tokenmill.engine.gateway import anthropic
from tokenmill.engine.gateway.api_error import EVENT_STREAM_TYPE, JSON, ApiError, Headers
from tokenmill.engine.gateway.connection import CutError, SilenceError
from tokenmill.engine.gateway.heads import without
from tokenmill.engine.gateway.pipeline import Exchange, Outcome, Reply
from tokenmill.engine.gateway.request import ANSWER, Scope, Send
from tokenmill.engine.gateway.settings import Settings

_REQUEST_ID = frozenset({b"x-request-id"})


def json_reply(content: dict[str, Any], status: int = 200, headers: Headers | None = None) -> Reply:
    """An answer of the gateway's own."""
    return Reply(status, [JSON, *(headers or [])], orjson.dumps(content))


def error_reply(error: ApiError, path: str) -> Reply:
    """An error in the shape that clients of this path read."""
    return Reply(error.status, [JSON, *error.headers], _error_body(error, path))


def _head(reply: Reply, identity: str) -> Headers:
    """The reply's headers with the request's id; a backend's own id goes on under another name."""
    ours = identity.encode()
    head = without(reply.headers, _REQUEST_ID)
    if len(head) < len(reply.headers):
        others = [value for name, value in reply.headers if name == b"x-request-id" and value != ours]
        head += [(b"x-upstream-request-id", value) for value in others]
    head.append((b"x-request-id", ours))
    return head


async def send_whole(scope: Scope, send: Send, reply: Reply, identity: str) -> None:
    """Sends an answer that is no stream."""
    body = reply.body or b""
    head = _head(reply, identity)
    if reply.status != 204:
        head.append((b"content-length", str(len(body)).encode()))
    if not scope[ANSWER](reply.status, head, body):
        await send({"type": "http.response.start", "status": reply.status, "headers": head})
        await send({"type": "http.response.body", "body": body})


async def send_stream(send: Send, reply: Reply, exchange: Exchange, settings: Settings) -> Outcome:
    """Relays a stream's bytes as they come. A broken one ends with an error event and a broken connection."""
    assert reply.chunks is not None
    head = _head(reply, exchange.request_id)
    await send({"type": "http.response.start", "status": reply.status, "headers": head})
    broken: ApiError | None = None
    chunk = b""
    async with contextlib.aclosing(reply.chunks) as chunks:
        try:
            async for chunk in chunks:
                exchange.last_chunk_at = now = time.perf_counter()
                if not exchange.first_chunk_at:
                    exchange.first_chunk_at = now
                for tap in exchange.taps:
                    tap(chunk)
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except CutError:
            broken = ApiError(502, "The backend broke off in the middle of its answer.", code="upstream_cut")
        except SilenceError:
            target = exchange.target
            silence_s = settings.read_timeout_s if target is None else target.longest_silence_s
            silence = f"The backend was silent for {silence_s:g} s."
            broken = ApiError(504, silence, code="timeout")
    if broken is None:
        await send({"type": "http.response.body", "body": b""})
        return "ok"
    if any(name == b"content-type" and value.startswith(EVENT_STREAM_TYPE) for name, value in head):
        gap = b"" if not chunk or chunk.endswith(b"\n\n") else b"\n\n"
        last = gap + _error_event(broken, exchange.endpoint)
        await send({"type": "http.response.body", "body": last, "more_body": True})
    # Returning before the end of the reply makes the server break the connection.
    return "cut"


def _error_body(error: ApiError, endpoint: str) -> bytes:
    """The body of an error, in the shape that clients of this endpoint read."""
    return anthropic.own_error(error) if endpoint in anthropic.OWN_PATHS else error.body()


def _error_event(error: ApiError, endpoint: str) -> bytes:
    """A server-sent event that ends a broken stream; OpenAI's client raises `APIError` on it.

    Anthropic's passes over events without a name.
    """
    name = b"event: error\n" if endpoint in anthropic.OWN_PATHS else b""
    return name + b"data: " + _error_body(error, endpoint) + b"\n\n"
