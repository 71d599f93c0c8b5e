"""Two workers with some traffic behind them."""

from collections.abc import Iterator

import pytest

from tests.gateway.upstream import FakeUpstream
from tests.gateway.workers import Workers
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.money import Prices
from tokenmill.engine.gateway.router.settings import RoutingSettings

HOSTILE = '<script>alert("x")</script>'


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    upstream = FakeUpstream().start()
    prices = Prices(100_000_000_000, 100_000_000_000, 100_000_000_000)
    backends = (
        Backend("a", upstream.url, "utility", models=("tiny",), prices=prices, quality=0.9),
        Backend("gone", "http://127.0.0.1:9", "cloud", models=("far",), zone="cloud", prices=prices, quality=0.95),
    )
    folder = tmp_path_factory.mktemp("dashboard")
    running = Workers(folder, *backends, count=2, routing=RoutingSettings(), wait_for=("utility",))
    with running:
        account = {"kind": "team", "id": "search", "name": HOSTILE, "limits": {"hard_limit_dollars": 1000}}
        running.json("POST", "/admin/accounts", account, status=201)
        key = running.json("POST", "/admin/keys", {"parent": "search"}, status=201)["key"]
        for _ in range(6):
            assert running.chat(key, "tiny", stream=True)[0] == 200
            assert running.chat(key, "auto")[0] == 200
        yield running
    upstream.stop()
