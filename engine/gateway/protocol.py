"""uvicorn's HTTP/1.1 protocol with the limits it lacks: size and time of a request's head, errors as JSON."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from tokenmill.engine.gateway.api_error import ApiError
from tokenmill.engine.gateway.settings import Settings


def protocol_class(settings: Settings) -> type[HttpToolsProtocol]:
    """A protocol class for `uvicorn.Config(http=...)` that holds these limits."""

    class GatewayProtocol(HttpToolsProtocol):
        """One client connection."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.in_head = False
            #: Bytes received since the head began, the feed in which it began counted whole.
            self.head_bytes = 0
            self.head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.arm_head_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self.cancel_head_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            self.head_bytes = self.head_bytes + len(data) if self.in_head else len(data)
            super().data_received(data)
            if self.transport.is_closing():
                return
            if self.in_head and self.head_bytes > settings.max_header_bytes:
                self.refuse_head()
            elif self.timeout_keep_alive_task is None and self.head_timer is None and self.awaits_head():
                self.arm_head_timer()

        def on_message_begin(self) -> None:
            self.in_head = True
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self.cancel_head_timer()
            self.in_head = False
            if self.head_bytes > settings.max_header_bytes:
                # The count may hold body bytes that came with the head: look at the head itself.
                size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
                if size > settings.max_header_bytes:
                    self.refuse_head()
                    return
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            if self.cycle is not None:
                super().on_body(body)

        def on_message_complete(self) -> None:
            if self.cycle is not None:
                super().on_message_complete()

        def awaits_head(self) -> bool:
            return self.in_head or self.cycle is None or self.cycle.response_complete

        def arm_head_timer(self) -> None:
            self.head_timer = self.loop.call_later(settings.header_timeout_s, self.transport.close)

        def cancel_head_timer(self) -> None:
            if self.head_timer is not None:
                self.head_timer.cancel()
                self.head_timer = None

        def refuse_head(self) -> None:
            limit = settings.max_header_bytes
            self.refuse(ApiError(431, f"The request head is longer than {limit} bytes.", code="headers_too_large"))

        def send_400_response(self, msg: str) -> None:
            if not self.transport.is_closing():
                self.refuse(ApiError(400, msg, code="invalid_http"))

        def refuse(self, error: ApiError) -> None:
            """Answers outside of any request and closes."""
            body = error.body()
            head = STATUS_LINE[error.status] + b"content-type: application/json\r\nconnection: close\r\n"
            self.transport.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
            self.transport.close()

    return GatewayProtocol
