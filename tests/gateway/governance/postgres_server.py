"""A PostgreSQL server of the tests' own: a fresh cluster in a temporary folder, on a Unix socket, gone afterwards."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

#: PostgreSQL refuses to run as root: whom it runs as then.
UNPRIVILEGED = "nobody"


def programs() -> Path | None:
    """The folder with `initdb` and `postgres`; None where PostgreSQL is not installed."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    packaged = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return packaged[-1].parent if packaged else None


class PostgresServer:
    """A running server; a context manager."""

    def __init__(self) -> None:
        folder = programs()
        assert folder is not None, "PostgreSQL is not installed"
        # Socket paths are limited to 107 bytes, so not in a deep folder.
        self._folder = Path(tempfile.mkdtemp(prefix="pg"))
        self._user = UNPRIVILEGED if os.geteuid() == 0 else None
        if self._user is not None:
            shutil.chown(self._folder, self._user)
        data = str(self._folder / "data")
        initdb = [str(folder / "initdb"), "-D", data, "-U", "tokenmill", "--auth=trust", "--no-sync", "-E", "UTF8"]
        self._run(initdb)
        options = f"-c listen_addresses='' -c unix_socket_directories={self._folder} -c fsync=off"
        self._control = [str(folder / "pg_ctl"), "-D", data, "-w", "-s", "-l", str(self._folder / "log")]
        self._start = [*self._control, "-o", options, "start"]
        self._run(self._start)
        self._databases = 0

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(
            command, user=self._user, cwd=self._folder, capture_output=True, text=True, check=False, env={"LC_ALL": "C"}
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def new_database(self) -> str:
        """The URL of an empty database."""
        import psycopg

        self._databases += 1
        name = f"t{self._databases}"
        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self._url(name)

    def _url(self, database: str) -> str:
        return f"postgresql://tokenmill@/{database}?host={self._folder}"

    def crash(self) -> None:
        """Ends the server as a power failure would, and starts it again."""
        self._run([*self._control, "-m", "immediate", "stop"])
        self._run(self._start)

    def stop(self) -> None:
        """Ends the server and removes everything."""
        self._run([*self._control, "-m", "immediate", "stop"])
        shutil.rmtree(self._folder)

    def __enter__(self) -> "PostgresServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
