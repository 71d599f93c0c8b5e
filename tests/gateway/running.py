"""A gateway worker as its parent runs it: a real process on an inherited socket."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.governance.options import Options
from tokenmill.engine.gateway.router.settings import RoutingSettings
from tokenmill.engine.gateway.sensitivity.settings import SensitivitySettings
from tokenmill.engine.gateway.settings import Document, Settings


class RunningGateway:
    """A worker process; a context manager.

    Args:
        backends: Its backends.
        settings: Its settings.
        governance: Who may ask for what.
        key: The key that the tests' own look at its models is made with.
    """

    def __init__(
        self,
        *backends: Backend,
        settings: Settings | None = None,
        governance: Options | None = None,
        key: str = "",
        routing: RoutingSettings | None = None,
        sensitivity: SensitivitySettings | None = None,
    ) -> None:
        self._key = key
        document = Document(
            backends,
            settings or Settings(probe_interval_s=0.1),
            governance=governance,
            routing=routing,
            sensitivity=sensitivity,
        )
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(1024)
            self.port: int = listener.getsockname()[1]
            command = [sys.executable, "-m", "tokenmill.engine.gateway.worker", "--fd", str(listener.fileno())]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()])
        assert self.process.stdin is not None
        self.process.stdin.write(document.to_json())
        self.process.stdin.close()

    @property
    def url(self) -> str:
        """Its root, without a final slash."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "RunningGateway":
        self.wait_ready()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Returns when every tier is ready and every model known."""
        wait_until(lambda: self.get("/ready")[0] == 200 and bool(self._models()), timeout_s)

    def _models(self) -> list[Any]:
        headers = {"authorization": f"Bearer {self._key}"} if self._key else {}
        models: list[Any] = json.loads(self.send("GET", "/v1/models", headers=headers)[2])["data"]
        return models

    def get(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """(status, headers with names in lower case, body)."""
        return self.send("GET", path)

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Posts JSON, or bytes as they are; underscores in header names become hyphens."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.send("POST", path, raw, {"content-type": "application/json", **named})

    def send(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """One request on a connection of its own."""
        request = urllib.request.Request(self.url + path, body, headers or {}, method=method)  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310
                return response.status, lowered(response.headers), response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, lowered(error.headers), error.read()

    def raw(self, *parts: bytes, pause_s: float = 0.0) -> bytes:
        """What the gateway answers to these bytes until it closes the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause_s)
            return read_all(connection)


def lowered(headers: Any) -> dict[str, str]:
    """Headers as a dictionary with names in lower case."""
    return {name.lower(): value for name, value in headers.items()}


def read_all(connection: socket.socket) -> bytes:
    """Everything until the peer closes or resets."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def wait_until(condition: Any, timeout_s: float = 30.0) -> None:
    """Returns when the condition holds; fails after a while. Connection errors count as not yet."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            if condition():
                return
        except (ConnectionError, urllib.error.URLError):
            pass
        assert time.monotonic() < end, f"did not come true within {timeout_s} s"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
