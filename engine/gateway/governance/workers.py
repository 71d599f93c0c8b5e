"""The processes that hold reservations, and what becomes of those of a process that died.

Every process claims its id in the store; the claim ends with the process, however it ends. Whoever can take the claim
of a process that is still listed knows that it is dead, and settles what it had reserved.
"""

import uuid
from functools import partial
from typing import Any

from tokenmill.engine.gateway.governance import audit, books
from tokenmill.engine.gateway.governance.budgets import Spending
from tokenmill.engine.gateway.store import Claim, Connection, Store, now_ms


class WorkerLock:
    """Proof that this process lives.

    Args:
        store: The store.
    """

    def __init__(self, store: Store) -> None:
        self.id = uuid.uuid4().hex
        self._store = store
        # Claimed before anybody can read of it.
        claim = store.claim(self.id)
        assert claim is not None, "a new random id is taken"
        self._claim: Claim = claim
        store.write_now(
            lambda connection: connection.execute(
                "INSERT INTO workers (id, started_at) VALUES (?, ?)", (self.id, now_ms())
            )
        )

    def leave(self) -> None:
        """Settles what is still reserved and goes; blocks until that is committed."""
        self._store.write_now(partial(_bury, worker=self.id))
        self.close()

    def close(self) -> None:
        """Goes; what is still reserved is settled by whoever comes next."""
        self._claim.release()


def recover(store: Store) -> int:
    """Settles what dead processes had reserved, at its full amount; returns for how many requests. Blocks."""
    settled = 0
    rows: list[tuple[str]] = store.write_now(lambda connection: connection.execute("SELECT id FROM workers").fetchall())
    for (worker,) in rows:
        claim = store.claim(worker)
        if claim is not None:
            try:
                settled += store.write_now(partial(_bury, worker=worker))
            finally:
                claim.release()
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
