"""The circuit breaker's states and the retry budget's bound."""

import random

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


def test_trial_that_never_ends_is_given_up() -> None:
    clock = Clock()
    breaker = Breaker(1, 2.0, clock)
    breaker.failed()
    clock.now += 2
    breaker.begin()
    clock.now += 2
    assert breaker.wait_s() == 0


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
