"""What Anthropic's API writes into its cache is charged at its price, and reserved where a request asks for it."""

import contextlib
import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gateway.anthropic_upstream import FakeAnthropic
from tests.gateway.governance.governed import CHAT, Governed, governing
from tests.gateway.governance.test_bounds import exchange, target
from tests.gateway.running import wait_until
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.config import Config
from tokenmill.engine.gateway.governance import bounds, charges
from tokenmill.engine.gateway.governance.accounts import Limits
from tokenmill.engine.gateway.governance.bounds import TEMPLATE_TOKENS, Bound
from tokenmill.engine.gateway.governance.narrowing import need
from tokenmill.engine.gateway.money import Prices
from tokenmill.engine.gateway.pipeline import Call, Usage
from tokenmill.engine.gateway.portfolio import Route, Target
from tokenmill.engine.supervisor.plan import make_plan

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
#: A token costs 4 micro-cents, a cached one 1, a generated one 7, a written one 5, one that is kept for an hour 8.
PRICES = Prices(4_000_000, 1_000_000, 7_000_000, 5_000_000, 8_000_000)
#: The mark of a text, the dearest price of a prompt's token that goes with it, and the price of those that are written.
MARKS = [
    (None, 4, 0),
    ({"type": "ephemeral"}, 5, 5),
    ({"type": "ephemeral", "ttl": "1h"}, 8, 8),
]


@pytest.fixture(scope="module")
def governed(claude: FakeAnthropic, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Governed]:
    place = str(tmp_path_factory.mktemp("books") / "gateway.db")
    backend = Backend("c", claude.url, "claude", ("claude",), prices=PRICES, api_key="sk-ant-key",
                      protocol="anthropic", health_path=None)  # fmt: skip
    with governing(place, backend) as running:
        yield running


def talk(mark: dict[str, str] | None, **more: Any) -> dict[str, Any]:
    text = {"type": "text", "text": "a word " * 200} | ({} if mark is None else {"cache_control": mark})
    return {"model": "claude", "max_tokens": 5, "messages": [{"role": "user", "content": [text]}], **more}


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("mark", "dearest", "price"), MARKS)
def test_written_tokens_are_reserved_and_charged_at_their_price(
    governed: Governed,
    claude: FakeAnthropic,
    path: str,
    streamed: bool,
    mark: dict[str, str] | None,
    dearest: int,
    price: int,
) -> None:
    body = talk(mark, stream=streamed)
    most = len(json.dumps(body)) + TEMPLATE_TOKENS
    # As many tokens as the prompt may have at most.
    claude.writes = written = most - 10
    bound = most * dearest + 5 * 7
    poor, poor_key = governed.key(Limits(hard_limit=bound - 1))
    assert governed.ask(poor_key, body, path)[0] == 429
    rich, rich_key = governed.key(Limits(hard_limit=bound))
    assert governed.ask(rich_key, body, path)[0] == 200
    wait_until(lambda: len(governed.ledger(rich)) == 1)
    (row,) = governed.ledger(rich)
    cost = 7 * 4 + 3 * 1 + written * price + 5 * 7 if mark else 9 * 4 + 3 * 1 + 5 * 7
    assert (row.cost, row.excess, governed.account(rich).spent) == (cost, 0, cost)
    assert (row.prompt, row.cached, row.completion) == (most if mark else 12, 3, 5)
    assert governed.ledger(poor) == []


@pytest.mark.parametrize(("mark", "dearest", "price"), MARKS)
def test_what_nobody_counted_costs_what_the_prompt_may_have_cost(
    mark: dict[str, str] | None, dearest: int, price: int
) -> None:
    cut = exchange(MESSAGES, talk(mark))
    served = target(protocol="anthropic", prices=PRICES)
    cut.routes = [Route((served,), "claude")]
    cut.calls.append(Call(served, "claude", Usage(completion=2), 200, taken=True))
    asked = bounds.asked(cut)
    spent = charges.spending(cut, lambda one: asked.at(one, 100))
    assert (spent.cost, spent.exact) == ((len(cut.payload) + TEMPLATE_TOKENS) * dearest + 2 * 7, False)
    assert dearest >= price


@pytest.mark.parametrize(
    ("path", "mark", "price"),
    [(RESPONSES, None, 0), *[(path, mark, price) for path in (CHAT, MESSAGES) for mark, _, price in MARKS]],
)
def test_a_cut_stream_is_charged_the_prompt_that_its_begin_states(
    governed: Governed, claude: FakeAnthropic, path: str, mark: dict[str, str] | None, price: int
) -> None:
    """The connection ends before `message_delta`: what was generated is an estimate, the prompt is not."""
    claude.writes = written = 20
    text = {"type": "text", "text": "hang up"} | ({} if mark is None else {"cache_control": mark})
    body: dict[str, Any] = {"model": "claude", "stream": True}
    if path == RESPONSES:
        body |= {"input": "hang up", "store": False, "max_output_tokens": 50}
    else:
        body |= {"max_tokens": 50, "messages": [{"role": "user", "content": [text]}]}
    identity, key = governed.key()
    with contextlib.suppress(http.client.IncompleteRead):
        governed.ask(key, body, path)
    wait_until(lambda: len(governed.ledger(identity)) == 1)
    (row,) = governed.ledger(identity)
    assert (row.prompt, row.cached, row.exact, row.outcome) == (30 if mark else 12, 3, False, "cut")
    assert 0 < row.completion < 50
    read = 7 * 4 + written * price if mark else 9 * 4
    assert row.cost == governed.account(identity).spent == read + 3 * 1 + row.completion * 7


@pytest.mark.parametrize(
    ("text", "writes"),
    [
        ('{"messages": [{"role": "user", "content": "cache_control, ttl"}]}', "none"),
        ('{"messages": [{"role": "user", "content": "\\"cache_control\\": 1"}]}', "none"),
        ('{"cache_control": {"type": "ephemeral"}, "messages": []}', "minutes"),
        ('{"messages": [{"role": "user", "content": [{"cache_control": {"type": "ephemeral"}}]}]}', "minutes"),
        ('{"messages": [{"role": "user", "content": [{"cache\\u005fcontrol" :\n{"type": "ephemeral"}}]}]}', "minutes"),
        ('{"messages": [], "tools": [{"cache_control": {"type": "ephemeral", "ttl": "1h"}}]}', "hour"),
        ('{"messages": [], "tools": [{"cache_control": {"\\u0074tl": "1\\u0068"}}]}', "hour"),
    ],
)
def test_what_a_request_has_written(text: str, writes: str) -> None:
    claude, other = target(protocol="anthropic"), target()
    for path in (CHAT, MESSAGES):
        asking = exchange(path, json.loads(text))
        asking.payload = text.encode()
        asking.routes = [Route((other, claude), "claude")]
        asked = bounds.asked(asking)
        # Others write unasked.
        assert (asked.at(claude, 100).writes, asked.at(other, 100).writes) == (writes, "hour")


@pytest.mark.parametrize(
    ("backend", "price", "writing"),
    [
        ({"protocol": "anthropic"}, {"input": 4}, (500_000_000, 800_000_000)),
        ({"protocol": "anthropic"}, {"input": 4, "written": 6, "written_hour": 7}, (600_000_000, 700_000_000)),
        ({"protocol": "anthropic"}, {"input": 4, "written_hour": 0}, (500_000_000, 0)),
        ({}, {"input": 4}, (400_000_000, 400_000_000)),
        ({}, {"input": 4, "written": 5}, (500_000_000, 500_000_000)),
    ],
)
def test_what_a_configuration_leaves_unsaid_is_usual_at_the_protocol(
    backend: dict[str, Any], price: dict[str, Any], writing: tuple[int, int]
) -> None:
    said = {"url": "http://b", "models": {"m": "m"}, "price": price, **backend}
    (remote,) = make_plan(Config.model_validate({"tiers": {"t": {"backends": [said]}}})).remotes
    assert remote.prices.writing == writing


_PRICE = st.integers(0, 10**9)


@given(
    prices=st.builds(Prices, _PRICE, _PRICE, _PRICE, st.none() | _PRICE, st.none() | _PRICE),
    protocol=st.sampled_from(["anthropic", "openai"]),
    mark=st.sampled_from([mark for mark, _, _ in MARKS]),
    shares=st.tuples(*[st.floats(0, 1)] * 4),
    counted=st.booleans(),
)
def test_no_reservation_is_below_its_charge(
    prices: Prices, protocol: str, mark: dict[str, str] | None, shares: tuple[float, ...], counted: bool
) -> None:
    """Whatever a backend counts within the bound's tokens, and what nobody counts, is within what is reserved."""
    asking = exchange(MESSAGES, talk(mark))
    served = target(protocol=protocol, prices=prices)
    asking.routes = [Route((served,), "claude")]
    asked = bounds.asked(asking)

    def bound_at(one: Target) -> Bound:
        return asked.at(one, 100)

    most = bound_at(served)
    prompt = round(most.prompt * shares[0])
    cached = round(prompt * shares[1])
    written = round((prompt - cached) * shares[2]) if mark or protocol == "openai" else 0
    hour = round(written * shares[3]) if protocol == "openai" or (mark and "ttl" in mark) else 0
    usage = Usage(prompt, cached, most.completion, counted, written=written, written_hour=hour)
    asking.calls.append(Call(served, "claude", usage, 200, taken=True))
    assert charges.spending(asking, bound_at).total <= need(asking, bound_at).amount
