"""Taking in connections: soon, but not all by one worker, and none lost where the system has no room for them."""

import asyncio
import os
import resource
import socket
from collections.abc import Iterator
from typing import cast

import pytest
import uvloop

from tokenmill.engine.gateway import acceptor
from tokenmill.engine.gateway.acceptor import Acceptor


class Greeter(asyncio.Protocol):
    """Says hello and hangs up."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        assert transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        cast("asyncio.Transport", transport).write(b"hello")
        transport.close()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=512) as made:
        yield made


def clients(listener: socket.socket, count: int) -> list[socket.socket]:
    made = []
    for _ in range(count):
        client = socket.create_connection(listener.getsockname(), timeout=10)
        client.setblocking(False)
        made.append(client)
    return made


async def greeted(client: socket.socket) -> bool:
    with client:
        return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 100), 10) == b"hello"


def test_the_more_are_open_the_more_are_taken_in_one_round(listener: socket.socket) -> None:
    async def run() -> None:
        waiting = clients(listener, 200)
        made: list[Greeter] = []

        def protocol() -> Greeter:
            made.append(Greeter())
            return made[-1]

        taking = Acceptor(listener, protocol, made)
        taken = []
        while len(made) < len(waiting):
            before = len(made)
            await asyncio.sleep(0)
            taken.append(len(made) - before)
        assert max(taken[:5]) <= 2  # the other workers get theirs
        assert len(taken) < 60
        assert all(await asyncio.gather(*map(greeted, waiting)))
        taking.close()
        await taking.wait_closed()

    uvloop.run(run())


def test_a_closed_one_leaves_clients_to_others(listener: socket.socket) -> None:
    async def run() -> None:
        Acceptor(listener, Greeter).close()
        (waiting,) = clients(listener, 1)
        await asyncio.sleep(0.05)
        other = Acceptor(listener, Greeter)
        assert await greeted(waiting)
        other.close()

    uvloop.run(run())


def test_without_descriptors_it_waits_and_loses_nobody(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(acceptor, "EXHAUSTED_PAUSE_S", 0.05)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def run() -> None:
        waiting = clients(listener, 3)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            taking = Acceptor(listener, Greeter)
            await asyncio.sleep(0.12)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert all(await asyncio.gather(*map(greeted, waiting)))
        taking.close()

    uvloop.run(run())
    assert "no more connections can be taken (too many open files)" in caplog.text
