"""Limits of requests at once: counted from the reservation to the end of the answer, over all workers, never leaked."""

import contextlib
import http.client
import itertools
import json
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.governance.conftest import KINDS, new_place
from tests.gateway.governance.governed import CHAT, MASTER_KEY, Governed, options
from tests.gateway.governance.test_at_once import reservation, settlement
from tests.gateway.governance.test_budgets import ask, end, key_with
from tests.gateway.running import RunningGateway, wait_until
from tests.gateway.upstream import FakeUpstream
from tests.gateway.workers import Workers
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.governance import accounts, books, keys, workers
from tokenmill.engine.gateway.governance.accounts import Limits
from tokenmill.engine.gateway.governance.budgets import Granted
from tokenmill.engine.gateway.governance.pages import Kept
from tokenmill.engine.gateway.governance.schema import SCHEMA
from tokenmill.engine.gateway.governance.workers import WorkerLock
from tokenmill.engine.gateway.settings import Settings
from tokenmill.engine.gateway.store import Store

BODY: dict[str, Any] = {"model": "tiny", "messages": []}


def set_limits(store: Store, account: str, limits: Limits) -> None:
    """As an administrator does."""
    store.write_now(lambda connection: accounts.set_limits(connection, account, limits, "test"))


def test_requests_under_way_count_once_and_those_that_are_refused_do_not(store: Store) -> None:
    key = key_with(store, Limits(requests_at_once=2, hard_limit=100))
    other = store.write_now(lambda connection: keys.create(connection, "test", parent="team"))[0]
    assert ask(store, key, "a") is None
    assert ask(store, key, "dear", amount=100) is not None
    assert ask(store, other, "b") is None
    refusal = ask(store, key, "c")
    assert refusal is not None
    assert (refusal.limit, refusal.account.id, refusal.allowed, refusal.used) == ("at once", "team", 2, 2)
    assert refusal.retry_ms == 1000
    assert end(store, "a", 1)
    assert not end(store, "a", 1)
    assert not end(store, "c", 1)
    assert ask(store, key, "d") is None
    assert ask(store, key, "e") is not None
    assert [account.under_way for account in accounts.several(store.reader, (key, other, "team"))] == [1, 1, 2]


def test_none_at_once_is_never_by_waiting(store: Store) -> None:
    key = key_with(store, Limits(requests_at_once=0))
    refusal = ask(store, key, "a")
    assert refusal is not None and (refusal.allowed, refusal.retry_ms) == (0, None)


def test_a_limit_counts_what_was_under_way_when_it_was_set(store: Store) -> None:
    """Also what a gateway of an older version let through and did not count; ids that hold each other are others."""
    key = key_with(store, Limits())
    for team in ("key", "eam", "team-2", "t_am"):
        store.write_now(lambda c, team=team: accounts.create(c, "team", "", None, Limits(), "test", team))  # type: ignore[misc]
    for number in range(3):
        assert ask(store, key, str(number)) is None
    store.write_now(lambda connection: connection.execute("UPDATE accounts SET under_way = 0"))
    for account in (key, "team", "key", "eam", "team-2", "t_am"):
        set_limits(store, account, Limits(requests_at_once=3))
    found = {one.id: one.under_way for one in accounts.every(store.reader)}
    assert found == {"team": 3, "key": 0, "eam": 0, "team-2": 0, "t_am": 0}
    assert ask(store, key, "more") is not None
    assert end(store, "0", 1)
    assert ask(store, key, "more") is None
    set_limits(store, "team", Limits())
    set_limits(store, key, Limits())
    assert ask(store, key, "free") is None
    set_limits(store, "team", Limits(requests_at_once=5))
    assert ask(store, key, "fifth") is None
    assert ask(store, key, "sixth") is not None


def test_a_process_that_remembers_hears_of_what_others_end_and_change(store: Store) -> None:
    key = key_with(store, Limits(requests_at_once=1))
    apply = partial(books.apply, kept=Kept())

    def do(item: Any) -> Any:
        return store.write_now(lambda connection: apply(connection, [item])[0])

    with contextlib.closing(Store(store.place, SCHEMA)) as other:
        assert isinstance(do(reservation(key, "a", 1)), Granted)
        assert do(reservation(key, "b", 1)).limit == "at once"
        assert end(other, "a", 1)
        assert isinstance(do(reservation(key, "c", 1)), Granted)
        set_limits(other, "team", Limits(requests_at_once=2))
        assert isinstance(do(reservation(key, "d", 1)), Granted)
        assert do(settlement("c", 1)) is True
        assert ask(other, key, "e") is None
        assert do(reservation(key, "f", 1)).used == 2


def test_what_a_dead_process_had_under_way_is_freed(store: Store) -> None:
    key = key_with(store, Limits(requests_at_once=2))
    dead = WorkerLock(store)
    for call in ("a", "b"):
        assert ask(store, key, call, worker=dead.id) is None
    dead.close()
    assert ask(store, key, "c") is not None
    # A server lets go of a name a moment later.
    wait_until(lambda: (workers.recover(store), accounts.find(store.reader, "team").under_way)[1] == 0)


def test_what_an_older_version_settled_is_put_right_when_it_has_stopped(store: Store) -> None:
    """It frees reservations, also those of a newer gateway's dead worker, and counts nothing."""
    key = key_with(store, Limits())
    own, older, dead = (WorkerLock(store) for _ in range(3))
    workers.recover(store, own)
    for call, lock in (("a", own), ("b", older), ("c", dead)):
        assert ask(store, key, call, worker=lock.id) is None
    set_limits(store, "team", Limits(requests_at_once=5))
    set_limits(store, key, Limits(requests_at_once=5))
    for lock in (dead, older):
        store.write_now(lambda c, lock=lock: c.execute("DELETE FROM reservations WHERE worker = ?", (lock.id,)))  # type: ignore[misc]
        store.write_now(lambda c, lock=lock: c.execute("DELETE FROM workers WHERE id = ?", (lock.id,)))  # type: ignore[misc]
        lock.close()
    assert accounts.find(store.reader, "team").under_way == 3
    workers.recover(store, own)
    assert [account.under_way for account in accounts.several(store.reader, (key, "team"))] == [1, 1]
    own.leave()


class Held:
    """A stream that is open: its client has read the head and goes on whenever he likes.

    Args:
        port: The gateway's.
        key: The client's.
        fields: Of the body.
    """

    def __init__(self, port: int, key: str, **fields: Any) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        body = {**BODY, "stream": True, **fields}
        self._connection.request("POST", CHAT, json.dumps(body), {"authorization": f"Bearer {key}"})
        self._answer = self._connection.getresponse()
        self.status = self._answer.status

    def read(self) -> bytes:
        """All that is left of it."""
        return self._answer.read()

    def hang_up(self) -> None:
        """Leaves, if he has not."""
        if self._connection.sock is not None:
            with contextlib.suppress(OSError):
                self._connection.sock.shutdown(socket.SHUT_RDWR)
        self._answer.close()
        self._connection.close()


@pytest.fixture
def hold() -> Iterator[Callable[..., Held]]:
    """Opens streams; those that are still open at the end of the test are left then."""
    with contextlib.ExitStack() as stack:

        def opened(port: int, key: str, **fields: Any) -> Held:
            held = Held(port, key, **fields)
            stack.callback(held.hang_up)
            return held

        yield opened


#: A stream that is not over before the test is.
LONG = {"chunks": 2000, "interval_s": 0.05}


@pytest.fixture(scope="module")
def running(shared_upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    backend = Backend("a", shared_upstream.url, "utility", models=("tiny",))
    settings = Settings(probe_interval_s=0.1, read_timeout_s=1.0, breaker_failures=1000)
    with Workers(tmp_path_factory.mktemp("parallel"), backend, count=3, settings=settings) as running:
        yield running


def limited(running: Workers, most: int) -> tuple[str, str]:
    """A new key with a limit: (its id, the key)."""
    made = running.json("POST", "/admin/keys", {"limits": {"requests_at_once": most}}, status=201)
    return made["id"], made["key"]


def under_way(running: Workers, account: str) -> int:
    """How many requests of an account are counted."""
    with contextlib.closing(Store(running.store, SCHEMA)) as store:
        return accounts.find(store.reader, account).under_way


def test_one_too_many_is_told_whose_limit_and_what_to_do(running: Workers, hold: Callable[..., Held]) -> None:
    team = running.json(
        "POST", "/admin/accounts", {"kind": "team", "id": "few", "limits": {"requests_at_once": 3}}, status=201
    )["id"]
    key = running.json("POST", "/admin/keys", {"parent": team}, status=201)["key"]
    held = [hold(running.port, key, act=LONG) for _ in range(3)]
    assert [one.status for one in held] == [200] * 3
    for _ in range(6):
        status, headers, body = running.chat(key)
        assert (status, headers["retry-after"]) == (429, "1")
    error = json.loads(body)["error"]
    assert error["message"] == (
        "The team `few` is limited to 3 requests at once; 3 are under way. "
        "Try again when one of them has ended, or ask for a higher limit."
    )
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "requests")
    running.json("PUT", "/admin/accounts/few/limits", {"requests_at_once": 4})
    assert running.chat(key)[0] == 200
    for one in held:
        one.hang_up()
    wait_until(lambda: under_way(running, team) == 0)


def test_none_at_once_says_that_waiting_does_not_help(running: Workers) -> None:
    status, headers, body = running.chat(limited(running, 0)[1])
    assert (status, headers["x-should-retry"]) == (429, "false")
    assert "retry-after" not in headers
    assert json.loads(body)["error"]["message"].endswith("0 are under way. Ask for a higher limit.")


@pytest.mark.parametrize(
    "act",
    [
        {"chunks": 3},
        {"chunks": 9, "cut_after": 3},
        {"cut_after": 0},
        {"cut_head": True},
        {"error": {"message": "no", "code": 500}},
        {"status": 500, "body": "{}"},
        {"status": 400, "body": "{}"},
        {"head_s": 5},
    ],
    ids=str,
)
def test_however_a_request_ends_it_makes_room_once(
    running: Workers, hold: Callable[..., Held], act: dict[str, Any]
) -> None:
    account, key = limited(running, 1)
    for _ in range(3):
        held = hold(running.port, key, act=act)
        assert held.status != 429
        with contextlib.suppress(http.client.IncompleteRead):
            held.read()
        held.hang_up()
    wait_until(lambda: under_way(running, account) == 0)


def test_a_stream_counts_until_its_client_leaves(running: Workers, hold: Callable[..., Held]) -> None:
    account, key = limited(running, 1)
    for _ in range(3):
        held = hold(running.port, key, act=LONG)
        assert held.status == 200
        assert running.chat(key)[0] == 429
        held.hang_up()
        wait_until(lambda: under_way(running, account) == 0)


def test_a_client_that_hangs_up_before_an_answer_makes_room(running: Workers, upstream: FakeUpstream) -> None:
    account, key = limited(running, 1)
    body = json.dumps({**BODY, "act": {"delay_s": 30}}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", running.port)) as connection:
        connection.sendall(head.encode() + body)
        wait_until(lambda: upstream.books.open == 1)
        assert running.chat(key)[0] == 429
    wait_until(lambda: under_way(running, account) == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_asks_one_after_the_other_is_never_refused(running: Workers, stream: bool) -> None:
    """Whichever worker gets the next: who has an answer to its end has room for another."""
    account, key = limited(running, 1)
    fields = {"stream": True, "act": {"chunks": 2}} if stream else {}
    assert Counter(running.chat(key, **fields)[0] for _ in range(150)) == {200: 150}
    wait_until(lambda: under_way(running, account) == 0)


def test_many_clients_at_once_have_no_more_under_way_than_allowed(running: Workers, upstream: FakeUpstream) -> None:
    account, key = limited(running, 3)
    statuses: Counter[int] = Counter()

    def client(_: int) -> None:
        while (status := running.chat(key, act={"until_open": 3, "delay_s": 0.05})[0]) == 429:
            statuses[status] += 1
        statuses[status] += 1

    with ThreadPoolExecutor(24) as clients:
        list(clients.map(client, range(24)))
    assert statuses[200] == 24
    assert statuses[429] > 0
    assert upstream.books.most_open == 3
    wait_until(lambda: under_way(running, account) == 0)


def test_a_killed_worker_keeps_no_room(
    shared_upstream: FakeUpstream, tmp_path: Path, hold: Callable[..., Held]
) -> None:
    backend = Backend("a", shared_upstream.url, "utility", models=("tiny",))
    with Workers(tmp_path, backend, count=2) as running:
        account, key = limited(running, 4)
        held = [hold(running.port, key, act=LONG) for _ in range(4)]
        assert [one.status for one in held] == [200] * 4
        assert running.chat(key)[0] == 429
        with contextlib.closing(Store(running.store, SCHEMA)) as store:
            before = Counter(row[0] for row in store.reader.execute("SELECT worker FROM reservations"))
            running.processes[0].kill()
            running.processes[0].wait()
            alive = running.processes[1]
            wait_until(lambda: store.reader.execute("SELECT count(*) FROM workers").fetchone() == (1,))
            (left,) = store.reader.execute("SELECT id FROM workers").fetchone()
        assert alive.poll() is None
        assert before.total() == 4
        assert under_way(running, account) == before[left]
        more = [hold(running.port, key, act=LONG) for _ in range(4 - before[left])]
        assert [one.status for one in more] == [200] * len(more)
        assert running.chat(key)[0] == 429
        for one in held + more:
            one.hang_up()
        wait_until(lambda: under_way(running, account) == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_gateways_with_one_store_count_together(
    kind: str, shared_upstream: FakeUpstream, tmp_path: Path, request: pytest.FixtureRequest, hold: Callable[..., Held]
) -> None:
    """With PostgreSQL they may stand on several machines."""
    place = new_place(kind, tmp_path, request)
    backend = Backend("a", shared_upstream.url, "utility")
    with contextlib.ExitStack() as stack:
        gateways = [
            stack.enter_context(RunningGateway(backend, governance=options(place), key=MASTER_KEY)) for _ in range(2)
        ]
        store = stack.enter_context(contextlib.closing(Store(place, SCHEMA)))
        key_id, key = Governed(gateways[0], store).key(Limits(requests_at_once=2))
        held = [hold(gateway.port, key, act=LONG) for gateway in gateways]
        assert [one.status for one in held] == [200, 200]
        asking: list[Callable[[], int]] = [
            lambda g=gateway: Governed(g, store).ask(key, BODY)[0] for gateway in gateways
        ]  # type: ignore[misc]
        assert [one() for one in asking] == [429, 429]
        held[0].hang_up()
        wait_until(lambda: accounts.find(store.reader, key_id).under_way == 1)
        # One after the other, each at the next gateway.
        turns = itertools.cycle(asking)
        assert Counter(next(turns)() for _ in range(60)) == {200: 60}
        held[1].hang_up()
        wait_until(lambda: accounts.find(store.reader, key_id).under_way == 0)
