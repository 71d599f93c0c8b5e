"""Prices come to whole micro-cents, never too few; a budget's period ends with its last millisecond."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gateway.governance.test_budgets import HOUR, ask, end, key_with
from tokenmill.engine.gateway.governance import accounts
from tokenmill.engine.gateway.governance.accounts import Limits
from tokenmill.engine.gateway.money import MOST_DOLLARS, Prices, Writes, micro_cents
from tokenmill.engine.gateway.store import Store
from tokenmill.errors import InputError

PRICES = Prices(3_000_000, 1_000_000, 5_000_000)


@pytest.mark.parametrize(
    ("tokens", "cost"),
    [
        ((0, 0, 0), 0),
        ((10, 4, 2), 6 * 3 + 4 + 2 * 5),
        # A backend that counts its cached tokens beside the prompt, not within: nothing is given back for them.
        ((4, 10, 2), 10 + 2 * 5),
    ],
)
def test_cached_tokens_are_cheaper_and_cost_is_never_negative(tokens: tuple[int, int, int], cost: int) -> None:
    assert PRICES.cost(*tokens) == cost


def test_a_part_of_a_micro_cent_is_a_whole_one() -> None:
    assert [Prices(prompt=1).cost(tokens, 0, 0) for tokens in (1, 1_000_000, 1_000_001)] == [1, 1, 2]
    assert [Prices(completion=1).bound(0, tokens) for tokens in (1, 1_000_000, 1_000_001)] == [1, 1, 2]


def test_the_bound_holds_where_cached_tokens_are_the_dearer_ones() -> None:
    prices = Prices(prompt=1_000_000, cached=4_000_000, completion=2_000_000)
    assert prices.bound(10, 3) == max(prices.cost(10, cached, 3) for cached in range(11)) == 46


@pytest.mark.parametrize(
    ("more", "cost"),
    [
        ({"written": 6_000_000, "written_hour": 9_000_000}, 3 * 3 + 4 + 2 * 6 + 1 * 9 + 2 * 5),
        ({"written": 6_000_000}, 3 * 3 + 4 + 3 * 6 + 2 * 5),
        ({}, 6 * 3 + 4 + 2 * 5),
    ],
)
def test_tokens_that_are_written_into_a_cache_have_their_own_prices(more: dict[str, int], cost: int) -> None:
    prices = Prices(3_000_000, 1_000_000, 5_000_000, **more)
    assert prices.cost(10, 4, 2, written=3, written_hour=1) == cost


@given(
    st.tuples(*[st.integers(0, 10**7)] * 3, *[st.none() | st.integers(0, 10**7)] * 2),
    st.tuples(*[st.integers(0, 1000)] * 6),
)
def test_no_bound_is_below_a_cost(price: tuple[int, ...], tokens: tuple[int, ...]) -> None:
    prices = Prices(*price)
    fresh, cached, minutes, hour, completion, less = tokens
    prompt, written = fresh + cached + minutes + hour, minutes + hour
    longest: Writes = "hour" if hour else "minutes" if written else "none"
    bound = prices.bound(prompt + less, completion + less, longest)
    assert prices.cost(prompt, cached, completion, written, hour) <= bound
    assert bound <= prices.bound(prompt + less, completion + less)


@pytest.mark.parametrize("dollars", [-0.01, MOST_DOLLARS + 1, float("nan"), float("inf")])
def test_an_amount_that_is_none_is_refused(dollars: float) -> None:
    with pytest.raises(InputError, match="outside 0 to"):
        micro_cents(dollars)


def test_a_period_is_over_with_its_last_millisecond(store: Store) -> None:
    key = key_with(store, Limits(hard_limit=10, period_ms=HOUR))
    start = accounts.find(store.reader, "team").period_start
    assert ask(store, key, "a", 10, at=start) is None
    assert end(store, "a", 10)
    refusal = ask(store, key, "b", 1, at=start + HOUR - 1)
    assert refusal is not None and refusal.retry_ms == 1
    assert ask(store, key, "c", 10, at=start + HOUR) is None
