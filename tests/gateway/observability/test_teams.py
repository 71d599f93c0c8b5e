"""What metrics say of teams: what the ledger says, whichever worker served them, and of no more than were asked for."""

import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

import pytest

from tests.gateway.running import wait_until
from tests.gateway.upstream import FakeUpstream
from tests.gateway.workers import Workers
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.money import MICRO_CENTS_PER_DOLLAR, Prices
from tokenmill.engine.gateway.router.settings import EscalationSettings, RoutingSettings

CHEAP, DEAR = Prices(10_000_000, 10_000_000, 30_000_000), Prices(500_000_000, 500_000_000, 500_000_000)


def key_of(workers: Workers, team: str) -> str:
    """A key of a new team."""
    workers.json("POST", "/admin/accounts", {"kind": "team", "id": team}, status=201)
    return str(workers.json("POST", "/admin/keys", {"parent": team}, status=201)["key"])


def series(workers: Workers, name: str, *labels: str) -> dict[tuple[str, ...], float]:
    """A metric's values by these labels, all others added."""
    found: Counter[tuple[str, ...]] = Counter()
    text = workers.send("GET", "/metrics")[2].decode()
    for shown, value in re.findall(rf"^{name}\{{(.*)\}} (\S+)$", text, re.MULTILINE):
        pairs = dict(re.findall(r'(\w+)="([^"]*)"', shown))
        found[tuple(pairs[label] for label in labels)] += float(value)
    return dict(found)


def test_tokens_and_cost_are_those_of_the_ledger(tmp_path: Path) -> None:
    small, large = FakeUpstream(("small",)).start(), FakeUpstream(("large",)).start()
    backends = (
        Backend("small", small.url, "utility", ("small",), prices=CHEAP, quality=0.6, capabilities=("logprobs",)),
        Backend("large", large.url, "reasoning", ("large",), prices=DEAR, quality=0.9),
    )
    routing = RoutingSettings(escalation=EscalationSettings("utility", "reasoning", 0.5))
    with Workers(tmp_path, *backends, routing=routing) as workers:
        key = key_of(workers, "search")
        assert workers.chat(key, "small", max_tokens=10)[0] == 200
        # Nobody counted its tokens: its prompt is charged at its bound.
        with pytest.raises(HTTPException):
            workers.chat(key, "small", max_tokens=10, stream=True, act={"cut_after": 3})
        # Two answers are charged.
        messages = [{"role": "user", "content": "What is it?"}]
        act = {"small": {"logprob": -3.0}, "large": {}}
        status, headers, _ = workers.chat(key, "auto", messages=messages, max_tokens=10, act=act)
        assert (status, headers["x-tokenmill-escalated"]) == (200, "true")
        wait_until(
            lambda: (
                sum(series(workers, "tokenmill_account_requests_total", "team").values()) == 3
                and workers.json("GET", "/admin/ledger?by=team&team=search")["rows"][0]["requests"] == 3
            )
        )
        rows = workers.json("GET", "/admin/ledger?by=tier&team=search")["rows"]
        tokens = series(workers, "tokenmill_account_tokens_total", "team", "tier", "kind")
        assert tokens == {
            ("search", row["tier"], kind): row[f"{kind}_tokens"] for row in rows for kind in ("prompt", "completion")
        }
        assert sum(tokens.values()) > small.books.prompt_tokens + large.books.prompt_tokens
        cost = series(workers, "tokenmill_cost_dollars_total", "team", "tier")
        assert cost == pytest.approx({("search", row["tier"]): row["cost"] / MICRO_CENTS_PER_DOLLAR for row in rows})
        # Requests to backends are all counted, whatever they cost.
        asked = series(workers, "tokenmill_upstream_requests_total", "backend")
        assert asked == {("small",): len(small.books.requests), ("large",): len(large.books.requests)}
    small.stop()
    large.stop()


def test_what_never_went_out_is_no_request_to_a_backend(tmp_path: Path) -> None:
    upstream = FakeUpstream(("plain",)).start()
    backends = (
        Backend("words", upstream.url, "t", ("words",), api_key="k", protocol="anthropic"),
        Backend("gone", "http://127.0.0.1:9", "u", ("gone",), health_path=None),
        Backend("plain", upstream.url, "v", ("plain",)),
    )
    with Workers(tmp_path, *backends, wait_for=("t", "v")) as workers:
        key = key_of(workers, "search")
        assert workers.send("POST", "/v1/embeddings", {"model": "words", "input": "x"}, key)[0] == 400
        assert workers.chat(key, "gone")[0] == 503
        assert workers.chat(key, "plain", act={"cut_after": 0})[0] == 503
        wait_until(lambda: sum(series(workers, "tokenmill_account_requests_total", "team").values()) == 3)
        asked = series(workers, "tokenmill_upstream_requests_total", "backend")
        assert asked == {("plain",): len(upstream.books.requests)} == {("plain",): 1}
        # Who is refused has asked, too.
        assert workers.chat(key, "nobody")[0] == 404
        wait_until(lambda: series(workers, "tokenmill_account_requests_total", "team", "tier").get(("search", "")) == 1)
    upstream.stop()


def test_every_worker_names_the_same_teams(tmp_path: Path) -> None:
    upstream = FakeUpstream().start()
    backend = Backend("a", upstream.url, "utility", models=("tiny",))
    with Workers(tmp_path, backend, count=2, accounts=3) as workers:
        keys = {team: key_of(workers, team) for team in ("one", "two", "three", "four", "five", "six")}
        # Connections come at once, so that both workers take some.
        with ThreadPoolExecutor(8) as clients:
            asked = [key for _ in range(12) for key in keys.values()]
            assert {status for status, _, _ in clients.map(workers.chat, asked)} == {200}

        seen: dict[tuple[str, ...], float] = {}

        def all_are_counted() -> bool:
            # In one answer: the next may be another worker's, who heard of the others a second ago.
            seen.clear()
            seen.update(series(workers, "tokenmill_account_requests_total", "team"))
            return sum(seen.values()) == len(asked)

        wait_until(all_are_counted)
        assert seen.pop(("other",)) == 36
        assert list(seen.values()) == [12, 12, 12]
        assert set(seen) < {(team,) for team in keys}
    upstream.stop()
