"""Takes in the clients' connections for uvicorn's server, the more at once the more there are.

libuv, below uvloop, takes one connection in each round of the event loop. A round in which hundreds of streams move
lasts milliseconds: of 1,000 clients that come together the last would wait for seconds before it is looked at.
A worker whose rounds are short takes one, too, so that the others that listen on the same socket get theirs.
"""

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Callable, Sized
from typing import Any, cast

import uvicorn

from tokenmill.engine.gateway.protocol import GatewayProtocol

log = logging.getLogger("tokenmill.gateway")

#: One connection is taken in a round, and one more for so many that are open.
OPEN_FOR_ONE_MORE = 4
#: Seconds without accepting after the system had no descriptor or memory for one more connection.
EXHAUSTED_PAUSE_S = 0.5
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Acceptor:
    """Accepts on one listening socket from its making until `close`.

    Args:
        listener: It listens; other processes may accept from it, too.
        protocol: Makes what serves a connection.
        connections: Those that are open.
    """

    def __init__(
        self, listener: socket.socket, protocol: Callable[[], asyncio.Protocol], connections: Sized = ()
    ) -> None:
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._protocol = protocol
        self._opening: set[asyncio.Task[object]] = set()
        self._pause: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        # Inherited by what it accepts: an event of a stream is not held back until the one before is acknowledged.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._loop.add_reader(listener, self._accept)

    def close(self) -> None:
        """Accepts no more; the listening socket stays open."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._listener)

    @property
    def opening(self) -> bool:
        """Whether something that was accepted is not yet in the hands of its protocol."""
        return bool(self._opening)

    async def wait_closed(self) -> None:
        """Returns when what was accepted is in the hands of its protocol."""
        if self._opening:
            await asyncio.wait(self._opening)

    def _accept(self) -> None:
        for _ in range(1 + len(self._connections) // OPEN_FOR_ONE_MORE):
            try:
                client, _address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    continue  # this client has gone already
                log.error("no more connections can be taken (%s); trying again", (error.strerror or "?").lower())
                self._loop.remove_reader(self._listener)
                self._pause = self._loop.call_later(EXHAUSTED_PAUSE_S, self._resume)
                return
            task = self._loop.create_task(self._open(client))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it has gone meanwhile
            await self._loop.connect_accepted_socket(self._protocol, client)

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listener, self._accept)


class Server(uvicorn.Server):
    """uvicorn's server with acceptors in the place of the event loop's own.

    Args:
        config: Its configuration.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._acceptors: list[Acceptor] = []
        self._retires = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts the application, then accepts on the sockets."""
        await super().startup(sockets=[])
        config, state, shared = self.config, self.server_state, self.lifespan.state

        def protocol() -> asyncio.Protocol:
            made: Any = config.http_protocol_class
            return cast("asyncio.Protocol", made(config=config, server_state=state, app_state=shared))

        self._acceptors = [Acceptor(listener, protocol, state.connections) for listener in sockets or []]
        # uvicorn closes its servers, waits for them, and does nothing else with them.
        self.servers = cast("list[asyncio.base_events.Server]", self._acceptors)

    def retire(self) -> None:
        """Accepts no more, and ends after the last connection: each has one more answer, which says so.

        So no client loses a request, not even one that it sends on a connection that was idle: others accept.
        """
        self._retires = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        if self._retires:
            for acceptor in self._acceptors:
                acceptor.close()
            for connection in list(self.server_state.connections):
                cast("GatewayProtocol", connection).retire()
            state = self.server_state
            # Of some tasks the client has gone, not their work (`background`).
            if not (state.connections or state.tasks or any(one.opening for one in self._acceptors)):
                return True
        return await super().on_tick(counter)
