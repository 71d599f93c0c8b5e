"""The circuit breaker's states and the retry budget's bound."""

import random

import pytest

from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.breaker import MAX_BACKOFF, Breaker, RetryBudget
from tokenmill.engine.gateway.forward import Lease
from tokenmill.engine.gateway.pipeline import Call
from tokenmill.engine.gateway.portfolio import Target
from tokenmill.engine.gateway.settings import Settings


class Clock:
    """Time that moves when told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_opens_after_failures_in_a_row_only() -> None:
    breaker = Breaker(3, 2.0, Clock())
    for _ in range(5):
        breaker.failed()
        breaker.failed()
        breaker.succeeded()
    assert breaker.state == "closed"
    for _ in range(3):
        assert breaker.wait_s() == 0
        breaker.failed()
    assert breaker.state == "open"
    assert breaker.wait_s() == 2.0


def test_half_open_lets_one_through_and_backs_off() -> None:
    clock = Clock()
    breaker = Breaker(1, 2.0, clock)
    breaker.failed()
    cooldown = 2.0
    for _ in range(8):
        clock.now += cooldown
        assert breaker.state == "half-open"
        assert breaker.wait_s() == 0
        breaker.begin()
        assert breaker.wait_s() > 0
        breaker.failed()
        cooldown = min(cooldown * 2, 2.0 * MAX_BACKOFF)
        assert breaker.wait_s() == cooldown
    clock.now += cooldown
    breaker.begin()
    breaker.succeeded()
    assert breaker.state == "closed"
    assert breaker.wait_s() == 0


@pytest.mark.parametrize("key", ["a", None])
def test_what_was_under_way_when_it_opened_does_not_open_it_for_longer(key: str | None) -> None:
    clock = Clock()
    breaker = Breaker(3, 2.0, clock)
    for _ in range(30):  # a backend that dies takes all of them with it
        breaker.failed(key)
        clock.now += 0.01
    assert breaker.wait_s(key) < 2.0
    clock.now += 2
    breaker.begin(key)
    breaker.failed(key)
    breaker.failed(key)
    assert breaker.wait_s(key) == 4.0


def test_trial_that_never_ends_is_given_up() -> None:
    clock = Clock()
    breaker = Breaker(1, 2.0, clock)
    breaker.failed()
    clock.now += 2
    breaker.begin()
    clock.now += 2
    assert breaker.wait_s() == 0


def test_failures_of_one_key_open_it_for_that_key_alone() -> None:
    clock = Clock()
    breaker = Breaker(3, 2.0, clock)
    for _ in range(4):
        breaker.failed("a")
    assert (breaker.wait_s("a"), breaker.wait_s("b"), breaker.wait_s()) == (2.0, 0, 0)
    # What the other sends meanwhile is no trial.
    clock.now += 2
    breaker.begin("b")
    assert breaker.wait_s("a") == 0
    breaker.begin("a")
    assert breaker.wait_s("a") > 0
    breaker.succeeded()
    assert (breaker.state, breaker.wait_s("a")) == ("closed", 0)


@pytest.mark.parametrize("other", ["b", None])
def test_what_fails_for_others_too_is_open_for_all(other: str | None) -> None:
    for alone in (2, 7):
        clock = Clock()
        breaker = Breaker(3, 2.0, clock)
        for _ in range(alone):
            clock.now += breaker.wait_s("a")
            breaker.failed("a")
        assert breaker.wait_s("b") == 0
        breaker.failed(other)
        # Whatever the first one's time was: it is new to the others.
        assert breaker.wait_s("b" if other is None else "c") == breaker.wait_s() == 2.0
        clock.now += 4
        breaker.failed("a")
        assert breaker.wait_s("b") == breaker.wait_s("c") == 4.0


def test_an_answer_to_anybody_begins_a_new_row() -> None:
    breaker = Breaker(2, 2.0, Clock())
    breaker.failed("b")
    breaker.succeeded()
    for _ in range(2):
        breaker.failed("a")
    assert (breaker.wait_s("a"), breaker.wait_s("b")) == (2.0, 0)


def test_one_key_does_not_keep_every_trial_to_itself() -> None:
    clock = Clock()
    breaker = Breaker(2, 2.0, clock)
    breaker.failed("b")
    breaker.failed("a")
    assert (breaker.wait_s("b"), breaker.wait_s("a")) == (2.0, 4.0)
    clock.now += 2
    assert (breaker.wait_s("b"), breaker.wait_s("a")) == (0, 2.0)
    clock.now += 2
    assert breaker.wait_s("a") == 0, "nobody else came"


def test_retries_are_at_most_the_ratio() -> None:
    budget = RetryBudget(0.1, burst=10)
    generator = random.Random(0)
    sent = 0
    for _ in range(10_000):
        budget.earn()
        sent += 1
        while generator.random() < 0.5 and budget.spend():
            sent += 1
    assert 10_900 < sent <= 11_010


def test_a_calm_hour_saves_up_no_more_than_a_burst() -> None:
    budget = RetryBudget(0.5, burst=3)
    for _ in range(1000):
        budget.earn()
    assert [budget.spend() for _ in range(4)] == [True, True, True, False]


def test_a_backend_that_is_too_busy_neither_opens_nor_closes_its_circuit() -> None:
    target = Target(Backend("a", "http://127.0.0.1:9", "t", ("m",)), Settings(breaker_failures=1))
    states = []
    for status in (429, 503, 429, 404):
        lease = Lease(Call(target, "m"))
        lease.heard(status)
        lease.close()
        states.append(target.breaker("m").state)
    assert states == ["closed", "open", "open", "closed"]
    assert target.outstanding == 0
