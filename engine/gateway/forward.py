"""The bottom of the pipeline: sends a request to a backend of its routes and relays the answer.

A request is sent again, to another backend, only where that is safe: no connection was made, the connection broke
before any byte of an answer, or the backend said that it did not take the request (429, 503). All but the first draw
on a retry budget. After the first byte of an answer nothing is repeated.
"""

from collections.abc import AsyncGenerator, Callable
from typing import Any

import orjson

from tokenmill.engine.gateway import balance
from tokenmill.engine.gateway.api_error import JSON, ApiError, retry_after, unavailable, with_error_object
from tokenmill.engine.gateway.breaker import RetryBudget
from tokenmill.engine.gateway.pipeline import Exchange, Reply
from tokenmill.engine.gateway.portfolio import Route, Target
from tokenmill.engine.gateway.settings import Settings
from tokenmill.engine.gateway.upstream import (
    Answer,
    ConnectFailedError,
    CutError,
    NoAnswerError,
    SilenceError,
    Upstream,
)

#: The backend says that it did not take the request.
_NOT_TAKEN = (429, 503)
#: The backend is at fault: counted by the circuit breaker.
_FAULT = (500, 502, 503, 504)


class Lease:
    """One request's hold on a backend: counted while open, its outcome reported once."""

    __slots__ = ("_answer", "_open", "model", "target")

    def __init__(self, target: Target, model: str | None) -> None:
        self.target = target
        self.model = model
        self._open = True
        self._answer: Answer | None = None
        target.outstanding += 1
        target.breaker(model).begin()

    def holds(self, answer: Answer) -> None:
        """The answer to close with the lease."""
        self._answer = answer

    def succeeded(self) -> None:
        """The backend did its part."""
        self.target.breaker(self.model).succeeded()
        self.target.mark_up()

    def failed(self) -> None:
        """The backend did not."""
        self.target.breaker(self.model).failed()

    def close(self, _exchange: Exchange | None = None) -> None:
        """Frees the backend's slot; closes the connection if the answer was not read to its end."""
        if self._open:
            self._open = False
            self.target.outstanding -= 1
            if self._answer is not None:
                self._answer.close()


class Forwarder:
    """Sends requests upstream.

    Args:
        upstream: The HTTP client.
        settings: For limits and messages.
    """

    def __init__(self, upstream: Callable[[], Upstream], settings: Settings) -> None:
        self._upstream = upstream
        self._settings = settings
        self._retries = RetryBudget(settings.retry_ratio)

    async def handle(self, exchange: Exchange) -> Reply:
        """The answer of the first backend that gives one; raises `ApiError` when none does."""
        self._retries.earn()
        refused: Reply | ApiError | None = None
        tried: list[Target] = []
        for route in exchange.routes:
            while (target := balance.choose(route, tried)) is not None:
                tried.append(target)
                lease = Lease(target, route.model)
                exchange.on_end(lease.close)
                exchange.target = target
                exchange.attempts += 1
                try:
                    reply = await self._ask(exchange, lease, route)
                except ConnectFailedError:
                    lease.failed()
                    target.mark_down("connection refused")
                    refused = unavailable(
                        f"The backend {target.backend.name} cannot be reached.", self._settings.retry_after_s
                    )
                    lease.close()
                    continue
                except NoAnswerError:
                    lease.failed()
                    refused = unavailable(
                        f"The backend {target.backend.name} closed the connection without an answer.",
                        self._settings.retry_after_s,
                    )
                except SilenceError:
                    lease.failed()
                    lease.close()
                    raise ApiError(
                        504,
                        f"The backend {target.backend.name} was silent for {self._settings.read_timeout_s:g} s.",
                        code="timeout",
                    ) from None
                except CutError:
                    lease.failed()
                    lease.close()
                    raise ApiError(
                        502,
                        f"The backend {target.backend.name} broke off in the middle of its answer.",
                        code="upstream_cut",
                    ) from None
                else:
                    if reply.status not in _NOT_TAKEN:
                        return reply
                    refused = reply
                lease.close()
                if not self._retries.spend():
                    return self._last(exchange, refused)
        return self._last(exchange, refused)

    def _last(self, exchange: Exchange, refused: Reply | ApiError | None) -> Reply:
        if isinstance(refused, Reply):
            return refused
        raise refused or balance.refusal(exchange.routes, self._settings)

    async def _ask(self, exchange: Exchange, lease: Lease, route: Route) -> Reply:
        target = lease.target
        answer = await self._upstream().send(
            "POST",
            target.url(exchange.endpoint, exchange.query),
            self._headers(exchange, target),
            self._payload(exchange, target, route),
        )
        lease.holds(answer)
        if answer.status in _FAULT:
            lease.failed()
        elif answer.status != 429:
            lease.succeeded()
        headers = answer.headers
        if answer.status < 400 and answer.content_type != b"application/json":
            return Reply(answer.status, headers, None, _relay(answer, lease))
        body = await answer.read()
        lease.close()
        if answer.status >= 400 and (wrapped := with_error_object(answer.status, body)) is not None:
            body = wrapped
            headers = [header for header in headers if header[0] != b"content-type"]
            headers.append(JSON)
        if answer.status in _NOT_TAKEN and all(name != b"retry-after" for name, _ in headers):
            headers = [*headers, retry_after(self._settings.retry_after_s)]
        return Reply(answer.status, headers, body)

    def _payload(self, exchange: Exchange, target: Target, route: Route) -> bytes:
        """The body, with the backend's own name of the model; the client's bytes where the client used that."""
        if exchange.model is None:
            return exchange.payload
        public = route.model or next(iter(target.models), exchange.model)
        name = target.backend.upstream_model(public)
        if name == exchange.model:
            return exchange.payload
        if exchange.body is None:
            raise ApiError(400, f"In a form, `model` must be the backend's own name: `{name}`.", param="model")
        return exchange.body.with_fields({"model": name})

    def _headers(self, exchange: Exchange, target: Target) -> list[tuple[str, str]]:
        key = target.backend.api_key
        if key is None:
            return exchange.forward
        kept = [header for header in exchange.forward if header[0] not in ("authorization", "x-api-key", "api-key")]
        return [*kept, ("authorization", f"Bearer {key}")]


async def _relay(answer: Answer, lease: Lease) -> AsyncGenerator[bytes, None]:
    try:
        async for chunk in answer.chunks():
            yield chunk
    except (CutError, SilenceError):
        lease.failed()
        raise
    finally:
        lease.close()


def error_event(error: ApiError) -> bytes:
    """A server-sent event that ends a broken stream; OpenAI's client raises `APIError` on it."""
    content: dict[str, Any] = {"error": error.error()}
    return b"data: " + orjson.dumps(content) + b"\n\n"
