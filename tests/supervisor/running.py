"""A running `tokenmill serve` under test: its output, its processes, its port."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FAKE = (sys.executable, str(Path(__file__).with_name("serve_fake.py")))
REAL = (sys.executable, "-m", "tokenmill", "serve")


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true answer of the condition."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := condition():
            return answer
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds:g} s: {what}")


class Running:
    """One `tokenmill serve` in its own session; call `close`, it ends everything.

    Attributes:
        lines: What it printed so far, standard error included.
    """

    def __init__(self, command: Sequence[str], folder: Path, **environment: str) -> None:
        self.folder = folder
        self.lines: list[str] = []
        # Tests that run in the background of a script, or under nohup, have signals ignored; the server would, too.
        self._process = subprocess.Popen(
            ["env", "--default-signal=INT,HUP,TERM", *command],
            env={**os.environ, "TOKENMILL_CACHE": str(folder), **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
            cwd=ROOT,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                self.lines.append(line.rstrip("\n"))

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def port(self) -> int:
        found = re.search(r"port: bound: [^ ]*:(\d+)", self.text)
        assert found, self.text
        return int(found[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_ready(self, seconds: float = 30) -> None:
        """Waits for the panel."""
        until(lambda: "  try: " in self.text or self._process.poll() is not None, seconds, f"ready\n{self.text}")
        assert self._process.poll() is None, self.text

    def wait_end(self, seconds: float) -> int:
        """Waits for the end; returns the exit status."""
        status = self._process.wait(seconds)
        self._reader.join(5)
        return status

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def processes(self) -> dict[int, str]:
        """pid to command line of what it started and what that started (they share its session), without itself."""
        return {pid: command for pid, command in session(self.pid).items() if pid != self.pid}

    def pids(self, words: str) -> set[int]:
        """Those whose command line has these words."""
        return {pid for pid, command in self.processes().items() if words in command}

    def engine_log(self, name: str) -> Path:
        return next(self.folder.glob(f"logs/*/engine-{name}.log"))

    def close(self) -> None:
        """Ends everything, however it stands."""
        if self._process.poll() is None:
            self._process.kill()
        for pid in session(self.pid):
            os.kill(pid, signal.SIGKILL)
        self._process.wait(10)
        self._reader.join(10)


def session(leader: int) -> dict[int, str]:
    """pid to command line of each living process of a session."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, owner = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(owner) == leader and state != "Z":
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def call(
    url: str,
    body: Any = None,
    timeout: float = 30,
    *,
    method: str | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, dict[str, str], Any]:
    """(status, headers in lower case, JSON); by default a GET, or a POST when there is a body."""
    data = None if body is None else json.dumps(body).encode()
    named = {"Content-Type": "application/json", **(headers or {})}
    request = urllib.request.Request(url, data, named, method=method)  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:  # noqa: S310
            return answer.status, {name.lower(): value for name, value in answer.headers.items()}, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, {name.lower(): value for name, value in error.headers.items()}, json.load(error)
