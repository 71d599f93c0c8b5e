"""Opening the store's SQLite file, by several at once."""

import contextlib
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.gateway.running import wait_until
from tokenmill.engine.gateway import sqlite
from tokenmill.engine.gateway.database import Connection, StoreUnavailableError
from tokenmill.engine.gateway.sqlite import Sqlite
from tokenmill.engine.gateway.store import Store
from tokenmill.errors import ConfigurationError


def test_a_new_file_is_opened_by_many_at_once(tmp_path: Path) -> None:
    """As the workers of a gateway do, those that may wait for a lock and those that may not."""
    refused: list[Exception] = []

    def use(path: Path, ready: threading.Barrier, waits: bool) -> None:
        ready.wait()
        try:
            database = Sqlite(path)
            connection = database.connect(writes=True, waits=waits)
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            connection.close()
            database.close()
        except Exception as error:  # noqa: BLE001 - a thread's own would be lost
            refused.append(error)

    for turn in range(10):
        ready = threading.Barrier(8)
        users = [threading.Thread(target=use, args=(tmp_path / f"{turn}.db", ready, i % 2 == 0)) for i in range(8)]
        for user in users:
            user.start()
        for user in users:
            user.join()
    assert not refused


def test_a_file_has_one_set_of_names_and_one_order_whatever_it_is_called(tmp_path: Path) -> None:
    """Gateways that reach it by different links are no strangers: each would settle what the other has under way."""
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "other.db"
    link.symlink_to(tmp_path / "gateway.db")
    store, other = Store(tmp_path / "gateway.db", ()), Store(link, ())
    held = store.claim("a worker")
    assert held is not None
    assert other.inherit("a worker") is None
    before = other.news()
    store.write_now(lambda connection: connection.announce())
    assert other.news() != before
    held.release()
    store.close()
    other.close()


def test_what_a_full_disk_kept_from_being_written_is_written_when_there_is_room(tmp_path: Path) -> None:
    """What nobody waits for; who waits is told."""
    store = Store(tmp_path / "full.db", ("CREATE TABLE things (size INTEGER, content BLOB)",))

    def room(pages: int) -> None:
        store.write_now(lambda connection: connection.execute(f"PRAGMA max_page_count = {pages}"))

    def large(connection: Connection, items: Sequence[int] = (1,)) -> Sequence[int]:
        connection.executemany("INSERT INTO things VALUES (?, zeroblob(1000000))", [(item,) for item in items])
        return items

    room(20)
    with pytest.raises(StoreUnavailableError, match="full"):
        store.write_now(large)
    store.post_item(large, 1)
    query = "SELECT count(*) FROM things"
    assert store.write_now(lambda connection: connection.execute(query).fetchone()) == (0,)
    room(10_000)
    wait_until(lambda: store.reader.execute(query).fetchone() == (1,))
    store.close()


def test_what_came_while_the_file_was_read_only_is_written_afterwards(tmp_path: Path) -> None:
    """As after a fault of the disk, for which Linux makes a file system read-only."""
    store = Store(tmp_path / "gateway.db", ("CREATE TABLE things (size INTEGER)",))

    def add(connection: Connection, items: Sequence[int] = (1,)) -> Sequence[int]:
        connection.executemany("INSERT INTO things VALUES (?)", [(item,) for item in items])
        return items

    store._writer.execute("PRAGMA query_only = ON")
    with pytest.raises(StoreUnavailableError, match="readonly"):
        store.write_now(add)
    store.post_item(add, 1)
    wait_until(lambda: len(store._backlog) == 1)
    store._writer.execute("PRAGMA query_only = OFF")
    wait_until(lambda: store.reader.execute("SELECT count(*) FROM things").fetchone() == (1,))
    store.close()


def test_a_log_that_a_long_reader_had_grow_becomes_small_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "_LOG_BYTES", 100_000)
    database = Sqlite(tmp_path / "books.db")
    log = tmp_path / "books.db-wal"
    with contextlib.closing(database.connect(writes=True, waits=False)) as writer:

        def write() -> None:
            with database.transaction(writer, waits=False):
                writer.execute("INSERT INTO texts VALUES (randomblob(100000))")

        writer.execute("CREATE TABLE texts (text)")
        with contextlib.closing(database.connect()) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM texts").fetchone()
            for _ in range(10):
                write()
                database.tidy()
        assert log.stat().st_size > 1_000_000
        database.tidy()
        write()
        assert log.stat().st_size < 300_000
    database.close()


@pytest.mark.parametrize("copied", [True, False])
def test_a_file_that_is_removed_or_replaced_while_it_is_open_is_noticed(tmp_path: Path, copied: bool) -> None:
    """As when a backup is put in its place: what is written goes to the old one, which nobody finds again."""
    path = tmp_path / "gateway.db"
    store = Store(path, [])
    held = store.inherit("ours")
    assert held is not None
    held.release()
    if copied:
        shutil.copy(path, tmp_path / "copy")
        (tmp_path / "copy").replace(path)
    else:
        path.unlink()
    with pytest.raises(StoreUnavailableError, match="was removed or replaced while it was open; stop all gateways"):
        store.inherit("ours")
    store.close()


def test_what_can_be_opened_and_is_no_file_is_one_line(tmp_path: Path) -> None:
    """SQLite refuses a pipe with its first look at it, before any statement."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ConfigurationError, match="cannot be used: disk I/O error"):
        Store(pipe, [])


def test_a_place_without_a_write_ahead_log_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some file systems of virtual machines are; memory is such a place."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=r"stays in journal mode memory: .*; name one on a"):
        Store(Path(":memory:"), [])
