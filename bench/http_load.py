"""A load generator and a backend that answers at once, both cheap enough to leave the core to what is measured.

Both speak just the HTTP that the measurement needs, on raw protocols: a general server or client would cost more
than the gateways under test and hide their differences.

    python -m tokenmill.bench.http_load upstream --port 9000
"""

import argparse
import asyncio
import functools
import sys
import time
from dataclasses import dataclass
from typing import cast

import uvloop

ANSWER = (
    b'{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"tiny","choices":[{"index":0,"message":'
    b'{"role":"assistant","content":"The quick brown fox jumps over the lazy dog."},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":20,"completion_tokens":10,"total_tokens":30}}'
)
EVENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"tiny","choices":[{"index":0,'
    b'"delta":{"content":" token"},"finish_reason":null}]}\n\n'
)
LAST = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"tiny","choices":[],"usage":'
    b'{"prompt_tokens":20,"completion_tokens":50,"total_tokens":70}}\n\ndata: [DONE]\n\n'
)
MODELS = b'{"object":"list","data":[{"id":"tiny","object":"model","created":1,"owned_by":"bench"}]}'


#: How much of the end of a request's body the backend keeps.
LOOKED_AT = 64 * 1024


def _json(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body


def _chunk(body: bytes) -> bytes:
    return b"%x\r\n" % len(body) + body + b"\r\n"


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
WHOLE = _json(ANSWER)


class UpstreamProtocol(asyncio.Protocol):
    """One connection to the backend. A streaming request's events come at once; `"user":"every SECONDS"` spaces them.

    Args:
        chunks: Events in a stream.
    """

    def __init__(self, chunks: int) -> None:
        self.chunks = chunks
        self.buffer = bytearray()
        self.missing = 0
        self.head = b""
        self.body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        self.buffer += data
        while True:
            if not self.head:
                end = self.buffer.find(b"\r\n\r\n")
                if end < 0:
                    return
                self.head = bytes(self.buffer[:end])
                del self.buffer[: end + 4]
                self.missing = content_length(self.head)
            # Megabytes are not kept: copying them would stall whoever else asks, and what is looked for ends a body.
            surplus = min(len(self.buffer), self.missing) - LOOKED_AT
            if surplus > 0:
                del self.buffer[:surplus]
                self.missing -= surplus
            if len(self.buffer) < self.missing:
                return
            self.body = bytes(self.buffer[: self.missing])
            del self.buffer[: self.missing]
            head, self.head = self.head, b""
            self.answer(head)

    def answer(self, head: bytes) -> None:
        """Answers one request."""
        if head.startswith(b"GET"):
            self.transport.write(_json(MODELS))
        elif b'"stream":true' in self.body or b'"stream": true' in self.body:
            where = self.body.find(b'"every ')
            events = [EVENT] * self.chunks + [LAST]
            if where < 0:
                self.transport.write(STREAM_HEAD + b"".join(_chunk(event) for event in events) + b"0\r\n\r\n")
            else:
                interval_s = float(self.body[where + 7 :].split(b'"', 1)[0])
                self.transport.write(STREAM_HEAD)
                self.spaced(events, interval_s)
        else:
            self.transport.write(WHOLE)

    def spaced(self, events: list[bytes], interval_s: float) -> None:
        """Writes the next event and sets a timer for the one after."""
        if self.transport.is_closing():
            return
        self.transport.write(_chunk(events[0]) if len(events) > 1 else _chunk(events[0]) + b"0\r\n\r\n")
        if len(events) > 1:
            asyncio.get_running_loop().call_later(interval_s, self.spaced, events[1:], interval_s)


def content_length(head: bytes) -> int:
    """The value of `content-length` in a message's head; 0 where there is none."""
    where = head.lower().find(b"content-length:")
    return int(head[where + 15 :].split(b"\r\n", 1)[0]) if where >= 0 else 0


@dataclass
class Load:
    """What a load run saw.

    Attributes:
        latencies_s: From the request's first byte sent to the answer's last byte received, per request.
        first_s: Until the answer's first body byte.
        errors: Answers with another status than 200, or broken off.
        elapsed_s: Wall time of the whole run.
    """

    latencies_s: list[float]
    first_s: list[float]
    errors: int
    elapsed_s: float

    @property
    def per_second(self) -> float:
        """Whole answers per second."""
        return (len(self.latencies_s) - self.errors) / self.elapsed_s


class LoadProtocol(asyncio.Protocol):
    """One client: sends its request, waits for the whole answer, sends it again."""

    def __init__(self, request: bytes, until: float, limit: int, load: Load, done: "asyncio.Future[None]") -> None:
        self.request = request
        self.left = limit
        self.until = until
        self.load = load
        self.done = done
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self.transport = cast("asyncio.Transport", transport)
        self.send()

    def send(self) -> None:
        """Starts a request, or ends when the time or the number is over."""
        self.sent = time.perf_counter()
        self.left -= 1
        if self.sent >= self.until or self.left < 0:
            self.transport.close()
            return
        self.first = 0.0
        self.head_end = -1
        self.size = -1
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        buffer = self.buffer = self.buffer + data if self.buffer else data
        if self.head_end < 0:
            end = buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            self.head_end = end + 4
            head = buffer[:end].lower()
            self.size = -1 if b"transfer-encoding: chunked" in head else self.head_end + content_length(head)
            self.ok = head.startswith(b"http/1.1 200")
        if not self.first and len(buffer) > self.head_end:
            self.first = time.perf_counter()
        if buffer.endswith(b"0\r\n\r\n") if self.size < 0 else len(buffer) >= self.size:
            now = time.perf_counter()
            self.load.latencies_s.append(now - self.sent)
            self.load.first_s.append((self.first or now) - self.sent)
            self.load.errors += not self.ok
            self.buffer = b""
            self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        if self.head_end >= 0 and self.buffer:
            self.load.errors += 1
        if not self.done.done():
            self.done.set_result(None)


class AbortProtocol(asyncio.Protocol):
    """A client that asks for a stream and breaks the connection at the first bytes of it."""

    def __init__(self, request: bytes, done: "asyncio.Future[None]") -> None:
        self.request = request
        self.done = done
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self.transport = cast("asyncio.Transport", transport)
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        self.buffer += data
        if b"data: " in self.buffer:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        if b"data: " in self.buffer:
            self.done.set_result(None)
        else:
            self.done.set_exception(ConnectionError(f"no stream to abort: {self.buffer[:200]!r}"))


async def abort(port: int, request: bytes, clients: int, count: int) -> None:
    """Begins `count` streams, `clients` at once, and breaks each off."""
    loop = asyncio.get_running_loop()

    async def client(share: int) -> None:
        for _ in range(share):
            done: asyncio.Future[None] = loop.create_future()
            await loop.create_connection(functools.partial(AbortProtocol, request, done), "127.0.0.1", port)
            await done

    await asyncio.gather(*(client(count // clients) for _ in range(clients)))


def run_abort(port: int, request: bytes, clients: int, count: int) -> None:
    """`abort` in an event loop of its own."""
    uvloop.run(abort(port, request, clients, count))


def request_bytes(port: int, body: bytes, key: str = "sk-bench") -> bytes:
    """A POST of a chat completion request with an API key."""
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:%d\r\ncontent-type: application/json\r\n"
        b"accept: */*\r\nauthorization: Bearer %s\r\ncontent-length: %d\r\n\r\n"
        % (port, key.encode(), len(body))
        + body
    )


async def load(port: int, request: bytes, clients: int, seconds: float, limit: int = sys.maxsize) -> Load:
    """Keeps `clients` connections busy with the same request for a while, or for `limit` requests each."""
    loop = asyncio.get_running_loop()
    seen = Load([], [], 0, 0.0)
    start = time.perf_counter()
    ends = []
    for _ in range(clients):
        done: asyncio.Future[None] = loop.create_future()
        ends.append(done)
        client = functools.partial(LoadProtocol, request, start + seconds, limit, seen, done)
        await loop.create_connection(client, "127.0.0.1", port)
    await asyncio.wait(ends)
    seen.elapsed_s = time.perf_counter() - start
    return seen


def run_load(port: int, request: bytes, clients: int, seconds: float, limit: int = sys.maxsize) -> Load:
    """`load` in an event loop of its own."""
    return uvloop.run(load(port, request, clients, seconds, limit))


async def disturb(port: int, size: int, pause_s: float, key: str) -> None:
    """Posts a body of `size` bytes, or scrapes /metrics where that is 0, again and again."""
    prompt = b'{"model":"tiny","messages":[{"role":"user","content":"' + b"word " * (size // 5) + b'"}]}'
    request = request_bytes(port, prompt, key) if size else b"GET /metrics HTTP/1.1\r\nhost: a\r\n\r\n"
    while True:
        await load(port, request, 1, 60.0, limit=1)
        await asyncio.sleep(pause_s)


async def serve(port: int, chunks: int) -> None:
    """Runs the backend until it is ended."""
    server = await asyncio.get_running_loop().create_server(
        lambda: UpstreamProtocol(chunks), "127.0.0.1", port, backlog=4096
    )
    async with server:
        await server.serve_forever()


def main() -> None:
    """The backend, or a client that disturbs, as a process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=["upstream", "disturb"])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--chunks", type=int, default=50)
    parser.add_argument("--size", type=int, default=0)
    parser.add_argument("--key", default="sk-bench")
    options = parser.parse_args()
    if options.role == "upstream":
        uvloop.run(serve(options.port, options.chunks))
    else:
        uvloop.run(disturb(options.port, options.size, 0.05, options.key))


if __name__ == "__main__":
    main()
