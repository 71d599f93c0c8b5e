"""Guessing a short master key: at every door, with the log's word for it; a long one needs none of it."""

import contextlib
import re
from pathlib import Path

import pytest

from tests.gateway.governance.governed import CHAT, Governed
from tests.gateway.governance.test_lost_server import log_in
from tests.gateway.running import RunningGateway
from tests.gateway.upstream import FakeUpstream
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.governance.guesses import MOST_GUESSES, Guesses
from tokenmill.engine.gateway.governance.options import Options, digest
from tokenmill.engine.gateway.governance.schema import SCHEMA
from tokenmill.engine.gateway.seldom import Seldom
from tokenmill.engine.gateway.store import Store

SHORT, LONG = "sk-1234", "a-master-key-that-is-long"


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_short_key_is_compared_with_ten_guesses_a_minute() -> None:
    clock = Clock()
    guesses = Guesses(Options("unused", digest(SHORT), guessable=True), clock)
    for _ in range(3):
        for _ in range(MOST_GUESSES):
            assert guesses.is_master(digest(SHORT))
            assert guesses.refused() is None
            clock.now += 1
        assert not guesses.is_master(digest(SHORT))
        refused = guesses.refused()
        assert refused is not None and refused.status == 429
        assert dict(refused.headers)[b"retry-after"] == str(60 - MOST_GUESSES).encode()
        clock.now += 60 - MOST_GUESSES
    assert guesses.is_master(digest(SHORT))


def test_long_key_is_always_compared() -> None:
    guesses = Guesses(Options("unused", digest(LONG)))
    assert [guesses.refused() for _ in range(1000)] == [None] * 1000
    assert guesses.is_master(digest(LONG)) and not guesses.is_master(digest(SHORT))


def test_few_guesses_a_minute_change_nothing() -> None:
    clock = Clock()
    guesses = Guesses(Options("unused", digest(SHORT), guessable=True), clock)
    for _ in range(100):
        clock.now += 60 / (MOST_GUESSES - 1)
        assert guesses.refused() is None
        assert guesses.is_master(digest(SHORT))


def test_a_flood_is_a_line_a_minute() -> None:
    clock = Clock()
    seldom = Seldom(60, clock)
    assert [seldom.due() for _ in range(100)] == [1] + [0] * 99
    clock.now += 60
    assert [seldom.due() for _ in range(3)] == [100, 0, 0]


def test_guesses_at_all_doors_are_counted_together(
    shared_upstream: FakeUpstream, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = str(tmp_path / "gateway.db")
    options = Options(place, digest(SHORT), guessable=True)
    backend = Backend("a", shared_upstream.url, "utility")
    with (
        RunningGateway(backend, governance=options, key=SHORT) as gateway,
        contextlib.closing(Store(place, SCHEMA)) as store,
    ):
        _, key = Governed(gateway, store).key()

        def asked(credential: str) -> list[int]:
            bearer = {"authorization": f"Bearer {credential}"}
            return [
                gateway.post(CHAT, {"model": "tiny"}, **bearer)[0],
                gateway.send("GET", "/admin/settings", headers=bearer)[0],
                gateway.send("GET", "/key/info", headers=bearer)[0],
                gateway.send("GET", "/v1/models", headers=bearer)[0],
                log_in(gateway, credential)[0],
            ]

        assert asked(SHORT) == [200, 200, 400, 200, 303]
        for number in range(MOST_GUESSES // 5):
            assert asked(f"sk-{number:04}") == [401, 401, 401, 401, 403]
        assert asked("sk-0100") == [429] * 5
        assert asked(SHORT) == [429] * 5
        assert int(log_in(gateway, SHORT)[1]["retry-after"]) in range(1, 61)
        assert asked(key) == [200, 403, 200, 200, 403]
    logged = capfd.readouterr().err
    assert len(re.findall("unknown keys within a minute", logged)) == 1
    assert len(re.findall("a key that is not known here", logged)) == 1
    assert SHORT not in logged and "sk-0001" not in logged
