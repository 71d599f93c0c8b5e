"""The services beside the requests while the store cannot be reached: a line now and then, no traceback each second."""

import asyncio
import logging
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tokenmill.engine.gateway.admin import canaries, rollup
from tokenmill.engine.gateway.admin.canaries import Canaries
from tokenmill.engine.gateway.admin.rollup import Rollup
from tokenmill.engine.gateway.database import StoreUnavailableError
from tokenmill.engine.gateway.governance.service import Governance
from tokenmill.engine.gateway.portfolio import Portfolio
from tokenmill.engine.gateway.settings import Settings


class GoneStore:
    """A store that takes the tables and is away from then on.

    Args:
        answered: How many reads it answers before.
    """

    def __init__(self, answered: int) -> None:
        self.reads = 0
        self._answered = answered
        self.reader = SimpleNamespace(execute=self._execute)

    async def write(self, _operation: Any) -> None:
        pass

    def connect_reader(self) -> Any:
        return SimpleNamespace(execute=self._execute, close=lambda: None)

    def _execute(self, *_: Any) -> Any:
        self.reads += 1
        if self.reads <= self._answered:
            return []
        raise StoreUnavailableError("postgresql://books cannot be used: connection refused; see governance.store")


@pytest.mark.parametrize("kind", ["canaries", "rollup"])
def test_a_store_that_is_away_is_told_in_lines(
    kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canaries, "POLL_S", 0.001)
    monkeypatch.setattr(rollup, "EVERY_S", 0.001)
    store = GoneStore(1 if kind == "canaries" else 0)
    governance = cast("Governance", SimpleNamespace(store=store))

    async def run() -> None:
        service = Canaries(Portfolio([], Settings()), governance) if kind == "canaries" else Rollup(governance)
        await service.start()
        while store.reads < 10:
            await asyncio.sleep(0.001)
        await service.stop()

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
    assert caplog.records
    assert all("connection refused" in record.getMessage() and not record.exc_info for record in caplog.records)
    assert kind == "rollup" or len(caplog.records) == 1
