"""Governance of one gateway process: its store, its claim to be alive, and what has to be done now and then."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from functools import partial

from tokenmill.engine.gateway import register
from tokenmill.engine.gateway.api_error import ApiError, unavailable
from tokenmill.engine.gateway.database import Connection, StoreUnavailableError, now_ms
from tokenmill.engine.gateway.governance import accounts, books, retention, workers
from tokenmill.engine.gateway.governance.accounts import MASTER, Limits
from tokenmill.engine.gateway.governance.guesses import Guesses
from tokenmill.engine.gateway.governance.options import Options
from tokenmill.engine.gateway.governance.pages import Kept
from tokenmill.engine.gateway.governance.schema import SCHEMA
from tokenmill.engine.gateway.governance.workers import WorkerLock
from tokenmill.engine.gateway.long_reads import LongReads
from tokenmill.engine.gateway.seldom import Seldom
from tokenmill.engine.gateway.store import Store

log = logging.getLogger("tokenmill.gateway.governance")

#: Seconds between two looks for processes that died; with a server, that is how it is kept knowing that we live.
RECOVER_EVERY_S, RECOVER_EVERY_WITH_SERVER_S = 1.0, 0.5
#: Seconds after which a client may try again when the store cannot be asked.
STORE_RETRY_S = 2
#: Seconds between two looks for ledger rows that are too old.
PURGE_EVERY_S = 3600.0


class Governance:
    """A service of the gateway; stages and sites share it.

    In a coroutine, read with `governance.store.reader` and write with `await governance.store.write(operation)`.

    Args:
        options: What was configured.

    Attributes:
        guesses: Knows the master key, and counts keys that nobody has.
        apply: `books.apply` with what this process knows already; for `Store.write_item` and `Store.post_item`.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.guesses = Guesses(options)
        self.apply = partial(books.apply, kept=Kept())
        self._store: Store | None = None
        self._worker: WorkerLock | None = None
        self._long_reads: LongReads | None = None
        self._housekeeping: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()
        self._refused, self._unkept = Seldom(), Seldom()

    @property
    def store(self) -> Store:
        """The store; open from the service's start to its end."""
        assert self._store is not None, "governance has not been started"
        return self._store

    @property
    def worker(self) -> WorkerLock:
        """This process, as reservations name it."""
        assert self._worker is not None, "governance has not been started"
        return self._worker

    @property
    def long_reads(self) -> LongReads:
        """For queries that may take seconds."""
        assert self._long_reads is not None, "governance has not been started"
        return self._long_reads

    async def start(self) -> None:
        """Opens the store, settles what dead processes left, and begins to look after it.

        Raises:
            ConfigurationError: The store cannot be used.
        """
        self._store = Store(self.options.store, SCHEMA, in_loop=True)
        self._long_reads = LongReads(self._store)
        with self._store.usable():
            if not self._store.local:
                await self._store.write(register.try_out)
            self._worker = WorkerLock(self._store)
            await self._store.write(_ensure_master)
            await asyncio.to_thread(workers.recover, self._store, self._worker)
        every_s = RECOVER_EVERY_S if self._store.local else RECOVER_EVERY_WITH_SERVER_S
        self._look_after(every_s, partial(asyncio.to_thread, workers.recover, self._store, self._worker))
        if self.options.retention_days is not None:
            # Beside the other: it may take long.
            self._look_after(PURGE_EVERY_S, partial(self._purge, self.options.retention_days))

    async def stop(self) -> None:
        """Commits everything and closes."""
        # Asked, not cancelled: its thread would go on and wait for a store that is closed.
        self._stopping.set()
        await asyncio.gather(*self._housekeeping)
        if self._long_reads is not None:
            await asyncio.to_thread(self._long_reads.close)
        if self._store is not None:
            self._store.hand_over()
            if self._worker is not None:
                await asyncio.to_thread(self._worker.leave)
            await asyncio.to_thread(self._store.close)

    def unreadable(self, error: StoreUnavailableError) -> ApiError:
        """503: the answer where the store cannot be asked; the reason goes to the log, not for each."""
        return self._unserved(error, "read")

    def unwritable(self, error: Exception) -> ApiError:
        """503: the answer where the store took no reservation; the reason goes to the log, not for each."""
        return self._unserved(error, "written")

    def _unserved(self, error: Exception, what: str) -> ApiError:
        if count := self._refused.due():
            trace = None if isinstance(error, StoreUnavailableError) else error
            log.warning("%d requests could not be served, the last because %s", count, error, exc_info=trace)
        return unavailable(f"The gateway's books cannot be {what} now.", STORE_RETRY_S)

    def _look_after(self, every_s: float, do: Callable[[], Awaitable[object]]) -> None:
        """Has something done now and then until the end."""
        self._housekeeping.append(asyncio.create_task(self._keep_house(every_s, do)))

    async def _keep_house(self, every_s: float, do: Callable[[], Awaitable[object]]) -> None:
        while not self._stopping.is_set():
            try:
                await do()
            except StoreUnavailableError as error:
                if self._unkept.due():
                    log.warning("the store cannot be looked after: %s; trying again", error)
            except Exception:
                # The store may be busy or full for a while; the requests say so themselves.
                log.exception("looking after the store failed; trying again")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), every_s)

    async def _purge(self, days: int) -> None:
        await retention.purge(self.store, days, now_ms(), self._stopping)


def _ensure_master(connection: Connection) -> None:
    if connection.execute("SELECT 1 FROM accounts WHERE id = ?", (MASTER,)).fetchone() is None:
        accounts.create(connection, "key", "master key", None, Limits(), "gateway", MASTER)
