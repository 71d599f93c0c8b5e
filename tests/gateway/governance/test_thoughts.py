"""A request of Claude that states no length is reserved for what it is then sent with: room for its thoughts, too."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.gateway.anthropic_upstream import FakeAnthropic
from tests.gateway.governance.governed import CHAT, Governed, governing
from tests.gateway.test_responses_bridge import backend
from tokenmill.engine.gateway.governance.accounts import Limits
from tokenmill.engine.gateway.money import Prices

RESPONSES = "/v1/responses"
THINKING = {"type": "enabled", "budget_tokens": 60_000}


def governed(claude: FakeAnthropic, place: str, **more: Any) -> Iterator[Governed]:
    # Only generated tokens cost something.
    served = backend(claude, prices=Prices(0, 0, 7_000_000), **more)
    with governing(place, served) as running:
        yield running


@pytest.fixture(scope="module")
def plain(claude: FakeAnthropic, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Governed]:
    yield from governed(claude, str(tmp_path_factory.mktemp("books") / "gateway.db"))


@pytest.fixture(scope="module")
def thinking(claude: FakeAnthropic, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Governed]:
    """Its backend thinks where nobody says anything."""
    place = str(tmp_path_factory.mktemp("books") / "gateway.db")
    yield from governed(claude, place, defaults={"thinking": THINKING})


def holds(governed: Governed, claude: FakeAnthropic, path: str, asked: dict[str, Any]) -> int:
    """`max_tokens` of what is sent; a budget that holds so much is enough, and a smaller one is not."""
    said = {"input": "hello"} if path == RESPONSES else {"messages": [{"role": "user", "content": "hello"}]}
    body = {"model": "claude", **said, **asked}
    _, key = governed.key()
    status, _, raw = governed.ask(key, body, path)
    assert status == 200, raw
    sent: int = json.loads(claude.books.requests[-1][2])["max_tokens"]
    for limit, expected in ((sent * 7 - 1, 429), (sent * 7, 200)):
        _, key = governed.key(Limits(hard_limit=limit))
        assert governed.ask(key, body, path)[0] == expected
    return sent


@pytest.mark.parametrize(
    ("path", "asked", "most"),
    [
        (CHAT, {}, 4096),
        (CHAT, {"max_tokens": 0}, 4096),
        (CHAT, {"max_tokens": 70_000, "thinking": THINKING}, 70_000),
        (CHAT, {"thinking": THINKING}, 64_096),
        (CHAT, {"thinking": {"type": "adaptive"}}, 4096),
        (CHAT, {"reasoning_effort": "high"}, 8192),
        (RESPONSES, {"thinking": THINKING}, 64_096),
        (RESPONSES, {"reasoning": {"effort": "high"}}, 8192),
        (RESPONSES, {"reasoning": {"effort": "high"}, "max_output_tokens": 5000}, 5000),
    ],
)
def test_thoughts_are_reserved(
    plain: Governed, claude: FakeAnthropic, path: str, asked: dict[str, Any], most: int
) -> None:
    assert holds(plain, claude, path, asked) == most


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_thoughts_that_are_usual_at_a_backend_are_reserved(
    thinking: Governed, claude: FakeAnthropic, path: str
) -> None:
    assert holds(thinking, claude, path, {}) == 64_096
