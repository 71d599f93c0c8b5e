"""A connection that has ended is freed at once: thousands that wait for the collector are megabytes."""

import asyncio
import gc
import json
import socket
import types
from collections.abc import Iterator

import pytest
import uvicorn
import uvloop

from tests.gateway.upstream import FakeUpstream
from tokenmill.engine.gateway.acceptor import Server
from tokenmill.engine.gateway.assembly import create_app
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.connection import Connection
from tokenmill.engine.gateway.cycle import Cycle
from tokenmill.engine.gateway.pipeline import Exchange
from tokenmill.engine.gateway.protocol import GatewayProtocol, protocol_class
from tokenmill.engine.gateway.settings import Document, Settings

OURS = (GatewayProtocol, Connection, Cycle, Exchange, types.CoroutineType)


@pytest.fixture
def collected_by_hand() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.set_debug(0)
    gc.garbage.clear()
    gc.enable()


def ask(port: int, act: dict[str, object], whole: bool) -> None:
    """A stream, read to its end or broken off at its first event."""
    body = json.dumps({"model": "tiny", "stream": True, "act": act}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(head + body)
        seen = b""
        while data := client.recv(65536):
            seen += data
            if not whole and b"data: " in seen:
                return
        assert b"[DONE]" in seen


@pytest.mark.parametrize("whole", [True, False])
def test_nothing_of_a_connection_needs_the_collector(
    whole: bool, shared_upstream: FakeUpstream, collected_by_hand: None
) -> None:
    document = Document((Backend("a", shared_upstream.url, "utility", ("tiny",)),), Settings())
    act: dict[str, object] = {"chunks": 3} if whole else {"chunks": 200, "interval_s": 0.02}

    async def main() -> list[str]:
        config = uvicorn.Config(
            create_app(document),
            http=protocol_class(document.settings),
            interface="asgi3",
            lifespan="on",
            log_config=None,
        )
        config.load()
        server = Server(config)
        server.lifespan = config.lifespan_class(config)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            await server.startup([listener])
            try:
                async with asyncio.timeout(30):
                    return await used(server, listener.getsockname()[1])
            finally:
                await server.shutdown()

    async def used(server: Server, port: int) -> list[str]:
        for _ in range(5):
            await asyncio.to_thread(ask, port, act, whole)
        while server.server_state.connections:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        return [repr(found) for found in gc.garbage if isinstance(found, OURS)]

    assert uvloop.run(main()) == []
