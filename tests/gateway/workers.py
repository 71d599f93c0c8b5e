"""Several gateway workers on one socket, as the supervisor starts them, with governance on a store of their own."""

import json
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.gateway.running import lowered, wait_until
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.governance.options import Options, digest
from tokenmill.engine.gateway.observability.options import Options as ObservabilityOptions
from tokenmill.engine.gateway.router.settings import RoutingSettings
from tokenmill.engine.gateway.settings import Document, Settings

MASTER_KEY = "sk-master-0123456789abcdef0123456789"
COMMAND = (sys.executable, "-m", "tokenmill.engine.gateway.worker", "--fd")


class Workers:
    """Worker processes; a context manager.

    Args:
        folder: For the store and the workers' figures.
        backends: Their backends.
        count: How many.
        request_log: Whether they write a line per request to standard error, which is the file `log`.
        traces: Where their spans go.
        open_metrics: Whether `/metrics` answers everybody.
        settings: Their settings.
        routing: How requests that name no model are routed.
        wait_for: Tiers that must be up before the tests begin; empty: all.
        accounts: Most teams, and apps, that metrics name.
        store: Where governance is kept instead.
    """

    def __init__(
        self,
        folder: Path,
        *backends: Backend,
        count: int = 1,
        request_log: bool = False,
        traces: str | None = None,
        open_metrics: bool = True,
        settings: Settings | None = None,
        routing: RoutingSettings | None = None,
        wait_for: tuple[str, ...] = (),
        accounts: int = 50,
        store: str | None = None,
    ) -> None:
        self._awaited = wait_for
        self.store = folder / "gateway.db"
        self.log = folder / "stderr.log"
        document = Document(
            backends,
            settings or Settings(probe_interval_s=0.1),
            governance=Options(store or str(self.store), digest(MASTER_KEY)),
            observability=ObservabilityOptions(
                request_log=request_log,
                traces=traces,
                open_metrics=open_metrics,
                accounts=accounts,
                shared=str(folder / "figures"),
            ),
            routing=routing,
        )
        self._document = document.to_json()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port: int = self._listener.getsockname()[1]
        self.processes = [self.start() for _ in range(count)]

    def start(self) -> "subprocess.Popen[bytes]":
        """One more worker."""
        descriptor = self._listener.fileno()
        with self.log.open("ab") as errors:
            process = subprocess.Popen(
                [*COMMAND, str(descriptor)], stdin=subprocess.PIPE, stderr=errors, pass_fds=[descriptor]
            )
        assert process.stdin is not None
        process.stdin.write(self._document)
        process.stdin.close()
        return process

    @property
    def url(self) -> str:
        """Their root, without a final slash."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Workers":
        try:
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends them."""
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._listener.close()

    def wait_ready(self) -> None:
        """Returns when every worker has answered that every tier is up."""
        seen: set[int] = set()

        def ask(_: int) -> None:
            status, _headers, body = self.send("GET", "/ready")
            said = json.loads(body)
            missing = said.get("tiers", {})
            if status == 200 or (self._awaited and not any(tier in missing for tier in self._awaited)):
                seen.add(said["worker"])

        # Several at once: of connections that come one by one a worker that is always the quicker may take each.
        with ThreadPoolExecutor(8) as askers:

            def everyone() -> bool:
                list(askers.map(ask, range(8)))
                return {process.pid for process in self.processes} <= seen

            wait_until(everyone, 30)

    def send(
        self, method: str, path: str, body: Any = None, key: str | None = MASTER_KEY, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of one request on a connection of its own; a body becomes JSON."""
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        sent = {"content-type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        if key is not None:
            sent["authorization"] = f"Bearer {key}"
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, raw, sent)
            response = connection.getresponse()
            return response.status, lowered(response.headers), response.read()
        finally:
            connection.close()

    def json(self, method: str, path: str, body: Any = None, key: str | None = MASTER_KEY, status: int = 200) -> Any:
        """The JSON of an answer that must have this status."""
        found, _, answer = self.send(method, path, body, key)
        assert found == status, answer
        return json.loads(answer)

    def chat(self, key: str | None, model: str = "tiny", **fields: Any) -> tuple[int, dict[str, str], bytes]:
        """One chat completion."""
        return self.send("POST", "/v1/chat/completions", {"model": model, "messages": [], **fields}, key)
