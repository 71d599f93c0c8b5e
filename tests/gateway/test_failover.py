"""Several backends behind one model: a request that can still be served is served, and none is repeated unsafely."""

import json
import threading
from collections.abc import Iterator

import pytest
from aiohttp import web

from tests.gateway.running import RunningGateway, wait_until
from tests.gateway.upstream import Books, FakeUpstream
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.health import CATALOG_EVERY
from tokenmill.engine.gateway.settings import Settings

CHAT = "/v1/chat/completions"
ERROR = {"content-type": "application/json"}


@pytest.fixture
def pair() -> Iterator[tuple[FakeUpstream, FakeUpstream]]:
    servers = FakeUpstream().start(), FakeUpstream().start()
    yield servers
    for server in servers:
        server.stop()


def seen(pair: tuple[FakeUpstream, FakeUpstream]) -> int:
    """Requests that both have seen."""
    return sum(len(server.books.requests) for server in pair)


def test_backend_that_goes_away_costs_no_request(pair: tuple[FakeUpstream, FakeUpstream]) -> None:
    backends = [Backend(f"b{index}", server.url, "t", ("tiny",)) for index, server in enumerate(pair)]
    # Probes are slow on purpose: what is found out here is found out by the requests themselves.
    with RunningGateway(*backends, settings=Settings(probe_interval_s=30)) as gateway:
        statuses: list[int] = []

        def ask() -> None:
            for _ in range(60):
                statuses.append(gateway.post(CHAT, {"model": "tiny", "act": {"delay_s": 0.01}})[0])

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(pair[0].books.requests) > 10)
        in_flight = pair[0].books.open
        pair[0].pause()
        for thread in threads:
            thread.join()
    # What it had begun may be lost when the retry budget is spent; nothing else may.
    assert len(statuses) == 240
    assert statuses.count(200) >= 240 - in_flight
    assert set(statuses) <= {200, 503}


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_refused_request_goes_to_another_backend(pair: tuple[FakeUpstream, FakeUpstream], status: int) -> None:
    refusing, willing = pair
    backends = Backend("refusing", refusing.url, "t", ("tiny",)), Backend("willing", willing.url, "t", ("tiny",))
    body = {"model": "tiny", "act": {"status": status, "body": '{"error": {"message": "busy"}}', "headers": ERROR}}
    with RunningGateway(*backends) as gateway:
        got, headers, answer = gateway.post(CHAT, body)
    # Both refuse: each was asked once, and the refusal comes through with a time to come back.
    assert (got, json.loads(answer)) == (status, {"error": {"message": "busy"}})
    assert len(refusing.books.requests) == len(willing.books.requests) == 1
    assert headers.get("retry-after") == ("2" if status in (429, 503) else None)


@pytest.mark.parametrize("status", [400, 401, 403, 409, 422])
def test_other_errors_are_not_repeated(pair: tuple[FakeUpstream, FakeUpstream], status: int) -> None:
    backends = [Backend(f"b{index}", server.url, "t", ("tiny",)) for index, server in enumerate(pair)]
    body = {"model": "tiny", "act": {"status": status, "body": '{"error": {"message": "no"}}', "headers": ERROR}}
    with RunningGateway(*backends) as gateway:
        assert gateway.post(CHAT, body)[0] == status
    assert seen(pair) == 1


def test_retries_do_not_multiply_the_load(pair: tuple[FakeUpstream, FakeUpstream]) -> None:
    backends = [Backend(f"b{index}", server.url, "t", ("tiny",)) for index, server in enumerate(pair)]
    settings = Settings(breaker_failures=10_000, retry_ratio=0.1)
    body = {"model": "tiny", "act": {"status": 503, "body": '{"error": {"message": "no"}}', "headers": ERROR}}
    with RunningGateway(*backends, settings=settings) as gateway:
        for _ in range(200):
            assert gateway.post(CHAT, body)[0] == 503
    assert seen(pair) <= 200 * 1.1 + 10


def test_circuit_opens_and_closes(pair: tuple[FakeUpstream, FakeUpstream]) -> None:
    server = pair[0]
    settings = Settings(breaker_failures=3, breaker_cooldown_s=0.5, probe_interval_s=0.1)
    failing = {"model": "tiny", "act": {"status": 500, "body": '{"error": {"message": "no"}}', "headers": ERROR}}
    with RunningGateway(Backend("a", server.url, "t", ("tiny", "other")), settings=settings) as gateway:
        assert [gateway.post(CHAT, failing)[0] for _ in range(4)] == [500, 500, 500, 503]
        assert len(server.books.requests) == 3
        assert gateway.post(CHAT, {"model": "other"})[0] == 200
        wait_until(lambda: gateway.post(CHAT, {"model": "tiny"})[0] == 200, timeout_s=20)


def test_full_backend_bursts_to_the_next_and_then_refuses(pair: tuple[FakeUpstream, FakeUpstream]) -> None:
    backends = [
        Backend(f"b{index}", server.url, "t", ("tiny",), max_concurrency=2) for index, server in enumerate(pair)
    ]
    with RunningGateway(*backends) as gateway:
        statuses: list[int] = []
        body = {"model": "tiny", "act": {"delay_s": 0.5}}
        threads = [threading.Thread(target=lambda: statuses.append(gateway.post(CHAT, body)[0])) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: sum(server.books.open for server in pair) == 4)
        status, headers, answer = gateway.post(CHAT, {"model": "tiny"})
        assert (status, json.loads(answer)["error"]["code"]) == (429, "overloaded")
        assert "retry-after" in headers
        for thread in threads:
            thread.join()
        assert statuses == [200] * 4
        assert gateway.post(CHAT, {"model": "tiny"})[0] == 200
    assert [server.books.most_open for server in pair] == [2, 2]


@pytest.fixture
def dying(pair: tuple[FakeUpstream, FakeUpstream]) -> Iterator[tuple[RunningGateway, FakeUpstream, FakeUpstream]]:
    """A tier whose only backend is the first, and a fallback to the second."""
    first, other = pair
    settings = Settings(probe_interval_s=0.1, breaker_failures=3, read_timeout_s=1.0, fallbacks={"t": ("u",)})
    backends = Backend("first", first.url, "t", ("tiny",)), Backend("other", other.url, "u", ("other",))
    with RunningGateway(*backends, settings=settings) as gateway:
        yield gateway, first, other


def test_a_stream_that_breaks_before_its_first_byte_goes_on_elsewhere(
    pair: tuple[FakeUpstream, FakeUpstream],
) -> None:
    backends = [Backend(f"b{index}", server.url, "t", (f"m{index}",)) for index, server in enumerate(pair)]
    body = {"model": "t", "stream": True, "act": {"m0": {"cut_head": True}, "m1": {}}}
    with RunningGateway(*backends) as gateway:
        for _ in range(40):
            status, headers, answer = gateway.post(CHAT, body)
            assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
            assert answer == pair[1].books.sent[-1]
        assert pair[0].books.requests, "the dying one was never asked"


def test_a_stream_that_breaks_before_its_first_byte_falls_back(
    dying: tuple[RunningGateway, FakeUpstream, FakeUpstream],
) -> None:
    gateway, first, other = dying
    body = {"model": "t", "stream": True, "act": {"tiny": {"cut_head": True}, "other": {}}}
    for _ in range(5):
        status, headers, answer = gateway.post(CHAT, body)
        assert (status, headers["x-tokenmill-fallback"], answer) == (200, "u", other.books.sent[-1])
    assert len(first.books.requests) == 3, "each counts as a failure: the circuit opens"


def test_a_stream_that_breaks_before_its_first_byte_everywhere_is_an_error(
    dying: tuple[RunningGateway, FakeUpstream, FakeUpstream],
) -> None:
    gateway, _, _ = dying
    status, headers, answer = gateway.post(CHAT, {"model": "t", "stream": True, "act": {"cut_head": True}})
    assert (status, json.loads(answer)["error"]["code"]) == (503, "service_unavailable")
    assert "retry-after" in headers


def test_a_stream_that_is_silent_after_its_head_is_a_timeout(
    dying: tuple[RunningGateway, FakeUpstream, FakeUpstream],
) -> None:
    gateway, _, other = dying
    body = {"model": "t", "stream": True, "act": {"head_s": 30}}
    status, _, answer = gateway.post(CHAT, body)
    assert (status, json.loads(answer)["error"]["code"]) == (504, "timeout")
    status, headers, answer = gateway.post(CHAT, {**body, "act": {"tiny": {"head_s": 30}, "other": {}}})
    assert (status, headers["x-tokenmill-fallback"], answer) == (200, "u", other.books.sent[-1])


def test_a_backend_without_a_list_of_models_is_seldom_asked_for_one() -> None:
    class Closed(FakeUpstream):
        asked, probed = 0, 0

        async def _health(self, request: web.Request) -> web.Response:
            self.probed += 1
            return await super()._health(request)

        async def _list(self, _request: web.Request) -> web.Response:
            self.asked += 1
            return web.Response(status=401)

    server = Closed().start()
    with RunningGateway(Backend("a", server.url, "t", ("tiny",)), settings=Settings(probe_interval_s=0.01)) as gateway:
        wait_until(lambda: server.probed > 2 * CATALOG_EVERY)
        assert gateway.post(CHAT, {"model": "tiny"})[0] == 200
        assert server.asked <= 2 + server.probed // CATALOG_EVERY
    server.stop()


def test_unhealthy_backend_is_left_alone(pair: tuple[FakeUpstream, FakeUpstream]) -> None:
    sick, well = pair
    backends = Backend("sick", sick.url, "t", ("tiny",)), Backend("well", well.url, "t", ("tiny",))
    with RunningGateway(*backends) as gateway:
        sick.healthy = False
        wait_until(lambda: b'tokenmill_backend_up{backend="sick",tier="t"} 0.0' in gateway.get("/metrics")[2])
        sick.books = Books()
        for _ in range(20):
            assert gateway.post(CHAT, {"model": "tiny"})[0] == 200
        assert not sick.books.requests
        assert gateway.get("/ready")[0] == 200
