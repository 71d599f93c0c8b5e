"""However many look, and however long it takes, figures are collected once at a time."""

import asyncio
from typing import Any, cast

import pytest

from tests.gateway.governance.governed import options
from tokenmill.engine.gateway.dashboard import site
from tokenmill.engine.gateway.dashboard.figures import Figures, Sources
from tokenmill.engine.gateway.governance.service import Governance


def test_of_a_large_ledger_pages_get_what_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = 0

    async def live() -> None:
        slow = asyncio.Event()

        async def collect(_sources: Sources, _span: str) -> Figures:
            nonlocal begun
            begun += 1
            await slow.wait()
            return cast("Figures", begun)

        monkeypatch.setattr(site, "collect", collect)
        monkeypatch.setattr(site, "KEPT_S", 0.0)
        nothing: Any = None
        pages = site.DashboardSite(Sources(Governance(options("unused")), nothing, nothing))
        looking = []
        for _ in range(3):
            looking.append(asyncio.create_task(pages._figures("24h")))
            await asyncio.sleep(0.01)
        slow.set()
        found: list[Any] = await asyncio.gather(*looking)
        found.append(await pages._figures("24h"))
        assert found == [1, 1, 1, 2]

    asyncio.run(live())
