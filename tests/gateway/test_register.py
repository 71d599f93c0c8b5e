"""Responses of gateways on several machines, which share a PostgreSQL: each knows who keeps them and whose they are."""

import asyncio
import contextlib
import json
import platform
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.gateway.governance.conftest import postgres, store
from tests.gateway.governance.governed import MASTER_KEY, Governed, options
from tests.gateway.governance.postgres_server import PostgresServer
from tests.gateway.running import RunningGateway, wait_until
from tests.gateway.test_stored import PATH, Responding, asking, backends, holder, made
from tests.gateway.workers import Workers
from tokenmill.engine.gateway import register
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.database import Connection, now_ms
from tokenmill.engine.gateway.governance.accounts import Limits
from tokenmill.engine.gateway.governance.schema import SCHEMA
from tokenmill.engine.gateway.governance.service import Governance
from tokenmill.engine.gateway.portfolio import Target
from tokenmill.engine.gateway.register import Entry, server_of
from tokenmill.engine.gateway.settings import Settings
from tokenmill.engine.gateway.store import Store
from tokenmill.engine.gateway.store_schema import CHANGES
from tokenmill.errors import ConfigurationError

__all__ = ["postgres", "store"]
_WAYS = (("GET", ""), ("GET", "?stream=true"), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items"))


class Gated(Responding):
    """Answers nothing as long as its gate is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Event()

    async def _answer(self, request: web.Request, raw: bytes) -> web.StreamResponse:
        self.waiting.set()
        await asyncio.to_thread(self.gate.wait)
        return await super()._answer(request, raw)


@pytest.fixture
def servers() -> Iterator[list[Gated]]:
    started = [Gated() for _ in range(3)]
    for server in started:
        server.start()
    yield started
    for server in started:
        server.gate.set()
        server.stop()


@pytest.fixture
def books(postgres: PostgresServer) -> Iterator[Store]:
    """The database of the machines, empty."""
    with contextlib.closing(Store(postgres.new_database(), SCHEMA)) as opened:
        yield opened


def machine(books: Store, backends: Sequence[Backend]) -> RunningGateway:
    """A gateway that shares nothing with others but the database, and sends nothing again."""
    settings = Settings(probe_interval_s=0.1, drain_s=1.0, most_retries=0)
    return RunningGateway(*backends, settings=settings, governance=options(str(books.place)), key=MASTER_KEY)


def entered(books: Store) -> int:
    (count,) = books.write_now(lambda connection: connection.execute("SELECT count(*) FROM responses").fetchone())
    return int(count)


def renamed(servers: Sequence[Responding]) -> list[Backend]:
    """The same servers as another machine's file has them: what is `b0` here is `b2` there."""
    return backends(list(reversed(servers)))


def test_another_machine_serves_whoever_uses_an_id_at_once(books: Store, servers: list[Gated]) -> None:
    with machine(books, backends(servers)) as first, machine(books, renamed(servers)) as second:
        one, other = Governed(first, books), Governed(second, books)
        _, key = one.key()
        for _ in range(10):
            name = made(one, key)
            assert asking(other, key, "GET", f"{PATH}/{name}")[0] == 200
            # Each turn at the other machine.
            for there in (other, one) * 2:
                name = made(there, key, previous_response_id=name)
            assert asking(other, key, "POST", f"{PATH}/{name}/cancel")[0] == 200
            streamed = one.ask(key, {"model": "tiny", "input": "hi", "stream": True}, PATH)[2]
            name = json.loads(streamed.partition(b"data: ")[2])["response"]["id"]
            assert asking(other, key, "GET", f"{PATH}/{name}")[0] == 200
    # None was asked for what another keeps.
    for server in servers:
        assert all(path.split("/")[3].split("?")[0] in server.kept for _, path, _ in server.asked)
    assert all(server.kept for server in servers)
    assert sum(len(server.kept) for server in servers) == 60


def test_a_response_of_another_tenant_is_on_no_machine(books: Store, servers: list[Gated]) -> None:
    with machine(books, backends(servers)) as first, machine(books, backends(servers)) as second:
        one, other = Governed(first, books), Governed(second, books)
        teams = [one.team(Limits()) for _ in range(2)]
        (_, owner), (_, same), (_, stranger) = (one.key(parent=team) for team in (teams[0], teams[0], teams[1]))
        alone = one.key()[1]
        name = made(one, owner)
        following = {"model": "tiny", "input": "and?", "previous_response_id": name}
        missing = f"Response with id '{name}' not found."
        asked = [(there, key, way) for there in (other, one) for key in (stranger, alone) for way in (*_WAYS, None)]

        def told(asking_for: Any) -> tuple[int, str]:
            there, key, way = asking_for
            if way is None:
                status, _, body = there.ask(key, following, PATH)
                said = json.loads(body)
            else:
                status, said = asking(there, key, way[0], f"{PATH}/{name}{way[1]}")
            return status, said["error"]["message"]

        # Before and after the other machine has learned of it.
        for _ in range(2):
            with ThreadPoolExecutor(len(asked)) as strangers:
                assert set(strangers.map(told, asked)) == {(404, missing)}
            assert holder(servers, name).asked == []
            for key in (same, owner, MASTER_KEY):
                assert asking(other, key, "GET", f"{PATH}/{name}")[0] == 200
                assert other.ask(key, following, PATH)[0] == 200
            holder(servers, name).asked.clear()


def test_it_is_known_after_a_restart(books: Store, servers: list[Gated]) -> None:
    with machine(books, backends(servers)) as gateway:
        governed = Governed(gateway, books)
        (_, key), (_, other) = governed.key(), governed.key()
        names = [made(governed, key, background=number % 2 == 1) for number in range(6)]
    with machine(books, backends(servers)) as gateway:
        governed = Governed(gateway, books)
        for name in names:
            assert asking(governed, other, "GET", f"{PATH}/{name}")[0] == 404
            assert asking(governed, key, "GET", f"{PATH}/{name}")[0] == 200
            made(governed, key, previous_response_id=name)
            assert asking(governed, other, "GET", f"{PATH}/{name}")[0] == 404


def test_every_worker_of_every_machine_knows_it(books: Store, servers: list[Gated], tmp_path: Path) -> None:
    settings = Settings(probe_interval_s=0.1, most_retries=0)
    with contextlib.ExitStack() as running:
        machines = []
        for number in range(2):
            folder = tmp_path / str(number)
            folder.mkdir()
            workers = Workers(folder, *backends(servers), count=2, settings=settings, store=str(books.place))
            machines.append(running.enter_context(workers))
        key = machines[0].json("POST", "/admin/keys", {}, status=201)["key"]
        earlier = None
        for turn in range(40):
            body = {"model": "tiny", "input": "hi", "previous_response_id": earlier}
            earlier = machines[turn % 2].json("POST", PATH, body, key)["id"]
            assert machines[turn // 2 % 2].json("GET", f"{PATH}/{earlier}", key=key)["id"] == earlier


def test_what_comes_while_the_database_is_away_is_entered_later(
    books: Store, servers: list[Gated], postgres: PostgresServer
) -> None:
    with machine(books, backends(servers)) as first, machine(books, backends(servers)) as second:
        one, other = Governed(first, books), Governed(second, books)
        (_, key), (_, stranger) = one.key(), one.key()
        for server in servers:
            server.gate.clear()
        answered: list[str] = []
        client = threading.Thread(target=lambda: answered.append(made(one, key)))
        client.start()
        wait_until(lambda: any(server.waiting.is_set() for server in servers))
        with postgres.away():
            for server in servers:
                server.gate.set()
            client.join()
            (name,) = answered
            # Who needs no database to be known is served by the machine that made it; the other one cannot tell.
            assert asking(one, MASTER_KEY, "GET", f"{PATH}/{name}")[0] == 200
            assert asking(other, MASTER_KEY, "GET", f"{PATH}/{name}")[0] == 503
        wait_until(lambda: asking(one, key, "GET", f"{PATH}/{name}")[0] == 200)
        wait_until(lambda: asking(other, key, "GET", f"{PATH}/{name}")[0] == 200)
        assert [asking(there, stranger, "GET", f"{PATH}/{name}")[0] for there in (one, other)] == [404, 404]


def test_a_store_of_an_older_version_learns_of_responses(books: Store, servers: list[Gated]) -> None:
    def upgrade(connection: Connection) -> None:
        connection.execute("DROP TABLE responses")
        for statement in CHANGES[6]:
            connection.execute(statement)

    books.write_now(upgrade)
    with machine(books, backends(servers)) as first, machine(books, backends(servers)) as second:
        one, other = Governed(first, books), Governed(second, books)
        _, key = one.key()
        name = made(one, key)
        assert asking(other, key, "GET", f"{PATH}/{name}")[0] == 200


def test_what_is_not_to_be_kept_is_not_entered(books: Store, servers: list[Gated]) -> None:
    with machine(books, backends(servers)) as gateway:
        governed = Governed(gateway, books)
        _, key = governed.key()
        for said in ({"store": False}, {"store": True}, {}):
            made(governed, key, **said)
    assert entered(books) == 2


def test_a_machine_that_has_no_such_server_asks_its_own(books: Store, servers: list[Gated]) -> None:
    """And is told by it that there is no such response."""
    with machine(books, backends(servers[:1])) as first, machine(books, backends(servers[1:2])) as second:
        one, other = Governed(first, books), Governed(second, books)
        _, key = one.key()
        name = made(one, key)
        assert asking(other, key, "GET", f"{PATH}/{name}")[0] == 404
        assert [path for _, path, _ in servers[1].asked] == [f"{PATH}/{name}"]
        assert asking(one, key, "GET", f"{PATH}/{name}")[0] == 200


def test_a_server_is_found_by_its_address_then_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def here(**servers: str) -> list[Target]:
        server_of.cache_clear()
        return [Target(Backend(name, url, "t"), Settings()) for name, url in servers.items()]

    def entry(name: str, url: str) -> Entry:
        server_of.cache_clear()
        return Entry("", name, server_of(Backend(name, url, "t").root))

    def found(one: Entry, targets: list[Target]) -> str | None:
        target = one.among(targets)
        return None if target is None else target.backend.base_url

    monkeypatch.setattr(platform, "node", lambda: "one")
    far, near = entry("a", "http://far:1/v1"), entry("b", "http://127.0.0.1:1")
    assert found(near, here(x="http://127.0.0.1:2", y="http://127.0.0.1:1/v1")) == "http://127.0.0.1:1/v1"
    monkeypatch.setattr(platform, "node", lambda: "other")
    assert found(far, here(b="http://far:1", a="http://near:1")) == "http://far:1"
    assert found(far, here(b="http://far:1", a="http://far:1/")) == "http://far:1/"
    # What is this address there is another one here.
    assert found(near, here(a="http://127.0.0.1:1", b="http://one:1")) == "http://one:1"
    assert found(near, here(a="http://127.0.0.1:1", c="http://[::1]:1", d="http://localhost:1")) is None
    server_of.cache_clear()


def test_the_oldest_leave(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(register, "MOST", 40)
    monkeypatch.setattr(register, "LOOK_EVERY", 10)

    def enter(*names: int, age_ms: int = 0) -> None:
        items = [(f"r{name}", Entry("o", "b", "s"), now_ms() - age_ms) for name in names]
        store.write_now(lambda connection: register.write(connection, items))

    def known(*names: int) -> list[bool]:
        found = store.write_now(lambda connection: register.read(connection, [f"r{name}" for name in names]))
        return [one is not None for one in found]

    for name in range(500):
        enter(name)
        assert entered(store) <= 50
    assert known(400, 459, 460, 499) == [False, False, True, True]
    # One that comes again is as new as any.
    enter(470)
    enter(*range(500, 535))
    assert known(470, 471, 534) == [True, False, True]
    enter(*range(600, 605), age_ms=register.LONGEST_MS)
    assert known(600) == [False]
    monkeypatch.setattr(register, "LONGEST_MS", 0)
    enter(700, *range(710, 720))
    assert entered(store) == 0


def test_a_later_response_of_the_same_name_is_whose_it_is(store: Store) -> None:
    for owner in ("one", "other"):
        entry = Entry(owner, "b", "s")
        store.write_now(lambda connection, entry=entry: register.write(connection, [("r", entry, now_ms())]))
        (found,) = store.write_now(lambda connection: register.read(connection, ["r"]))
        assert found == entry


def test_nobody_learns_an_id_from_the_database(books: Store, servers: list[Gated]) -> None:
    with machine(books, backends(servers)) as gateway:
        governed = Governed(gateway, books)
        name = made(governed, governed.key()[1])
    rows: list[Any] = books.write_now(lambda connection: connection.execute("SELECT * FROM responses").fetchall())
    assert len(rows) == 1 and name not in json.dumps(rows)


def test_what_is_asked_for_together_is_one_statement(store: Store) -> None:
    """Every machine's writers wait meanwhile."""
    entry = Entry("o", "b", "s")
    asked: list[str] = []

    class Counted:
        def __init__(self, connection: Connection) -> None:
            self._connection = connection

        def execute(self, statement: str, parameters: Sequence[Any] = (), /) -> Any:
            asked.append(statement)
            return self._connection.execute(statement, parameters)

    def look(connection: Connection) -> list[Entry | None]:
        register.write(connection, [("a", entry, now_ms()), ("c", entry, now_ms())])
        return register.read(Counted(connection), ["c", "b", "a", "c"])  # type: ignore[arg-type]

    assert store.write_now(look) == [entry, None, entry, entry]
    assert len(asked) == 1


def test_a_user_with_no_right_to_the_table_is_told_so_at_the_start(books: Store) -> None:
    """As after an upgrade, where rights were given to the tables that there were."""
    psycopg = pytest.importorskip("psycopg")
    with psycopg.connect(str(books.place), autocommit=True) as root:
        root.execute("CREATE ROLE clerk LOGIN")
        root.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO clerk")

        async def begin() -> None:
            governance = Governance(options(str(books.place).replace("tokenmill@", "clerk@")))
            try:
                await governance.start()
            finally:
                await governance.stop()

        for missing in ("SELECT", "INSERT", "UPDATE", "DELETE"):
            root.execute(f"REVOKE {missing} ON responses FROM clerk")
            with pytest.raises(ConfigurationError, match="permission denied for table responses"):
                asyncio.run(begin())
            root.execute(f"GRANT {missing} ON responses TO clerk")
        asyncio.run(begin())
        assert entered(books) == 0
        root.execute("DROP OWNED BY clerk")
        root.execute("DROP ROLE clerk")
