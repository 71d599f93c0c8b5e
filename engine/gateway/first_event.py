"""Streams that begin with an error: servers send the head, with status 200, before they know how it goes.

Of such a stream nothing has reached the client, so the request may go on elsewhere as after an error status. The
stream's first line says mostly enough; no other event is looked at, and no byte of it is changed.
"""

from typing import Any

import orjson

from tokenmill.engine.gateway import anthropic
from tokenmill.engine.gateway.api_error import JSON
from tokenmill.engine.gateway.pipeline import Reply
from tokenmill.engine.gateway.upstream import Answer

#: A longer beginning is none of an error.
_MOST_BYTES = 64 * 1024
#: Events that may come before the first one that says something.
_PINGS = frozenset({b"ping"})
_ERRORS = frozenset({b"error", b"response.failed", b"message"})
#: Where servers say what the status would have been: vLLM, SGLang, llama.cpp and OpenRouter; TGI.
_STATUSES = ("code", "http_status_code")
#: The words of those that state no status: OpenAI's, and TGI's kinds of error.
_WORDS = {
    **anthropic.STATUS,
    "api_error": 500,
    "server_error": 500,
    "internal_error": 500,
    "internal_server_error": 500,
    "internalservererror": 500,
    "service_unavailable": 503,
    "overloaded": 429,
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
    "timeout": 504,
}
#: An error that says nothing known: the client is told, and nobody else is asked.
_UNKNOWN = 400


async def error_in(answer: Answer) -> Reply | None:
    """The error that a stream of events begins with, as the answer that it would have been; None: it does not.

    Returns when that is known: with the first line, mostly. What has come stays there to be read.

    Raises:
        NoAnswerError, SilenceError: it broke off, or paused too long, before that.
    """
    while True:
        seen = answer.arrived()
        data = _first_data(seen)
        if data is not None or len(seen) > _MOST_BYTES:
            return _as_answer(data) if data else None
        if not await answer.more():
            data = _first_data(seen + b"\n")
            return _as_answer(data) if data else None


def _first_data(seen: bytes) -> bytes | None:
    """The data of a stream's first event if it may be an error, else nothing; None: it has not come yet."""
    at, skips, named = 0, False, False
    while (end := seen.find(b"\n", at)) >= 0:
        if seen.startswith(b"data:", at):
            if not skips:
                return seen[at + 5 : end] if seen.find(b'"error"', at, end) >= 0 or named else b""
        elif seen.startswith(b"event:", at):
            name = seen[at + 6 : end].strip()
            skips, named = name in _PINGS, name in _ERRORS
            if not skips and not named:
                return b""
        elif end - at <= 1:
            skips = False
        at = end + 1
    # Pings and comments keep a connection alive: they wait for nothing.
    return b"" if at and at == len(seen) and not named else None


def _as_answer(data: bytes) -> Reply | None:
    try:
        said: Any = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    error = _error(said) if isinstance(said, dict) else None
    if not error:
        return None
    return Reply(_status(error), [JSON], orjson.dumps({"error": error}))


def _error(said: dict[str, Any]) -> dict[str, Any] | None:
    """The error in an event, in OpenAI's shape; None or empty where it has none."""
    error = said.get("error")
    if said.get("type") == "response.failed" and isinstance(said.get("response"), dict):
        error = said["response"].get("error")
    elif not error and said.get("type") == "error":
        error = {name: value for name, value in said.items() if name != "type"}
    if isinstance(error, str):
        return {"message": error, "type": said.get("error_type")}
    return error if isinstance(error, dict) else None


def _status(error: dict[str, Any]) -> int:
    """What an error would have been as a status."""
    for name in _STATUSES:
        stated = str(error.get(name))
        if len(stated) == 3 and stated.isdecimal() and "400" <= stated < "600":
            return int(stated)
    words = [str(error.get(name)).lower() for name in ("code", "type")]
    return next((_WORDS[word] for word in words if word in _WORDS), _UNKNOWN)
