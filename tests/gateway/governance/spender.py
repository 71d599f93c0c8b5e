"""A process that spends from one key as fast as it can, to be killed at any moment.

`python spender.py DATABASE KEY JOURNAL SEED`: each request that was let through is written to JOURNAL ("CALL COST")
before its settlement is submitted, as an upstream's own books would have it.
"""

import random
import sys
import threading
import uuid
from pathlib import Path

from tokenmill.engine.gateway.database import now_ms
from tokenmill.engine.gateway.governance import accounts, books
from tokenmill.engine.gateway.governance.budgets import Refusal, Reservation, Spending
from tokenmill.engine.gateway.governance.schema import SCHEMA
from tokenmill.engine.gateway.governance.workers import WorkerLock
from tokenmill.engine.gateway.store import Store


def spend(store: Store, worker: str, key: str, journal: Path, seed: int) -> None:
    """Requests one after the other until the budget refuses even the smallest."""
    generator = random.Random(seed)
    chain = store.write_now(lambda connection: tuple(one.id for one in accounts.chain(connection, key)))
    with journal.open("a", encoding="ascii", buffering=1) as book:
        while True:
            bound = generator.randint(1, 900)
            wanted = Reservation(uuid.uuid4().hex, worker, chain, "r", "m", "t", bound, bound, 0, now_ms())
            answer = store.write_now(lambda connection, wanted=wanted: books.reserve(connection, wanted))
            if isinstance(answer, Refusal):
                if bound == 1:
                    return
                continue
            cost = generator.randint(0, bound)
            book.write(f"{wanted.call} {cost}\n")
            spending = Spending("b", "t", cost, 0, 0, True, cost, "ok", 200, 1)
            store.submit(
                lambda connection, wanted=wanted, spending=spending: books.settle(connection, wanted.call, spending)
            )


def main() -> None:
    """Eight clients at once."""
    database, key, journal, seed = sys.argv[1:]
    store = Store(database, SCHEMA)
    worker = WorkerLock(store)
    print("ready", flush=True)
    clients = [
        threading.Thread(target=spend, args=(store, worker.id, key, Path(f"{journal}.{index}"), int(seed) * 8 + index))
        for index in range(8)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    store.close()
    worker.close()


if __name__ == "__main__":
    main()
