"""A PostgreSQL server of the tests' own: a fresh cluster in a temporary folder, on a Unix socket, gone afterwards."""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

from tests.gateway.running import wait_until
from tokenmill.engine.gateway.worker import PR_SET_PDEATHSIG

#: PostgreSQL refuses to run as root: whom it runs as then.
UNPRIVILEGED = "nobody"


def programs() -> Path | None:
    """The folder with `initdb` and `postgres`; None where PostgreSQL is not installed."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    packaged = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return packaged[-1].parent if packaged else None


def _end_with_parent() -> None:
    """A test run that is killed leaves no server."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGQUIT, 0, 0, 0)


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
        settings = {"listen_addresses": "", "unix_socket_directories": str(self._folder), "fsync": "off"}
        self._command = [str(folder / "postgres"), "-D", data]
        self._command += [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        self._start()
        self._databases = 0

    def _start(self) -> None:
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                user=self._user,
                cwd=self._folder,
                stdout=log,
                stderr=log,
                env={"LC_ALL": "C"},
                preexec_fn=_end_with_parent,  # noqa: PLW1509 - nothing but a system call
            )
        wait_until(self._accepts, 30)

    def _accepts(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self._url("postgres")).close()
        except psycopg.OperationalError:
            return False
        return True

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
        with self.away():
            pass

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """The server is gone meanwhile."""
        self._end()
        try:
            yield
        finally:
            self._start()

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """The server meanwhile takes connections and does nothing more, as one whose disk does not answer."""
        first = self._process.pid
        self._signal(first, signal.SIGSTOP)  # from now on it starts no others
        children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
        processes = [first, *map(int, children)]
        try:
            for process in processes:
                self._signal(process, signal.SIGSTOP)
            yield
        finally:
            for process in processes:
                self._signal(process, signal.SIGCONT)

    @staticmethod
    def _signal(process: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(process, number)

    @contextlib.contextmanager
    def pooled(self, program: str, url: str, mode: str, settings: Mapping[str, int]) -> Iterator[str]:
        """A PgBouncer before one database meanwhile; gives the URL through it."""
        import psycopg

        database = urlsplit(url).path.removeprefix("/")
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        said = {"listen_addr": "", "unix_socket_dir": folder, "auth_type": "any", "pool_mode": mode, **settings}
        lines = ["[databases]", f"{database} = user=tokenmill host={self._folder}", "[pgbouncer]"]
        lines += [f"{name} = {value}" for name, value in said.items()]
        (folder / "pool.ini").write_text("\n".join(lines))
        if self._user is not None:
            shutil.chown(folder, self._user)
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [program, str(folder / "pool.ini")],
                user=self._user,
                stdout=log,
                stderr=log,
                preexec_fn=_end_with_parent,  # noqa: PLW1509 - nothing but a system call
            )
        place = f"postgresql://tokenmill@/{database}?host={folder}&port=6432"

        def accepts() -> bool:
            try:
                psycopg.connect(place).close()
            except psycopg.OperationalError:
                return False
            return True

        try:
            wait_until(accepts, 30)
            yield place
        finally:
            process.kill()
            process.wait()

    def _end(self) -> None:
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait(timeout=30)

    def stop(self) -> None:
        """Ends the server and removes everything."""
        self._end()
        shutil.rmtree(self._folder)

    def __enter__(self) -> "PostgresServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
