"""Requests to the Responses API that are spelled oddly: they break neither an answer nor its count."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.gateway.anthropic_upstream import FakeAnthropic
from tests.gateway.governance.governed import Governed, governing
from tests.gateway.running import wait_until
from tests.gateway.test_responses_bridge import TOOLS, backend
from tokenmill.engine.gateway.money import Prices
from tokenmill.engine.gateway.sse import LONGEST

PATH, CHAT = "/v1/responses", "/v1/chat/completions"


@pytest.fixture(scope="module")
def governed(claude: FakeAnthropic, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Governed]:
    place = str(tmp_path_factory.mktemp("books") / "gateway.db")
    prices = Prices(3_000_000, 1_000_000, 7_000_000)
    with governing(place, backend(claude, prices=prices)) as running:
        yield running


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\n"])
def test_what_is_written_in_lines_is_repeated_in_one(governed: Governed, end: str) -> None:
    _, key = governed.key()
    said = {"model": "claude", "input": "a", "stream": True, "metadata": {"a": "b\n"}, "tools": TOOLS}
    status, _, raw = governed.ask(key, json.dumps(said, indent=2).replace("\n", end).encode(), PATH)
    assert status == 200
    blocks = [block.split("\n") for block in raw.decode().removesuffix("\n\n").split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    for event in (events[0], events[-1]):
        assert (event["response"]["metadata"], event["response"]["tools"]) == (said["metadata"], TOOLS)


@pytest.mark.parametrize("name", ["metadata", "tools"])
def test_what_is_repeated_is_not_taken_for_the_count(governed: Governed, name: str) -> None:
    """The end of an event that is too long to be kept is all that is seen of it."""
    counts: dict[str, Any] = {"usage": {"input_tokens": 1, "output_tokens": 1}}
    said = {"metadata": counts, "tools": [{**TOOLS[0], **counts}]}
    body = json.dumps({"model": "claude", "input": "a", "stream": True, name: said[name]})
    body = body.replace('"usage"', " " * LONGEST + '"usage"')  # which costs nothing at the backend
    identity, key = governed.key()
    assert governed.ask(key, body.encode(), PATH)[0] == 200
    wait_until(lambda: governed.ledger(identity))
    (row,) = governed.ledger(identity)
    assert (row.prompt, row.cached, row.completion, row.exact) == (12, 3, 5, True)


@pytest.mark.parametrize("include", ["message", "", {"a": 1}, {}, 5, [5], [[]]])
@pytest.mark.parametrize("streamed", [False, True])
def test_an_include_that_is_no_list_of_names_is_refused(
    governed: Governed, claude: FakeAnthropic, include: Any, streamed: bool
) -> None:
    before = len(claude.books.requests)
    _, key = governed.key()
    body = {"model": "claude", "input": "a", "include": include, "stream": streamed}
    status, _, raw = governed.ask(key, body, PATH)
    assert (status, json.loads(raw)["error"]["param"]) == (400, "include")
    assert len(claude.books.requests) == before


@pytest.mark.parametrize(
    ("path", "form"),
    [
        (PATH, '"input": [{"type": %s}]'),
        (PATH, '"input": [{"role": "user", "content": [{"type": %s}]}]'),
        (PATH, '"input": [{"role": "user", "content": "a"}, {"type": "reasoning", "signature": %s}]'),
        (PATH, '"input": "a", "tools": [{"type": %s}]'),
        (PATH, '"input": "a", "include": %s'),
        (CHAT, '"messages": [{"role": %s}]'),
        (CHAT, '"messages": [{"role": "user", "content": "a"}], "tools": [{"type": %s}]'),
    ],
)
def test_a_name_that_is_nested_deeply_is_refused(governed: Governed, path: str, form: str) -> None:
    """Just as deep as the body itself can be parsed, it cannot be repeated in a message."""
    _, key = governed.key()
    for depth in range(600, 1000, 4):
        body = '{"model": "claude", ' + form % ("[" * depth + "]" * depth) + "}"
        status, _, raw = governed.ask(key, body.encode(), path)
        assert status in (200, 400), (depth, raw)
