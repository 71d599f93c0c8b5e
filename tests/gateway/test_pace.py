"""What one backend may be sent, at once and in a minute (a sliding window): shared between processes in equal parts."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.gateway.running import RunningGateway
from tests.gateway.upstream import Books, FakeUpstream
from tests.gateway.workers import MASTER_KEY, Workers
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.pace import Pace, share
from tokenmill.engine.gateway.portfolio import Portfolio
from tokenmill.engine.gateway.principal import Principal
from tokenmill.engine.gateway.settings import Settings

CHAT = "/v1/chat/completions"


def test_requests_slide_out_of_the_window_one_by_one() -> None:
    now = 0.0
    pace = Pace(2, None, lambda: now)
    assert pace.allows()
    pace.sent()
    now = 30.0
    assert pace.allows()
    pace.sent()
    assert not pace.allows()
    now = 59.9
    assert not pace.allows()
    now = 60.0
    assert pace.allows()
    pace.sent()
    assert not pace.allows()


def test_tokens_count_when_they_are_known() -> None:
    now = 0.0
    pace = Pace(None, 100, lambda: now)
    pace.used(99)
    assert pace.allows()
    pace.used(1)
    assert not pace.allows()
    pace.used(50)
    assert not pace.allows()
    now = 61.0
    assert pace.allows()


@pytest.mark.parametrize(("limit", "workers", "part"), [(None, 4, None), (9, 4, 2), (3, 4, 1)])
def test_workers_share_a_limit(limit: int | None, workers: int, part: int | None) -> None:
    assert share(limit, workers) == part


def test_workers_share_what_a_backend_may_have_open(shared_upstream: FakeUpstream, tmp_path: Path) -> None:
    backend = Backend("a", shared_upstream.url, "t", ("tiny",), max_concurrency=2)
    settings = Settings(probe_interval_s=0.1, workers=2)
    with Workers(tmp_path, backend, count=2, settings=settings) as workers:
        shared_upstream.books = Books()
        # All are there before the first is answered.
        with ThreadPoolExecutor(24) as clients:
            answers = list(clients.map(lambda _: workers.chat(MASTER_KEY, act={"delay_s": 0.5})[0], range(24)))
    assert set(answers) == {200, 429}
    assert shared_upstream.books.most_open <= 2
    alone = Portfolio([Backend("a", "http://127.0.0.1:9", "t", ("m",), max_concurrency=1)], Settings(workers=4))
    (target,) = alone.targets
    assert target.has_room(), "below the number of workers a limit is that number"
    target.outstanding = 1
    assert not target.has_room()


def test_a_request_beyond_the_pace_goes_to_the_fallback_and_then_to_nobody(shared_upstream: FakeUpstream) -> None:
    settings = Settings(probe_interval_s=0.1, fallbacks={"first": ("second",)})
    backends = (
        Backend("a", shared_upstream.url, "first", models=("tiny",), requests_per_minute=1),
        Backend("b", shared_upstream.url, "second", models=("spare",), tokens_per_minute=1),
    )
    with RunningGateway(*backends, settings=settings) as gateway:
        answers = [gateway.post(CHAT, {"model": "tiny", "messages": []}) for _ in range(3)]
        assert [status for status, _, _ in answers] == [200, 200, 429]
        assert b'"model": "spare"' in answers[1][2]
        assert b'tokenmill_upstream_requests_total{backend="b",tier="second"} 1.0' in gateway.get("/metrics")[2]


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        (None, [None]),
        (("first", "second"), [None]),
        (("first", "spare"), ["spare"]),
        (("first",), []),
    ],
)
def test_nothing_falls_back_to_what_a_key_may_not_ask_for(
    models: tuple[str, ...] | None, expected: list[str | None]
) -> None:
    backends = (
        Backend("a", "http://127.0.0.1:9", "first", models=("tiny",)),
        Backend("b", "http://127.0.0.1:9", "second", models=("spare", "other")),
    )
    portfolio = Portfolio(backends, Settings(fallbacks={"first": ("second",)}))
    own, *others = portfolio.routes("first", Principal("key", models=models))
    assert own.targets[0].backend.name == "a"
    assert [route.model for route in others] == expected
    assert all(route.targets[0].backend.name == "b" for route in others)
