"""What probes say of a backend, and what waits for them."""

import asyncio
from typing import Any

import pytest
from aiohttp import web

from tests.gateway.running import RunningGateway
from tests.gateway.upstream import FakeUpstream
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.health import Prober
from tokenmill.engine.gateway.portfolio import Portfolio
from tokenmill.engine.gateway.settings import Settings


class Silent:
    """Takes requests and never answers."""

    async def send(self, *_request: Any) -> Any:
        """See `Upstream`."""
        await asyncio.Event().wait()


@pytest.mark.parametrize(("outstanding", "up"), [(0, False), (1, True)])
def test_a_server_that_computes_for_us_may_be_late(outstanding: int, up: bool) -> None:
    settings = Settings(probe_timeout_s=0.01)
    portfolio = Portfolio([Backend("a", "http://127.0.0.1:9", "t", ("m",))], settings)
    (target,) = portfolio.targets
    target.mark_up()
    target.outstanding = outstanding
    prober = Prober(portfolio, Silent, settings)  # type: ignore[arg-type]
    asyncio.run(prober.probe(target, catalog=True))
    assert target.up is up
    assert target.reason == ("" if up else "no answer within 0.01 s")


def test_the_first_request_finds_the_models_that_a_backend_lists() -> None:
    class Slow(FakeUpstream):
        async def _list(self, request: web.Request) -> web.Response:
            await asyncio.sleep(0.3)
            return await super()._list(request)

    upstream = Slow().start()
    gateway = RunningGateway(Backend("a", upstream.url, "utility"))
    # The socket listens before the worker does: this waits for it.
    status, _, answer = gateway.post("/v1/completions", {"model": "tiny", "prompt": "x"})
    with gateway:
        assert status == 200, answer
    upstream.stop()
