"""Traces in OpenTelemetry's GenAI conventions, one span per request, exported over OTLP/HTTP beside the hot path.

The span's ids are drawn when the request comes, because the backend is told them (`traceparent`, W3C Trace Context);
the span itself is made of what is known when the request has ended. Attributes follow the semantic conventions for
generative AI (`gen_ai.*`) and HTTP; prompts and answers are never among them.
"""

import asyncio
import random
import re
import time
from typing import TYPE_CHECKING

from tokenmill.engine.gateway.heads import without
from tokenmill.engine.gateway.observability.decisions import was_escalated
from tokenmill.engine.gateway.pipeline import Exchange, Handler, Reply
from tokenmill.engine.gateway.stored import about
from tokenmill.errors import MissingDependencyError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.util.types import AttributeValue

#: What an endpoint does, in the conventions' words.
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/responses": "chat",
    "/v1/embeddings": "embeddings",
}
#: Longest time for one batch with all its retries. A worker that ends waits as long for all of them together.
EXPORT_TIMEOUT_S = 2
_TRACEPARENT = re.compile(rb"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_SAMPLED = 1
_PARENT = frozenset({b"traceparent"})
_CONTEXT = frozenset({b"traceparent", b"tracestate"})


class Traces:
    """A stage and a service.

    Args:
        endpoint: The collector's URL.
        share: Share of the requests to trace that bring no decision of their own.
        exporter: Where spans go instead of to the collector.

    Raises:
        MissingDependencyError: OpenTelemetry's SDK is not installed.
    """

    name = "traces"

    def __init__(self, endpoint: str, share: float = 1.0, exporter: "SpanExporter | None" = None) -> None:
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

                exporter = OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S)
        except ImportError:
            raise MissingDependencyError("opentelemetry-sdk", "otel", "observability.traces") from None
        self._resource = Resource.create({"service.name": "tokenmill-gateway"})
        self._exporter = exporter
        self._processor = BatchSpanProcessor(exporter)
        self._share = share

    async def start(self) -> None:
        """Nothing to do: the exporter has a thread of its own."""

    async def stop(self) -> None:
        """Exports what is left, as far as the collector takes it in time."""
        ending = asyncio.create_task(asyncio.to_thread(self._processor.shutdown))
        done, _ = await asyncio.wait([ending], timeout=EXPORT_TIMEOUT_S)
        if not done:
            await asyncio.to_thread(self._exporter.shutdown)  # it is silent: the next batches are not tried
        await ending

    async def handle(self, exchange: Exchange, proceed: Handler) -> Reply:
        """See `pipeline.Stage`."""
        trace, parent, sampled = self._context(exchange.header(b"traceparent"))
        span = random.getrandbits(64) or 1
        # What others noted of a trace that is not continued does not belong to the new one.
        exchange.forward = without(exchange.forward, _PARENT if parent else _CONTEXT)
        exchange.forward.append((b"traceparent", b"00-%032x-%016x-%02x" % (trace, span, _SAMPLED if sampled else 0)))
        if sampled:
            started = time.time_ns()
            exchange.on_end(lambda ended: self._record(ended, trace, span, parent, started))
        return await proceed(exchange)

    def _context(self, header: bytes | None) -> tuple[int, int, bool]:
        """(trace id, the caller's span id or 0, whether to record) of a `traceparent`, or new ones."""
        found = _TRACEPARENT.fullmatch(header or b"")
        if found is not None:
            trace, parent = int(found[1], 16), int(found[2], 16)
            if trace and parent:
                return trace, parent, bool(int(found[3], 16) & _SAMPLED)
        return random.getrandbits(128) or 1, 0, random.random() < self._share

    def _record(self, exchange: Exchange, trace: int, span: int, parent: int, started: int) -> None:
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

        flags = TraceFlags(TraceFlags.SAMPLED)
        operation = operation_of(exchange.endpoint)
        failed = exchange.outcome in ("failed", "cut")
        self._processor.on_end(
            ReadableSpan(
                f"{operation} {exchange.model}" if exchange.model else operation,
                SpanContext(trace, span, is_remote=False, trace_flags=flags),
                SpanContext(trace, parent, is_remote=True, trace_flags=flags) if parent else None,
                self._resource,
                attributes(exchange, operation),
                kind=SpanKind.SERVER,
                status=Status(StatusCode.ERROR if failed else StatusCode.UNSET),
                start_time=started,
                end_time=time.time_ns(),
            )
        )


def operation_of(endpoint: str) -> str:
    """What a path asks for. Spans are found and counted by it: it holds no ids of responses."""
    if about(endpoint) is not None:
        return "stored_response"
    return OPERATIONS.get(endpoint, endpoint.removeprefix("/v1/"))


def attributes(exchange: Exchange, operation: str) -> "dict[str, AttributeValue]":
    """The span's attributes: GenAI's where there is a convention, `tokenmill.*` for what is ours alone."""
    usage, target, principal, decision = exchange.usage, exchange.target, exchange.principal, exchange.decision
    answering = exchange.answering if exchange.status < 400 else None
    found: dict[str, AttributeValue | None] = {
        "gen_ai.operation.name": operation,
        "gen_ai.request.model": exchange.model,
        "gen_ai.request.stream": True if exchange.first_chunk_at else None,
        "gen_ai.response.model": answering.target.own_model(answering.model) if answering else None,
        "gen_ai.provider.name": target.backend.protocol if target else None,
        "gen_ai.usage.input_tokens": usage.prompt or None,
        "gen_ai.usage.output_tokens": usage.completion or None,
        "gen_ai.usage.cache_read.input_tokens": usage.cached or None,
        "gen_ai.usage.cache_creation.input_tokens": usage.written or None,
        "http.request.method": exchange.method,
        "http.response.status_code": exchange.status or None,
        "url.path": exchange.endpoint,
        "error.type": exchange.outcome if exchange.outcome in ("failed", "cut") else None,
        "tokenmill.request_id": exchange.request_id,
        "tokenmill.outcome": exchange.outcome,
        "tokenmill.tier": target.backend.tier if target else None,
        "tokenmill.backend": target.backend.name if target else None,
        "tokenmill.attempts": exchange.attempts,
        "tokenmill.escalated": was_escalated(exchange),
        "tokenmill.team": principal.team if principal else None,
        "tokenmill.app": principal.app if principal else None,
        "tokenmill.reasons": [f"{reason.criterion}: {reason.verdict}" for reason in decision.reasons]
        if decision
        else None,
    }
    if exchange.first_chunk_at:
        found["gen_ai.response.time_to_first_chunk"] = exchange.first_chunk_at - exchange.started
    return {name: value for name, value in found.items() if value is not None}
