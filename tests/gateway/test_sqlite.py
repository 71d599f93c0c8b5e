"""Opening the store's SQLite file, by several at once."""

import threading
from pathlib import Path

from tokenmill.engine.gateway.sqlite import Sqlite


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
