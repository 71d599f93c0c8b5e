"""What several gateway processes must agree on, in one database: keys, budgets, ledger, audit trail.

The writes of a process are done in the order in which they were asked for, and those that come together are committed
in one transaction. Where that takes microseconds, the event loop does it itself at the end of its round: handing over
to a thread and back would take longer. What may wait, for another process or for the disk, is done by a thread.

The database itself is a `sqlite.Sqlite` file or, for gateways on several machines, a `postgres.Postgres` server;
statements keep to what both take, with `?` for parameters. Times are UTC in milliseconds, money is in micro-cents
(`money`).
"""

import asyncio
import contextlib
import itertools
import logging
import operator
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from tokenmill.engine.gateway.backlog import Backlog
from tokenmill.engine.gateway.database import Claim, Connection, Database, StoreUnavailableError
from tokenmill.engine.gateway.store_jobs import Job, Unanswered, deliver, deliver_failure, set_results, wanted
from tokenmill.engine.gateway.store_schema import make_tables
from tokenmill.errors import ConfigurationError

T = TypeVar("T")

log = logging.getLogger("tokenmill.gateway.store")

#: Most operations in one transaction: bounds how long the other processes wait.
MOST_IN_A_BATCH = 256
#: Most that the event loop does itself in one go: about two milliseconds.
MOST_AT_ONCE = 64
#: A transaction that took longer, in seconds, has waited for the disk: the thread does those of the next moment, too.
SLOW_S, SLOW_FOR_S = 0.005, 1.0
#: Transactions of the event loop after which a thread does what they left undone; requests meanwhile take longer, and
#: after as many more they wait for it: what is undone stays bounded, however little of the core the thread gets.
TIDY_AFTER = 1000
#: How long what nobody waits for may wait for company, in seconds: a transaction of its own costs ten times as much.
POSTED_WAIT_S = 0.005
#: How long a coroutine waits for a server that takes what is to be written and does not answer, in seconds.
ANSWER_WAIT_S = 10.0


Operation = Callable[[Connection], T]
#: Does many things of one kind in one transaction; answers with a result for each, in their order. Each of them takes
#: microseconds.
Collector = Callable[[Connection, list[Any]], Sequence[Any]]


def _one_by_one(connection: Connection, operations: list[Operation[Any]]) -> list[Any]:
    return [operation(connection) for operation in operations]


class Store:
    """One process's hold on the database. Close it at the end.

    Args:
        place: Path of an SQLite file, made with its folder where it is missing, readable for its owner alone; or
            `postgresql://...`.
        schema: Statements that make the tables in an empty database.
        in_loop: `reader` is for an event loop: it does not wait for a server that does not answer.

    Attributes:
        local: Reading takes microseconds: an event loop may do it for every request.

    Raises:
        ConfigurationError: The database cannot be opened, is none, or was made by a newer version.
        MissingDependencyError: PostgreSQL is asked for and its client library is absent.
    """

    def __init__(self, place: Path | str, schema: Sequence[str], in_loop: bool = False) -> None:
        self.place = place
        self._queue: queue.SimpleQueue[list[Job] | None] = queue.SimpleQueue()
        #: How many lists the thread has not done yet: until it has, what comes later queues behind them.
        self._behind = 0
        self._counting = threading.Lock()
        self._slow_until = 0.0
        #: What nobody waits for and could not be written yet; the thread's.
        self._backlog: Backlog[Job] = Backlog(MOST_IN_A_BATCH)
        self._untidy = 0
        self._tidier: threading.Thread | None = None
        #: What the event loop asked for since it last came round; one wake-up of the writer is enough for all of it.
        self._gathered: list[Job] = []
        #: What comes behind it, in whichever order with it.
        self._beside: list[Job] = []
        self._handing_over = False
        self._timer: asyncio.TimerHandle | None = None
        self._database = _database(place)
        #: What coroutines wait for that a server does.
        self._unanswered = Unanswered(ANSWER_WAIT_S, self._silence)
        self.local = self._database.local
        with contextlib.ExitStack() as undo:
            undo.callback(self._database.close)
            self._writer = self._database.connect(writes=True)
            undo.callback(self._writer.close)
            #: For the event loop; never waits.
            self._quick = self._database.connect(writes=True, waits=False) if self.local else None
            if self._quick is not None:
                undo.callback(self._quick.close)
            with self.usable():
                writer, shown = self._writer, self._database.shown
                self._database.set_up(writer, lambda: make_tables(writer, schema, shown))
            undo.pop_all()
        #: For reading, in the thread that made the store; sees everything that is committed.
        self.reader = self._database.connect(waits=self.local or not in_loop)
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    def _silence(self) -> StoreUnavailableError:
        problem = f"{self._database.shown} has not answered for {ANSWER_WAIT_S:g} s; see governance.store"
        return StoreUnavailableError(problem, perhaps_done=True)

    @contextlib.contextmanager
    def usable(self) -> Iterator[None]:
        """Statements without which a program cannot go on: raises `ConfigurationError`, a line, where one fails."""
        try:
            yield
        except self._database.error as error:
            reason, _, _ = str(error).partition("\n")
            remedy = "name a gateway's database, or an empty one that may be written to"
            raise ConfigurationError(f"{self._database.shown} cannot be used: {reason}; {remedy}") from None

    def submit(self, operation: Operation[T]) -> "Future[T]":
        """Has `operation(connection)` run in the writer's next transaction; the result is there once it is committed.

        Operations run in the order of their submission. One that raises leaves no trace of itself.
        """
        future: Future[T] = Future()
        self._put([Job(_one_by_one, operation, future)])
        return future

    async def write(self, operation: Operation[T]) -> T:
        """`submit` for a coroutine; cancelled before its turn, the operation does not run."""
        result: T = await self.write_item(_one_by_one, operation)
        return result

    def write_item(self, collector: Collector, item: Any, alone: bool = False) -> "asyncio.Future[Any]":
        """`write` for one of many things that are done at less cost together: `collector(connection, items)`.

        A server that does not answer for long is a `StoreUnavailableError`.

        Items that stand next to each other in the order of submission, with the same collector, are done together.

        Args:
            collector: Does it.
            item: What is to be done.
            alone: No others are to be expected in this round of the event loop: nothing waits for its end.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._gathered.append(Job(collector, item, future, loop))
        if not self.local:
            self._unanswered.add(loop, future)
        if self._handing_over:
            return future
        if alone:
            self.hand_over()
        else:
            self._handing_over = True
            loop.call_soon(self.hand_over)
        return future

    def post_item(self, collector: Collector, item: Any, dispensable: bool = False, beside: bool = False) -> None:
        """`write_item` for who does not wait; a failure goes to the log.

        While the database cannot be asked it is tried again: it must do no harm where nobody knows whether it was done.

        Args:
            collector: Does it.
            item: What is to be done.
            dispensable: It may be dropped where too much waits for the database.
            beside: It has no order with what other collectors do: those need not be parted for it.
        """
        job = Job(collector, item, None, dispensable=dispensable)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._put([job])
        else:
            (self._beside if beside else self._gathered).append(job)
            if self._timer is None:
                self._timer = loop.call_later(POSTED_WAIT_S, self.hand_over)

    def hand_over(self) -> None:
        """Has done what the event loop has asked for; call it in the loop's thread, before it waits."""
        self._handing_over = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        gathered = self._gathered + self._beside if self._beside else self._gathered
        if gathered:
            self._gathered, self._beside = [], []
            if not self._do_at_once(gathered):
                self._put(gathered)

    def _do_at_once(self, batch: list[Job]) -> bool:
        """Commits a batch here and now, unless something may have to be waited for."""
        if self._quick is None or self._behind or len(batch) > MOST_AT_ONCE:
            return False
        begun = time.perf_counter()
        if begun < self._slow_until:
            return False
        if self._untidy >= TIDY_AFTER and self._tidying() is not None:
            return False
        if any(job.collector is _one_by_one for job in batch):
            return False  # may take any time
        todo = [job for job in batch if wanted(job)]
        try:
            results: list[Any] = []
            if todo:
                with self._database.transaction(self._quick, waits=False):
                    results = _done(self._quick, todo)
        except BlockingIOError:
            return False
        except Exception:  # noqa: BLE001 - the thread finds out whose fault it was
            return False
        ended = time.perf_counter()
        if ended - begun > SLOW_S:
            self._slow_until = ended + SLOW_FOR_S
        set_results([(job.waiter, result) for job, result in zip(todo, results, strict=True) if job.waiter])
        self._untidy += 1
        if self._untidy >= TIDY_AFTER and self._tidying() is None:
            self._untidy = 0
            self._tidier = threading.Thread(target=self._tidy, name="store-tidier", daemon=True)
            self._tidier.start()
        return True

    def _put(self, batch: list[Job] | None) -> None:
        """Hands a batch to the thread."""
        with self._counting:
            self._behind += 1
        self._queue.put(batch)

    def write_now(self, operation: Operation[T]) -> T:
        """`submit` for a program that may wait."""
        return self.submit(operation).result()

    def news(self) -> object:
        """See `Database.news`."""
        return self._database.news()

    def connect_reader(self) -> Connection:
        """One more connection for reading, e.g. for a long query in another thread; close it afterwards."""
        return self._database.connect()

    def claim(self, name: str) -> Claim | None:
        """Takes a name until it is released or this process dies; None while another process holds it."""
        return self._database.claim(name)

    def inherit(self, name: str) -> Claim | None:
        """See `Database.inherit`."""
        return self._database.inherit(name)

    def close(self) -> None:
        """Commits what was submitted and closes the database."""
        self.hand_over()
        self._put(None)
        self._thread.join()
        if self._tidier is not None:
            self._tidier.join()
        if self._quick is not None:
            self._quick.close()
        self._writer.close()
        self.reader.close()
        self._database.close()

    def _run(self) -> None:
        last = False
        while not last:
            batch: list[Job] = []
            taken = 0
            while not taken or (len(batch) < MOST_IN_A_BATCH and not self._queue.empty()):
                try:
                    jobs = self._queue.get(timeout=self._backlog.due_in_s())
                except queue.Empty:
                    break
                taken += 1
                if jobs is None:
                    last = True
                    break
                batch += jobs
            if self._untidy >= TIDY_AFTER and (tidier := self._tidying()) is not None:
                tidier.join()
            self._commit(self._backlog.take())
            self._commit([job for job in batch if wanted(job)])
            with self._counting:
                self._behind -= taken
        for _ in range(0, len(self._backlog), MOST_IN_A_BATCH):
            self._commit(self._backlog.take_anyway())
        if self._backlog:
            log.error("%d writes are lost: %s was not reached to the end", len(self._backlog), self._database.shown)

    def _commit(self, batch: Sequence[Job], again: bool = True) -> None:
        """Runs a batch in one transaction; where one operation fails, each runs in a transaction of its own.

        Where none can be begun, none is for any of them: who waits is told, the others are kept.

        Args:
            batch: What is to be done.
            again: To try once more where none can be begun: the connection to a server may have broken since the last.
        """
        if not batch:
            return
        begun = False
        try:
            with self._database.transaction(self._writer):
                begun = True
                results = _done(self._writer, batch)
        except StoreUnavailableError as error:
            if not begun and again and not self.local:
                self._commit(batch, again=False)
            elif len(batch) > 1 and begun and not error.perhaps_done:
                self._commit_each(batch)
            else:
                for job in batch:
                    if job.waiter is None:
                        self._backlog.keep(job)
                    else:
                        deliver_failure(job, error)
            return
        except Exception as error:  # noqa: BLE001 - it goes to whoever waits for the operation
            if len(batch) > 1:
                self._commit_each(batch)
            else:
                deliver_failure(batch[0], error)
            return
        deliver(batch, results)

    def _commit_each(self, batch: Sequence[Job]) -> None:
        for job in batch:
            self._commit([job])

    def _tidying(self) -> threading.Thread | None:
        tidier = self._tidier
        return tidier if tidier is not None and tidier.is_alive() else None

    def _tidy(self) -> None:
        try:
            self._database.tidy()
        except Exception:
            log.exception("the store could not be tidied up; trying again")


_collector = operator.attrgetter("collector")


def _done(connection: Connection, batch: Sequence[Job]) -> list[Any]:
    """The results of a batch, done in this order."""
    results: list[Any] = []
    for collector, jobs in itertools.groupby(batch, key=_collector):
        results += collector(connection, [job.item for job in jobs])
    return results


def _database(place: Path | str) -> Database:
    if isinstance(place, str) and "://" in place:
        from tokenmill.engine.gateway.postgres import Postgres

        return Postgres(place)
    from tokenmill.engine.gateway.sqlite import Sqlite

    return Sqlite(Path(place))
