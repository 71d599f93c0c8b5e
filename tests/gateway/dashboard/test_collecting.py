"""However many look, and however long it takes, figures are collected once at a time."""

import asyncio
from typing import Any, cast

import pytest

from tests.gateway.governance.governed import options
from tokenmill.engine.gateway.dashboard import figures, site
from tokenmill.engine.gateway.dashboard.figures import Figures, Sources
from tokenmill.engine.gateway.governance.service import Governance
from tokenmill.engine.gateway.observability.shared import Report, Seen
from tokenmill.engine.gateway.portfolio import NOT_PROBED


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


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ([(False, NOT_PROBED), (False, "connection refused")], (False, "connection refused")),
        ([(False, "connection refused"), (False, NOT_PROBED)], (False, "connection refused")),
        ([(False, "connection refused"), (True, "")], (True, "")),
        ([(True, ""), (False, "connection refused")], (True, "")),
        ([(False, NOT_PROBED), (False, NOT_PROBED)], (False, NOT_PROBED)),
    ],
)
def test_a_worker_that_has_not_looked_at_a_backend_does_not_hide_what_another_found(
    told: list[tuple[bool, str]], shown: tuple[bool, str]
) -> None:
    def seen(pid: int, up: bool, reason: str) -> Seen:
        state = {"name": "a", "up": up, "reason": reason, "outstanding": pid, "open_circuits": [f"m{pid}"]}
        return Seen(Report(pid, [], backends=[state]), True)

    (backend,) = figures._backends([seen(number, *one) for number, one in enumerate(told, 1)], {})
    assert (backend["up"], backend["reason"]) == shown
    assert (backend["outstanding"], backend["open_circuits"]) == (3, ["m1", "m2"])
