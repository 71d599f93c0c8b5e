"""Governance on the road of real requests: who may ask, what is reserved, charged and written down."""

import contextlib
import http.client
import json
import socket
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError, OpenAI

from tests.gateway.anthropic_upstream import FakeAnthropic
from tests.gateway.governance.conftest import KINDS, new_place
from tests.gateway.governance.governed import CHAT, MASTER_KEY, Governed, governing, options
from tests.gateway.running import RunningGateway, wait_until
from tests.gateway.upstream import FakeUpstream
from tokenmill.engine.gateway.admin.books import sums as ledger_sums
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.governance import accounts, audit, keys
from tokenmill.engine.gateway.governance.accounts import Limits
from tokenmill.engine.gateway.governance.schema import SCHEMA
from tokenmill.engine.gateway.money import Prices
from tokenmill.engine.gateway.settings import Settings
from tokenmill.engine.gateway.store import Store

#: Micro-cents per million tokens: a prompt token is 3 micro-cents, a cached one 1, a generated one 7.
PRICES = Prices(3_000_000, 1_000_000, 7_000_000)


@pytest.fixture(scope="module", params=KINDS)
def governed(
    shared_upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Governed]:
    place = new_place(request.param, tmp_path_factory.mktemp("governance"), request)
    backend = Backend("a", shared_upstream.url, "utility", prices=PRICES, api_key="the-backends-own")
    settings = Settings(probe_interval_s=0.1, read_timeout_s=2.0)
    with governing(place, backend, settings=settings) as running:
        yield running


def settled(governed: Governed, key_id: str, rows: int = 1) -> None:
    """Waits until so many requests of a key are in the ledger."""
    wait_until(lambda: len(governed.ledger(key_id)) == rows)


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        ({}, "No API key"),
        ({"authorization": "Basic abc"}, "not `Bearer KEY`"),
        ({"authorization": "Bearer sk-forged"}, "not known"),
        ({"authorization": "Bearer "}, "No API key"),
        ({"x_api_key": "'; DROP TABLE keys; --"}, "not known"),
        ({"authorization": "Bearer " + MASTER_KEY[:-1]}, "not known"),
        ({"authorization": "Bearer \xff\xfe"}, "not known"),
    ],
)
def test_who_is_unknown_is_refused(
    governed: Governed, upstream: FakeUpstream, headers: dict[str, str], says: str
) -> None:
    for answer in (
        governed.gateway.post(CHAT, {"model": "tiny"}, **headers),
        governed.gateway.send("GET", "/v1/models", headers={n.replace("_", "-"): v for n, v in headers.items()}),
    ):
        assert answer[0] == 401
        error = json.loads(answer[2])["error"]
        assert says in error["message"]
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert upstream.books.requests == []


def test_credentials_end_at_the_gateway(governed: Governed, upstream: FakeUpstream) -> None:
    _, key = governed.key()
    for headers in ({"authorization": f"Bearer {key}"}, {"x_api_key": key, "cookie": "session=1"}):
        assert governed.gateway.post(CHAT, {"model": "tiny"}, **headers)[0] == 200
    for _, sent, _ in upstream.books.requests:
        assert sent["authorization"] == "Bearer the-backends-own"
        assert "cookie" not in sent and "x-api-key" not in sent
        assert key not in str(sent)


def test_revoked_key_is_refused_from_the_next_request_on(governed: Governed) -> None:
    key_id, key = governed.key()
    assert governed.ask(key, {"model": "tiny"})[0] == 200
    governed.store.write_now(lambda connection: keys.revoke(connection, key_id, "test"))
    status, _, body = governed.ask(key, {"model": "tiny"})
    assert status == 401
    assert b"was revoked" in body


def test_expired_key_is_refused(governed: Governed) -> None:
    _, key = governed.key(lifetime_ms=300)
    assert governed.ask(key, {"model": "tiny"})[0] == 200
    wait_until(lambda: governed.ask(key, {"model": "tiny"})[0] == 401)
    assert b"has expired" in governed.ask(key, {"model": "tiny"})[2]


def test_models_are_those_of_the_key(governed: Governed) -> None:
    _, key = governed.key(models=["tiny", "auto"])
    status, _, body = governed.ask(key, {"model": "org/nested/name"})
    assert status == 403
    error = json.loads(body)["error"]
    assert "`org/nested/name`" in error["message"]
    assert "tiny, auto" in error["message"]
    assert error["code"] == "model_not_allowed"
    assert governed.ask(key, {"model": "utility"})[0] == 403
    assert governed.ask(key, {})[0] == 403
    assert governed.ask(key, {"model": "tiny"})[0] == 200
    bearer = {"authorization": f"Bearer {key}"}
    listed = json.loads(governed.gateway.send("GET", "/v1/models", headers=bearer)[2])
    assert [model["id"] for model in listed["data"]] == ["tiny"]
    assert governed.gateway.send("GET", "/v1/models/tiny", headers=bearer)[0] == 200
    assert governed.gateway.send("GET", "/v1/models/org/nested/name", headers=bearer)[0] == 404


@pytest.mark.parametrize("stream", [False, True])
def test_charged_what_the_backend_counted(governed: Governed, upstream: FakeUpstream, stream: bool) -> None:
    team = governed.team(Limits(hard_limit=10_000))
    key_id, key = governed.key(parent=team)
    body = {"model": "tiny", "max_tokens": 9, "stream": stream, "act": {"chunks": 9}}
    status, headers, _ = governed.ask(key, body)
    assert status == 200
    settled(governed, key_id)
    books = upstream.books
    cost = 3 * books.prompt_tokens + 7 * books.completion_tokens
    (row,) = governed.ledger(key_id)
    assert (row.prompt, row.completion, row.exact) == (books.prompt_tokens, 9, True)
    assert (row.cost, row.excess, row.outcome, row.status, row.backend) == (cost, 0, "ok", 200, "a")
    for account in (key_id, team):
        assert (governed.account(account).spent, governed.account(account).reserved) == (cost, 0)
    assert headers["x-tokenmill-key-spend"] == ("0.00000000" if stream else f"{cost / 1e8:.8f}")
    assert headers.get("x-tokenmill-cost") == (None if stream else f"{cost / 1e8:.8f}")


@pytest.mark.parametrize("stream", [False, True])
def test_speculative_tokens_are_in_the_ledger(governed: Governed, stream: bool) -> None:
    key_id, key = governed.key()
    metrics = {"speculative_decoding": {"num_accepted_draft_tokens": 3, "num_draft_tokens": 8}}
    body = {"model": "tiny", "max_tokens": 5, "stream": stream, "act": {"metrics": metrics}}
    assert governed.ask(key, body)[0] == 200
    settled(governed, key_id)
    (total,) = ledger_sums(governed.store.reader, (), conditions={"key": key_id})
    assert (total["completion_tokens"], total["accepted_draft_tokens"], total["rejected_draft_tokens"]) == (5, 3, 5)


def test_usage_that_nobody_asked_for_is_hidden(governed: Governed, upstream: FakeUpstream) -> None:
    """What the client gets is what the backend sent but for the usage; asked for, it is all of it."""
    key_id, key = governed.key()
    plain = {"model": "tiny", "stream": True, "stream_options": {"other": 1}}
    _, _, hidden = governed.ask(key, plain)
    sent = upstream.books.sent[-1]
    assert b'"usage"' in sent
    events = [event + b"\n\n" for event in sent.split(b"\n\n") if event]
    assert hidden == b"".join(event for event in events if b'"usage"' not in event)
    options = json.loads(upstream.books.requests[-1][2])["stream_options"]
    assert options == {"other": 1, "include_usage": True}
    asking = json.dumps({**plain, "stream_options": {"include_usage": True}}).encode()
    _, _, whole = governed.ask(key, asking)
    assert whole == upstream.books.sent[-1]
    assert upstream.books.requests[-1][2] == asking
    settled(governed, key_id, 2)
    assert all(row.exact for row in governed.ledger(key_id))


def test_budget_that_is_used_up_is_insufficient_quota(governed: Governed, upstream: FakeUpstream) -> None:
    key_id, key = governed.key(Limits(hard_limit=900))
    client = OpenAI(base_url=governed.gateway.url + "/v1", api_key=key, max_retries=3)
    messages: Any = [{"role": "user", "content": "hello"}]
    served = 0
    with pytest.raises(APIStatusError) as raised:
        while True:
            client.chat.completions.create(model="tiny", messages=messages, max_tokens=5)
            served += 1
            settled(governed, key_id, served)
    client.close()
    error = raised.value
    assert served > 0
    assert (error.status_code, error.code, error.type) == (429, "insufficient_quota", "insufficient_quota")
    assert f"`{key_id}`" in error.message
    assert error.response.headers["x-should-retry"] == "false"
    assert len(upstream.books.requests) == served
    account = governed.account(key_id)
    assert account.spent == sum(row.cost for row in governed.ledger(key_id)) <= 900
    assert account.reserved == 0


def test_rates_are_told_and_held(governed: Governed) -> None:
    _, key = governed.key(Limits(requests_per_minute=2, tokens_per_minute=100_000))
    body = {"model": "tiny", "max_tokens": 5}
    _, headers, _ = governed.ask(key, body)
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("2", "1")
    assert headers["x-ratelimit-limit-tokens"] == "100000"
    assert 99_000 < int(headers["x-ratelimit-remaining-tokens"]) < 100_000
    assert headers["x-ratelimit-reset-tokens"] == "61s"
    governed.ask(key, body)
    status, headers, answer = governed.ask(key, body)
    assert status == 429
    assert 1 <= int(headers["retry-after"]) <= 61
    assert headers["x-ratelimit-remaining-requests"] == "0"
    error = json.loads(answer)["error"]
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "requests")
    _, small = governed.key(Limits(tokens_per_minute=50))
    status, headers, answer = governed.ask(small, body)
    assert (status, headers["x-should-retry"]) == (429, "false")
    assert b"never fits" in answer


def hang_up_before_the_answer(governed: Governed, upstream: FakeUpstream, key: str) -> None:
    send(governed, key, {"model": "tiny", "max_tokens": 20, "act": {"delay_s": 30}}, lambda: upstream.books.open == 1)


def hang_up_in_the_stream(governed: Governed, upstream: FakeUpstream, key: str) -> None:
    act = {"chunks": 20, "interval_s": 0.05}
    body = {"model": "tiny", "stream": True, "max_tokens": 20, "act": act}
    send(governed, key, body, lambda: upstream.books.open == 1, read=True)


def send(governed: Governed, key: str, body: Any, until: Callable[[], bool], read: bool = False) -> None:
    """Sends a request and hangs up."""
    raw = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\ncontent-length: {len(raw)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", governed.gateway.port)) as connection:
        connection.sendall(head.encode() + raw)
        wait_until(until)
        if read:
            while b"w2 " not in connection.recv(4096):
                pass


def broken_stream(governed: Governed, _upstream: FakeUpstream, key: str) -> None:
    with pytest.raises(http.client.IncompleteRead):
        governed.ask(key, {"model": "tiny", "stream": True, "max_tokens": 20, "act": {"cut_after": 3}})


def error_answer(governed: Governed, _upstream: FakeUpstream, key: str) -> None:
    assert governed.ask(key, {"model": "tiny", "act": {"status": 500, "body": "{}"}})[0] == 500


def no_answer(governed: Governed, _upstream: FakeUpstream, key: str) -> None:
    assert governed.ask(key, {"model": "tiny", "act": {"cut_after": 0}})[0] == 503


def silent_backend(governed: Governed, _upstream: FakeUpstream, key: str) -> None:
    assert governed.ask(key, {"model": "tiny", "max_tokens": 20, "act": {"delay_s": 10}})[0] == 504


@pytest.mark.parametrize(
    ("act", "outcome", "completion"),
    [
        (hang_up_before_the_answer, "gone", range(20, 21)),
        (hang_up_in_the_stream, "gone", range(3, 20)),
        (broken_stream, "cut", range(3, 4)),
        (error_answer, "failed", range(1)),
        (no_answer, "failed", range(1)),
        (silent_backend, "failed", range(20, 21)),
    ],
)
def test_unhappy_ends_are_charged_by_the_rule(
    governed: Governed, upstream: FakeUpstream, act: Callable[..., None], outcome: str, completion: range
) -> None:
    key_id, key = governed.key()
    act(governed, upstream, key)
    settled(governed, key_id)
    (row,) = governed.ledger(key_id)
    assert row.outcome == outcome
    assert row.completion in completion
    assert row.exact == (row.completion == 0)
    assert row.cost == 3 * row.prompt + 7 * row.completion
    assert (row.prompt > 0) == (row.completion > 0)
    assert (governed.account(key_id).spent, governed.account(key_id).reserved) == (row.cost, 0)


def test_cut_streams_are_charged_by_what_an_event_held(shared_upstream: FakeUpstream, tmp_path: Path) -> None:
    """A backend that sends ten tokens in an event: known from a stream that it counted, up to what was reserved."""
    place = str(tmp_path / "gateway.db")
    backend = Backend("a", shared_upstream.url, "utility", prices=PRICES)
    with RunningGateway(backend, governance=options(place), key=MASTER_KEY) as gateway:
        store = Store(place, SCHEMA)
        governed = Governed(gateway, store)
        key_id, key = governed.key()
        body = {"model": "tiny", "stream": True, "max_tokens": 300, "act": {"chunks": 20, "tokens": 200}}
        assert governed.ask(key, body)[0] == 200
        for most in (300, 170):
            with pytest.raises(http.client.IncompleteRead):
                governed.ask(key, {**body, "max_tokens": most, "act": {"chunks": 20, "cut_after": 19}})
        settled(governed, key_id, 3)
        rows = governed.ledger(key_id)
        assert [(row.completion, row.exact) for row in rows] == [(200, True), (190, False), (170, False)]
        store.close()


def test_nobody_is_charged_above_the_reservation(governed: Governed, upstream: FakeUpstream) -> None:
    """A backend that counts more than it was allowed cannot push a budget over its limit; the ledger has it all."""
    key_id, key = governed.key(Limits(hard_limit=10_000))
    usage = {"prompt_tokens": 10, "completion_tokens": 5_000, "total_tokens": 5_010}
    headers = {"content-type": "application/json"}
    act = {"status": 200, "body": json.dumps({"choices": [], "usage": usage}), "headers": headers}
    assert governed.ask(key, {"model": "tiny", "max_tokens": 5, "act": act})[0] == 200
    settled(governed, key_id)
    (row,) = governed.ledger(key_id)
    assert (row.prompt, row.completion) == (10, 5_000)
    assert row.cost + row.excess == 3 * 10 + 7 * 5_000
    assert row.cost <= 10_000 and row.excess > 0
    assert governed.account(key_id).spent == row.cost
    assert upstream.books.requests


def test_soft_limit_is_written_down_once(governed: Governed) -> None:
    key_id, key = governed.key(Limits(soft_limit=10))
    for number in range(1, 4):
        assert governed.ask(key, {"model": "tiny"})[0] == 200
        settled(governed, key_id, number)
    rows = governed.store.reader.execute(
        "SELECT count(*) FROM audit WHERE subject = ? AND action = 'budget.soft_limit'", (key_id,)
    )
    assert rows.fetchone() == (1,)
    audit.verify(governed.store.reader)


def test_master_key_may_ask_and_is_written_down(governed: Governed) -> None:
    before = len(governed.ledger("master"))
    assert governed.ask(MASTER_KEY, {"model": "tiny"})[0] == 200
    settled(governed, "master", before + 1)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": "many"}, "max_tokens"),
        ({"n": []}, "n"),
        ({"stream": True, "stream_options": 3}, "stream_options"),
    ],
)
def test_wrong_types_are_refused_and_leave_nothing(governed: Governed, body: dict[str, Any], param: str) -> None:
    key_id, key = governed.key()
    status, _, answer = governed.ask(key, {"model": "tiny", **body})
    assert status == 400
    assert json.loads(answer)["error"]["param"] == param
    wait_until(lambda: governed.account(key_id).reserved == 0)


def test_other_protocols_and_failovers_are_charged_where_they_were_served(
    shared_upstream: FakeUpstream, tmp_path: Path
) -> None:
    """A stream of Anthropic's is metered and its usage hidden; what failed over costs what the second backend asks."""
    claude = FakeAnthropic().start()
    place = str(tmp_path / "gateway.db")
    backends = (
        Backend("c", claude.url, "claude", ("claude",), prices=PRICES, api_key="sk-ant-key", protocol="anthropic",
                health_path=None),
        Backend("dead", "http://127.0.0.1:9", "pair", ("m",), prices=Prices(10**9, 10**9, 10**9), health_path=None,
                weight=1e6),
        Backend("alive", shared_upstream.url, "pair", ("m",), prices=PRICES, health_path=None),
    )  # fmt: skip
    with RunningGateway(*backends, governance=options(place), key=MASTER_KEY) as gateway:
        store = Store(place, SCHEMA)
        governed = Governed(gateway, store)
        key_id, key = governed.key()
        talk = {"messages": [{"role": "user", "content": "hello"}], "stream": True}
        _, _, hidden = governed.ask(key, {"model": "claude", **talk})
        assert b"[DONE]" in hidden and b'"usage"' not in hidden
        _, _, shown = governed.ask(key, {"model": "claude", **talk, "stream_options": {"include_usage": True}})
        assert shown.count(b'"usage"') == 1
        assert governed.ask(key, {"model": "m", "max_tokens": 5})[0] == 200
        settled(governed, key_id, 3)
        first, second, third = governed.ledger(key_id)
        assert first.cost == second.cost == 9 * 3 + 3 + 5 * 7
        assert (first.prompt, first.cached, first.completion, first.exact) == (12, 3, 5, True)
        assert (third.backend, third.attempts, third.completion) == ("alive", 2, 5)
        assert third.cost == 3 * third.prompt + 7 * 5
        assert governed.account(key_id).spent == first.cost + second.cost + third.cost
        store.close()
    claude.stop()


def test_store_that_cannot_be_opened_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.db"
    path.write_bytes(b"no database at all" * 100)
    gateway = RunningGateway(Backend("a", "http://127.0.0.1:9", "t"), governance=options(str(path)))
    assert gateway.process.wait(timeout=20) == 3
    printed = capfd.readouterr().err
    assert f"{path} cannot be used" in printed
    assert "Traceback" not in printed


def test_store_that_is_damaged_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.db"
    Store(path, SCHEMA).close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'accounts'").fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    with path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    gateway = RunningGateway(Backend("a", "http://127.0.0.1:9", "t"), governance=options(str(path)))
    assert gateway.process.wait(timeout=20) == 3
    printed = capfd.readouterr().err
    assert f"{path} cannot be used" in printed
    assert "Traceback" not in printed


def test_worker_that_stops_leaves_nothing_open(shared_upstream: FakeUpstream, tmp_path: Path) -> None:
    place = str(tmp_path / "gateway.db")
    backend = Backend("a", shared_upstream.url, "utility", prices=PRICES)
    with RunningGateway(backend, governance=options(place), key=MASTER_KEY) as gateway:
        assert gateway.post(CHAT, {"model": "tiny"}, authorization=f"Bearer {MASTER_KEY}")[0] == 200
    store = Store(place, SCHEMA)
    counts = {
        table: store.reader.execute(f"SELECT count(*) FROM {table}").fetchone()[0]  # noqa: S608
        for table in ("ledger", "reservations", "workers")
    }
    assert counts == {"ledger": 1, "reservations": 0, "workers": 0}
    assert store.reader.execute("SELECT outcome, exact FROM ledger").fetchall() == [("ok", 1)]
    assert accounts.find(store.reader, "master").reserved == 0
    store.close()
