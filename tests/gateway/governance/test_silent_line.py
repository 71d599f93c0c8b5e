"""A line to PostgreSQL that a proxy keeps and forwards nothing on is given up where the server has nothing to do."""

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway.governance.postgres_server import PostgresServer
from tokenmill.engine.gateway import postgres_patience
from tokenmill.engine.gateway.database import StoreUnavailableError
from tokenmill.engine.gateway.governance.schema import SCHEMA
from tokenmill.engine.gateway.store import Store


class Proxy:
    """Forwards connections to a PostgreSQL socket; those of before `swallow` say nothing more, and stay open."""

    def __init__(self, folder: Path, server: Path) -> None:
        self._server = str(server / ".s.PGSQL.5432")
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(folder / ".s.PGSQL.5432"))
        self._listening.listen()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._ended = self._swallows = False
        self._swallowed: set[socket.socket] = set()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def swallow(self) -> None:
        self._swallows = True
        while self._swallows:
            time.sleep(0.01)

    def close(self) -> None:
        self._ended = True
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()

    def _run(self) -> None:
        while not self._ended:
            if self._swallows:
                self._swallowed |= {key.fileobj for key in self._selector.get_map().values() if key.data}  # type: ignore[misc]
                self._swallows = False
            for key, _ in self._selector.select(0.02):
                assert isinstance(key.fileobj, socket.socket)
                if key.data is None:
                    self._join(self._listening.accept()[0])
                    continue
                with contextlib.suppress(OSError):
                    said = key.fileobj.recv(1 << 16)
                    if said and key.fileobj in self._swallowed:
                        continue
                    if said:
                        key.data.sendall(said)
                        continue
                for one in (key.fileobj, key.data):
                    self._selector.unregister(one)
                    one.close()
                break

    def _join(self, client: socket.socket) -> None:
        server = socket.socket(socket.AF_UNIX)
        server.connect(self._server)
        self._selector.register(client, selectors.EVENT_READ, server)
        self._selector.register(server, selectors.EVENT_READ, client)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(postgres_patience, "SILENT_S", 0.4)
    monkeypatch.setattr(postgres_patience, "IDLE_S", 0.2)
    # The one of the process may be in the middle of a longer pause.
    monkeypatch.setattr(postgres_patience, "_WATCH", postgres_patience._Watch())
    yield


@pytest.fixture
def store(impatient: None, postgres: PostgresServer, tmp_path: Path) -> Iterator[tuple[Store, Proxy]]:
    url = postgres.new_database()
    server = Path(url.rpartition("host=")[2])
    proxy = Proxy(tmp_path, server)
    try:
        with contextlib.closing(Store(url.replace(str(server), str(tmp_path)), SCHEMA)) as opened:
            yield opened, proxy
    finally:
        proxy.close()


def test_a_line_that_says_nothing_more_is_given_up(store: tuple[Store, Proxy]) -> None:
    """What was to be written is written on another."""
    opened, proxy = store
    opened.write_now(lambda connection: connection.execute("CREATE TABLE t (n int)"))
    proxy.swallow()
    with contextlib.suppress(StoreUnavailableError):  # where the loss came too late for another try
        opened.write_now(lambda connection: connection.execute("INSERT INTO t VALUES (1)"))
    opened.write_now(lambda connection: connection.execute("INSERT INTO t VALUES (2)"))
    with contextlib.closing(opened.connect_reader()) as reader:
        assert (2,) in reader.execute("SELECT n FROM t").fetchall()


def test_a_server_that_works_for_long_is_waited_for(store: tuple[Store, Proxy]) -> None:
    opened, _ = store
    assert opened.write_now(lambda connection: connection.execute("SELECT pg_sleep(2.5), 7").fetchone()[1]) == 7


def test_a_transaction_that_takes_its_time_between_statements_is_left_alone(store: tuple[Store, Proxy]) -> None:
    opened, _ = store

    def slowly(connection: object) -> int:
        time.sleep(2)
        return 3

    assert opened.write_now(slowly) == 3
