"""Workers whose PostgreSQL goes away and comes back: nobody who lives is taken for dead, whoever dies is buried."""

import contextlib
import http.client
import json
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlencode

import pytest

from tests.gateway.governance.governed import CHAT, MASTER_KEY, Governed, options
from tests.gateway.governance.postgres_server import PostgresServer
from tests.gateway.governance.test_budgets import ask, end, key_with
from tests.gateway.running import RunningGateway, lowered, wait_until
from tests.gateway.upstream import FakeUpstream
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.database import StoreUnavailableError
from tokenmill.engine.gateway.governance import accounts, workers
from tokenmill.engine.gateway.governance.accounts import Limits
from tokenmill.engine.gateway.governance.schema import SCHEMA
from tokenmill.engine.gateway.governance.workers import WorkerLock
from tokenmill.engine.gateway.money import Prices
from tokenmill.engine.gateway.store import Store

_CLAIMS = (
    "SELECT pid FROM pg_locks JOIN pg_database ON oid = database "
    "WHERE locktype = 'advisory' AND datname = current_database()"
)


@pytest.fixture
def place(postgres: PostgresServer) -> str:
    return postgres.new_database()


@pytest.fixture
def store(place: str) -> Iterator[Store]:
    """The test's own connection."""
    with contextlib.closing(Store(place, SCHEMA)) as opened:
        yield opened


def lose_claims(store: Store) -> None:
    """Ends the sessions that hold the workers' names, as an administrator or a proxy might."""
    ended = [pid for (pid,) in store.reader.execute(_CLAIMS).fetchall()]
    for pid in ended:
        store.reader.execute("SELECT pg_terminate_backend(?)", (pid,))
    still = "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY(?)"
    wait_until(lambda: store.reader.execute(still, (ended,)).fetchone() == (0,))


def claims(store: Store) -> int:
    """How many names are held."""
    return len(store.reader.execute(_CLAIMS).fetchall())


def listed(store: Store) -> set[str]:
    return {row[0] for row in store.reader.execute("SELECT id FROM workers")}


def test_worker_that_lost_its_session_is_not_buried(store: Store, place: str) -> None:
    """The other looks first, and again when the worker has taken its name again; then the worker dies."""
    other = Store(place, SCHEMA)
    living, watching = WorkerLock(store), WorkerLock(other)
    lose_claims(store)
    assert workers.recover(other, watching) == 0
    assert workers.recover(store, living) == 0
    assert listed(store) == {living.id, watching.id}
    assert claims(store) == 2
    store.write_now(lambda connection: connection.execute("SELECT 1"))
    living.close()  # as if killed: its claim is gone, its row is not
    wait_until(lambda: (workers.recover(other, watching), listed(store))[1] == {watching.id})
    watching.close()
    other.close()


def test_worker_that_was_buried_alive_charges_nothing_twice(store: Store, place: str) -> None:
    """Its requests are charged at their bounds; it is listed again, and looked after when it dies at last."""
    other = Store(place, SCHEMA)
    stalled, watching = WorkerLock(store), WorkerLock(other)
    key = key_with(store, Limits(hard_limit=100))
    assert ask(store, key, "a", 60, worker=stalled.id) is None
    lose_claims(store)
    wait_until(lambda: workers.recover(other, watching) == 1)
    assert not end(store, "a", 10)
    assert accounts.find(store.reader, key).spent == 60
    assert ask(store, key, "b", 30, worker=stalled.id) is None
    assert listed(store) == {watching.id}
    wait_until(lambda: workers.recover(other, watching) == 1)
    assert workers.recover(store, stalled) == 0
    assert listed(store) == {watching.id, stalled.id}
    assert (accounts.find(store.reader, key).spent, accounts.find(store.reader, key).reserved) == (90, 0)
    rows = store.reader.execute("SELECT call, cost, outcome FROM ledger ORDER BY call").fetchall()
    assert rows == [("a", 60, "lost"), ("b", 30, "lost")]
    stalled.leave()
    watching.leave()
    other.close()


def test_streams_of_workers_that_lost_their_claims(store: Store, place: str, shared_upstream: FakeUpstream) -> None:
    """Two processes keep what they have reserved while they live, and lose all of it when they are killed."""
    backend = Backend("a", shared_upstream.url, "utility", prices=Prices(3_000_000, 1_000_000, 7_000_000))
    gateways = [RunningGateway(backend, governance=options(place), key=MASTER_KEY) for _ in range(2)]
    with contextlib.ExitStack() as open_streams:
        for gateway in gateways:
            open_streams.enter_context(gateway)
        _, key = Governed(gateways[0], store).key()
        body = json.dumps({"model": "tiny", "stream": True, "max_tokens": 20, "act": {"delay_s": 60}}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\ncontent-length: {len(body)}\r\n\r\n"
        for gateway in gateways * 3:
            stream = open_streams.enter_context(socket.create_connection(("127.0.0.1", gateway.port)))
            stream.sendall(head.encode() + body)

        def reserved() -> int:
            return int(store.reader.execute("SELECT count(*) FROM reservations").fetchone()[0])

        wait_until(lambda: reserved() == 6)
        names = listed(store)
        for _ in range(3):
            lose_claims(store)
            wait_until(lambda: claims(store) == 2)
        assert (reserved(), listed(store)) == (6, names)
        for gateway in gateways:
            gateway.process.kill()
            gateway.process.wait()
        heir = open_streams.enter_context(RunningGateway(backend, governance=options(place), key=MASTER_KEY))
        wait_until(lambda: reserved() == 0)
        assert heir.process.poll() is None
        outcomes = store.reader.execute("SELECT outcome, count(*) FROM ledger GROUP BY outcome").fetchall()
        assert outcomes == [("lost", 6)]


def test_request_that_ends_while_the_server_is_gone_is_settled_later(
    store: Store, place: str, postgres: PostgresServer
) -> None:
    """By what it used, as if the server had been there."""
    upstream = FakeUpstream().start()
    backend = Backend("a", upstream.url, "utility", prices=Prices(3_000_000, 1_000_000, 7_000_000))
    with RunningGateway(backend, governance=options(place), key=MASTER_KEY) as gateway:
        governed = Governed(gateway, store)
        key_id, key = governed.key()
        act = {"chunks": 20, "until_open": 2}
        body = {"model": "tiny", "stream": True, "max_tokens": 20, "act": act}
        with ThreadPoolExecutor() as pool:
            asking = pool.submit(governed.ask, key, body)
            wait_until(lambda: governed.account(key_id).reserved > 0)
            with postgres.away():
                # The second one, for which the upstream waits.
                urllib.request.urlopen(f"{upstream.url}/chat/completions", b"{}").close()  # noqa: S310
                assert asking.result(timeout=30)[0] == 200
        with contextlib.suppress(StoreUnavailableError):
            store.reader.execute("SELECT 1")
        wait_until(lambda: len(governed.ledger(key_id)) == 1)
        (row,) = governed.ledger(key_id)
        assert (row.completion, row.exact, row.outcome) == (20, True, "ok")
        assert (governed.account(key_id).spent, governed.account(key_id).reserved) == (row.cost, 0)
    upstream.stop()


def test_server_that_is_gone_is_said_to_be_so(
    store: Store, place: str, postgres: PostgresServer, shared_upstream: FakeUpstream
) -> None:
    """Every door answers 503 with the time to come back, from the first request on, and opens again by itself."""
    backend = Backend("a", shared_upstream.url, "utility")
    with RunningGateway(backend, governance=options(place), key=MASTER_KEY) as gateway:
        identity, key = Governed(gateway, store).key()
        cookie = log_in(gateway)[1]["set-cookie"].partition(";")[0]
        as_key, as_master = {"authorization": f"Bearer {key}"}, {"authorization": f"Bearer {MASTER_KEY}"}
        doors: list[Callable[[], tuple[int, dict[str, str], bytes]]] = [
            lambda: gateway.post(CHAT, {"model": "tiny"}, **as_key),
            lambda: gateway.send("GET", "/v1/models", headers=as_key),
            lambda: gateway.post(CHAT, {"model": "tiny"}, **as_master),
            lambda: gateway.send("GET", "/key/info", headers=as_key),
            lambda: gateway.send("GET", f"/key/info?key={identity}", headers=as_master),
            lambda: gateway.send("GET", "/admin/accounts", headers=as_master),
            lambda: gateway.post("/admin/keys", {}, **as_master),
            lambda: log_in(gateway, key),
            lambda: gateway.send("GET", "/dashboard", headers={"cookie": cookie}),
        ]
        with postgres.away():
            for door in doors:
                status, headers, body = door()
                assert (status, headers["retry-after"]) == (503, "2")
                assert b"books cannot be" in body.replace(b"&#39;", b"'")
        wait_until(lambda: all(door()[0] < 500 for door in doors))


def test_a_server_that_is_silent_stops_nobody_who_does_not_need_it(
    place: str, store: Store, postgres: PostgresServer, upstream: FakeUpstream
) -> None:
    """It takes connections and statements and answers none: streams go on, and new requests get 503."""
    backend = Backend("a", upstream.url, "utility")
    with RunningGateway(backend, governance=options(place), key=MASTER_KEY) as gateway:
        _, key = Governed(gateway, store).key()
        long = {"model": "tiny", "stream": True, "act": {"chunks": 20, "interval_s": 0.2}}
        with ThreadPoolExecutor(1) as threads:
            stream = threads.submit(gateway.post, CHAT, long, authorization=f"Bearer {key}")
            wait_until(lambda: upstream.books.open == 1)
            with postgres.silent():
                # The first may be reserved for; the others are not let in.
                for _ in range(3):
                    status, headers, _body = gateway.post(CHAT, {"model": "tiny"}, authorization=f"Bearer {key}")
                    assert (status, headers["retry-after"]) == (503, "2")
                assert gateway.get("/health")[0] == 200
                assert stream.result()[2].endswith(b"data: [DONE]\n\n")
        wait_until(lambda: gateway.post(CHAT, {"model": "tiny"}, authorization=f"Bearer {key}")[0] == 200, 30)
        wait_until(lambda: store.reader.execute("SELECT 1 FROM reservations").fetchone() is None)


def test_nobody_is_refused_for_what_failed_long_ago(place: str, postgres: PostgresServer) -> None:
    """An event loop's connection is made by a thread; its failure is told to nobody once it is to be tried again."""
    from tokenmill.engine.gateway.postgres import NOT_AGAIN_S, PostgresConnection

    with contextlib.closing(PostgresConnection(place, waits=False)) as connection:
        connection.raw.close()
        with postgres.silent():
            with pytest.raises(StoreUnavailableError, match="does not answer"):
                connection.execute("SELECT 1")
            wait_until(lambda: all(thread.name != "store-connector" for thread in threading.enumerate()))
        time.sleep(NOT_AGAIN_S)
        refusals = []

        def answers() -> bool:
            try:
                return connection.execute("SELECT 1").fetchone() == (1,)
            except StoreUnavailableError as error:
                refusals.append(str(error))
                return False

        wait_until(answers)
        connection.raw.close()
        wait_until(answers)  # lost again: what was made for the first time is not taken for the next
        assert all("does not answer" in refusal for refusal in refusals), refusals  # it may take a moment to connect


def log_in(gateway: RunningGateway, key: str = MASTER_KEY) -> tuple[int, dict[str, str], bytes]:
    """Sends the dashboard's form; follows nothing."""
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=30)
    headers = {"content-type": "application/x-www-form-urlencoded"}
    connection.request("POST", "/dashboard/login", urlencode({"key": key}), headers)
    response = connection.getresponse()
    answer = response.status, lowered(response.headers), response.read()
    connection.close()
    return answer
