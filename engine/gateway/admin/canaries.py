"""Canaries that are set and rolled back while the gateway runs: kept in the store, looked up by every worker."""

import asyncio
import contextlib
import logging

from tokenmill.engine.gateway.admin import tables
from tokenmill.engine.gateway.database import Connection, StoreUnavailableError
from tokenmill.engine.gateway.governance import audit
from tokenmill.engine.gateway.governance.service import Governance
from tokenmill.engine.gateway.portfolio import Portfolio
from tokenmill.engine.gateway.seldom import Seldom

log = logging.getLogger("tokenmill.gateway.admin")

#: Seconds until a change has reached every worker, at most.
POLL_S = 1.0


def put(connection: Connection, backend: str, share: float | None, actor: str) -> None:
    """Changes a backend's share for all workers; None: a backend like the others."""
    before = {name: known for name, known in shares(connection).items() if name == backend}
    connection.execute("DELETE FROM canaries WHERE backend = ?", (backend,))
    connection.execute("INSERT INTO canaries (backend, share) VALUES (?, ?)", (backend, share))
    audit.append(connection, actor, "canary.set", backend, {"before": before.get(backend), "after": share})


def clear(connection: Connection, backend: str, actor: str) -> None:
    """Goes back to what the configuration says."""
    connection.execute("DELETE FROM canaries WHERE backend = ?", (backend,))
    audit.append(connection, actor, "canary.clear", backend, {})


def shares(connection: Connection) -> dict[str, float | None]:
    """All shares that differ from the configuration, by backend."""
    return {row[0]: row[1] for row in connection.execute("SELECT backend, share FROM canaries")}


class Canaries:
    """A service: brings the store's shares into this worker's portfolio.

    Args:
        portfolio: Whose backends.
        governance: Has the store.
    """

    def __init__(self, portfolio: Portfolio, governance: Governance) -> None:
        self._portfolio = portfolio
        self._governance = governance
        self._task: asyncio.Task[None] | None = None
        self._unread = Seldom()

    async def start(self) -> None:
        """Looks once, then every second."""
        await self._governance.store.write(tables.make)
        self.apply()
        self._task = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Ends looking."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def apply(self) -> None:
        """Takes over what the store says now."""
        changed = shares(self._governance.store.reader)
        for target in self._portfolio.targets:
            name = target.backend.name
            self._portfolio.set_canary(name, changed.get(name, target.backend.canary))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            try:
                self.apply()
            except StoreUnavailableError as error:
                if self._unread.due():
                    log.warning("the shares of canaries cannot be read: %s; trying again", error)
            except Exception:
                log.exception("the shares of canaries could not be read; trying again")
