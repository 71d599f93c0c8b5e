"""One caller's requests that a backend cannot bear do not take it from the others; a backend that fails all is left."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.governance.governed import Governed, governing
from tests.gateway.running import wait_until
from tests.gateway.upstream import FakeUpstream
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.settings import Settings

FAILURES = 3
ERROR = {"content-type": "application/json"}
POISON = {"model": "tiny", "act": {"status": 500, "body": '{"error": {"message": "no"}}', "headers": ERROR}}
SILENT = {"model": "tiny", "act": {"delay_s": 20}}
GONE = {"model": "tiny", "act": {"cut_after": 0}}


@pytest.fixture
def governed(upstream: FakeUpstream, tmp_path: Path) -> Iterator[Governed]:
    settings = Settings(
        probe_interval_s=0.1, breaker_failures=FAILURES, breaker_cooldown_s=60, read_timeout_s=0.3, workers=1
    )
    with governing(str(tmp_path / "books"), Backend("a", upstream.url, "t", ("tiny",)), settings=settings) as running:
        yield running


def statuses(governed: Governed, key: str, body: dict[str, Any], count: int) -> list[int]:
    return [governed.ask(key, body)[0] for _ in range(count)]


def test_one_keys_poison_shuts_out_that_key_alone(governed: Governed, upstream: FakeUpstream) -> None:
    (_, poisoner), (_, other) = governed.key(), governed.key()
    # With nobody else's request in between, nor at the same time.
    assert statuses(governed, poisoner, POISON, FAILURES + 2) == [500] * FAILURES + [503] * 2
    assert len(upstream.books.requests) == FAILURES
    assert governed.ask(other, {"model": "tiny"})[0] == 200


@pytest.mark.parametrize("mine", [FAILURES - 1, FAILURES])
def test_a_backend_that_fails_two_keys_is_asked_by_nobody(governed: Governed, mine: int) -> None:
    (_, one), (_, two), (_, three) = governed.key(), governed.key(), governed.key()
    assert statuses(governed, one, POISON, mine) == [500] * mine
    assert governed.ask(two, POISON)[0] == 500
    assert [governed.ask(key, {"model": "tiny"})[0] for key in (one, two, three)] == [503] * 3


@pytest.mark.parametrize(("body", "status"), [(SILENT, 504), (GONE, 503)])
def test_a_backend_that_one_key_does_not_hear_is_asked_by_nobody(
    governed: Governed, upstream: FakeUpstream, body: dict[str, Any], status: int
) -> None:
    (_, one), (_, other) = governed.key(), governed.key()
    assert statuses(governed, one, body, FAILURES) == [status] * FAILURES
    wait_until(lambda: upstream.books.open == 0)
    seen = len(upstream.books.requests)
    assert governed.ask(other, {"model": "tiny"})[0] == 503
    assert len(upstream.books.requests) == seen
