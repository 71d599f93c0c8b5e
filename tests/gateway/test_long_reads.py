"""Queries that take long end when nobody waits for them, and hold up nothing else that threads do."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.gateway.governance.conftest import postgres, store
from tokenmill.engine.gateway.database import Connection
from tokenmill.engine.gateway.long_reads import AT_ONCE, LongReads
from tokenmill.engine.gateway.store import Store

__all__ = ["postgres", "store"]


def endless(connection: Connection) -> Any:
    """A statement without an end."""
    return connection.execute(
        "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT 1 - i FROM n) SELECT count(*) FROM n"
    ).fetchone()


def repeated(connection: Connection) -> Any:
    """Short statements without an end."""
    while True:
        connection.execute("SELECT 1").fetchone()
        time.sleep(0.001)


@pytest.mark.parametrize("read", [endless, repeated])
def test_what_nobody_waits_for_ends(store: Store, read: Callable[[Connection], Any]) -> None:
    async def live() -> None:
        reads = LongReads(store)
        waiting = [asyncio.create_task(reads.run(read)) for _ in range(AT_ONCE + 2)]
        # The event loop's own threads are free.
        assert await asyncio.to_thread(int) == 0
        await asyncio.wait(waiting, timeout=0.1)
        for one in waiting:
            one.cancel()
        assert await reads.run(lambda connection: connection.execute("SELECT 7").fetchone()[0]) == 7
        last = asyncio.create_task(reads.run(read))
        await asyncio.wait([last], timeout=0.1)
        await asyncio.to_thread(reads.close)
        with pytest.raises(Exception, match=r"interrupt|cancel|^$"):
            await last

    asyncio.run(asyncio.wait_for(live(), 60))


def test_an_error_is_whoever_waits(store: Store) -> None:
    async def live() -> None:
        reads = LongReads(store)
        with pytest.raises(ZeroDivisionError):
            await reads.run(lambda _: 1 // 0)
        reads.close()

    asyncio.run(live())
