"""A gateway with governance, shared by the tests of a module; a store of each kind."""

from collections.abc import Iterator

import pytest

from tests.gateway.governance.conftest import postgres, store
from tests.gateway.upstream import FakeUpstream
from tests.gateway.workers import Workers
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.money import Prices

__all__ = ["postgres", "store", "workers"]
#: A dollar per thousand tokens.
PRICES = Prices(100_000_000_000, 100_000_000_000, 100_000_000_000)


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    upstream = FakeUpstream().start()
    backends = (
        Backend("a", upstream.url, "utility", models=("tiny",), prices=PRICES, version="1"),
        Backend("b", upstream.url, "utility", models=("tiny",), prices=PRICES, version="2", canary=0.0),
    )
    with Workers(tmp_path_factory.mktemp("admin"), *backends, count=2) as running:
        yield running
    upstream.stop()
