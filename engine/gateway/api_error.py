"""Errors in the shape of the OpenAI API: `{"error": {"message", "type", "param", "code"}}`.

A stage or an endpoint raises `ApiError`; `app` renders it. Texts say what was found and what to do about it, and
never more of the client's own bytes than `quote` lets through.
"""

from typing import Any

import orjson

Header = tuple[bytes, bytes]
Headers = list[Header]
JSON: Header = (b"content-type", b"application/json")
EVENT_STREAM_TYPE = b"text/event-stream"
EVENT_STREAM: Header = (b"content-type", EVENT_STREAM_TYPE + b"; charset=utf-8")

#: `error.type` by status, as OpenAI names them.
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status, 4xx or 5xx.
        message: One line for people.
        code: Stable word for programs, e.g. `model_not_found`.
        param: The request field at fault.
        kind: `error.type`; None: by status.
        headers: More response headers, e.g. `Retry-After`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        kind: str | None = None,
        headers: Headers | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.kind = kind or _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.headers = headers or []

    def body(self) -> bytes:
        """The response body."""
        return orjson.dumps({"error": self.error()})

    def error(self) -> dict[str, Any]:
        """The error object alone."""
        return {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}


class UntranslatableError(ApiError):
    """400: the API of this backend cannot do what is asked for; a backend with another might."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(400, message, code="unsupported_value", param=param)


def quote(text: str, limit: int = 100) -> str:
    """A client's text fit to be repeated in a message: printable, at most `limit` characters."""
    shown = text if len(text) <= limit else text[:limit] + "..."
    return "".join(character if character.isprintable() else "?" for character in shown)


def retry_after(seconds: float) -> tuple[bytes, bytes]:
    """A `Retry-After` header of whole seconds, at least 1."""
    return b"retry-after", str(max(1, round(seconds))).encode()


def invalid_json(detail: str) -> ApiError:
    """400: the body is not a JSON object."""
    return ApiError(400, f"The request body is not valid JSON: {detail}.", code="invalid_json")


def model_not_found(model: str) -> ApiError:
    """404: no backend serves this model."""
    return ApiError(
        404,
        f"The model `{quote(model)}` does not exist here; GET /v1/models lists those that do.",
        code="model_not_found",
        param="model",
        kind="invalid_request_error",
    )


def unavailable(message: str, wait_s: float) -> ApiError:
    """503: nobody can serve this now; says when to come back."""
    return ApiError(503, message, code="service_unavailable", headers=[retry_after(wait_s)])


def with_error_object(status: int, body: bytes) -> bytes | None:
    """An upstream's error body with an `error` object added, or None when it has one (it then stays untouched).

    A JSON object keeps all its members (FastAPI's `detail`); any other body becomes the message.
    """
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        content = body.decode("utf-8", "replace").strip()
    members: dict[str, Any] = content if isinstance(content, dict) else {}
    if "error" in members:
        return None
    said = members.get("detail", members.get("message")) if members else content
    message = said if isinstance(said, str) and said else orjson.dumps(said).decode() if said else ""
    error = ApiError(status, message or f"The backend answered with status {status} and no text.")
    return orjson.dumps({**members, "error": error.error()})
