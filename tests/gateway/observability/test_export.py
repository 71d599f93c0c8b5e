"""Spans leave a real worker as OTLP over HTTP, and a collector that is gone costs no request anything."""

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.gateway.running import wait_until
from tests.gateway.upstream import FakeUpstream
from tests.gateway.workers import Workers
from tokenmill.engine.gateway.backends import Backend


class Collector(BaseHTTPRequestHandler):
    """Takes what OTLP's exporters send."""

    spans: list[Span] = []  # noqa: RUF012 - one collector, one list

    def do_POST(self) -> None:
        """One batch."""
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        request = ExportTraceServiceRequest.FromString(body)
        Collector.spans += [span for r in request.resource_spans for s in r.scope_spans for span in s.spans]
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@pytest.fixture
def collector() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1/traces"
    server.shutdown()
    thread.join()
    server.server_close()


def test_spans_reach_a_collector(
    collector: str, upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory
) -> None:
    backend = Backend("a", upstream.url, "utility", models=("tiny",))
    for address in (collector, "http://127.0.0.1:9/v1/traces"):
        with Workers(tmp_path_factory.mktemp("traces"), backend, traces=address) as workers:
            key = workers.json("POST", "/admin/keys", {}, status=201)["key"]
            for stream in (False, True):
                assert workers.chat(key, stream=stream)[0] == 200
    # Stopping a worker exports what is left.
    wait_until(lambda: len(Collector.spans) == 2)
    names = {attribute.key for span in Collector.spans for attribute in span.attributes}
    assert {"gen_ai.operation.name", "gen_ai.request.model", "gen_ai.usage.output_tokens", "tokenmill.tier"} <= names
    told = {headers["traceparent"].split("-")[2] for _, headers, _ in upstream.books.requests[:2]}
    assert {span.span_id.hex() for span in Collector.spans} == told
