"""The processes that hold reservations, and what becomes of those of a process that died.

Every process claims its id in the store; the claim ends with the process, however it ends. Whoever inherits the claim
of a process that is listed, or has reservations, knows that it is dead, and settles what it had reserved. Should one be
taken for dead that lives (a server that lost its connection may do so), its requests are charged as lost, once: their
own settlements find nothing left to settle. What it reserves from then on is looked after like before.
"""

import uuid
from functools import partial
from typing import Any

from tokenmill.engine.gateway.database import Claim, Connection, now_ms
from tokenmill.engine.gateway.governance import accounts, audit, books
from tokenmill.engine.gateway.governance.budgets import Spending
from tokenmill.engine.gateway.store import Store


class WorkerLock:
    """Proof that this process lives.

    Args:
        store: The store.

    Attributes:
        beside: The processes that were there at the last look, this one among them.
    """

    def __init__(self, store: Store) -> None:
        self.id = uuid.uuid4().hex
        self.beside: set[str] = set()
        self._store = store
        # Claimed before anybody can read of it.
        claim = store.claim(self.id)
        assert claim is not None, "a new random id is taken"
        self._claim: Claim = claim
        store.write_now(self.enlist)

    def enlist(self, connection: Connection) -> None:
        """Lists it, where it is not."""
        connection.execute(
            "INSERT INTO workers (id, started_at) VALUES (?, ?) ON CONFLICT (id) DO NOTHING", (self.id, now_ms())
        )

    def leave(self) -> None:
        """Settles what is still reserved and goes; blocks until that is committed."""
        self._store.write_now(partial(_bury, worker=self.id))
        self.close()

    def close(self) -> None:
        """Goes; what is still reserved is settled by whoever comes next."""
        self._claim.release()


def recover(store: Store, own: WorkerLock | None = None) -> int:
    """Settles what dead processes had reserved, at its full amount; returns for how many requests. Blocks.

    Args:
        store: The store.
        own: This process, which is listed again should others have taken it for dead.
    """
    settled = 0
    # A process that was taken for dead, and was not, has reservations though it is not listed.
    query = "SELECT id FROM workers UNION SELECT worker FROM reservations"
    rows: list[tuple[str]] = store.write_now(lambda connection: connection.execute(query).fetchall())
    for (worker,) in rows:
        claim = store.inherit(worker)
        if claim is not None:
            try:
                settled += store.write_now(partial(_bury, worker=worker))
            finally:
                claim.release()
    if own is not None and (own.id,) not in rows:
        store.write_now(own.enlist)
    if own is not None and own.beside != (beside := {worker for (worker,) in rows}):
        # Who came or went may have been of an older version.
        store.write_now(accounts.count_anew)
        own.beside = beside
    return settled


def _bury(connection: Connection, worker: str) -> int:
    rows: list[Any] = connection.execute(
        "SELECT call, prompt_bound, completion_bound, amount FROM reservations WHERE worker = ?", (worker,)
    ).fetchall()
    for call, prompt, completion, amount in rows:
        books.settle(connection, call, Spending("", "", prompt, 0, completion, False, amount, "lost", 0, 0))
    connection.execute("DELETE FROM workers WHERE id = ?", (worker,))
    if rows:
        audit.append(connection, "gateway", "worker.lost", worker, {"requests": len(rows)})
    return len(rows)
