"""Servers and the client as child processes that end with this one."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenmill.errors import TokenmillError

#: A server of a large model compiles before it answers.
_START_SECONDS = 900.0
_END_SECONDS = 20.0
_EXCEPTION = re.compile(r"\b\w+(?:Error|Exception): .+$")


class ServingError(TokenmillError):
    """A server or the client ended before its work was done; carries its last line."""


class Server:
    """One vLLM server on a free port of 127.0.0.1, started like `tokenmill serve` starts it.

    Args:
        name: In messages and of its log.
        model: A checkpoint's folder.
        flags: Of `vllm serve`.
        hooks: The value of `TOKENMILL_HOOKS`.
        folder: For its log and its status file.
        environment: Further variables.
    """

    def __init__(
        self, name: str, model: Path, flags: Sequence[str], hooks: str, folder: Path, environment: dict[str, str]
    ) -> None:
        self.name = name
        self.port = _free_port()
        self.log = folder / f"{name}.log"
        self._status = folder / f"{name}.json"
        reading, self._alive = os.pipe()
        variables = {
            "TOKENMILL_HOOKS": hooks,
            "TOKENMILL_STATUS_FILE": str(self._status),
            "TOKENMILL_PARENT_FD": str(reading),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-m", "tokenmill.engine.vllm.launch", str(model), "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--served-model-name", "model", *flags]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[reading],
                env={**os.environ, **environment, **variables},
            )
        os.close(reading)

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def wait(self) -> None:
        """Returns when it is ready.

        Raises:
            ServingError: It ended, or was not ready in time.
        """
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise ServingError(f"the server {self.name} ended with {self._process.returncode}: {_last(self.log)}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:  # noqa: S310
                if answer.status == 200:
                    return
            time.sleep(0.3)
        raise ServingError(f"the server {self.name} was not ready after {_START_SECONDS:.0f} s: {_last(self.log)}")

    def hooks(self) -> dict[str, str]:
        """Hook to `state: detail`, as the process that runs the model says it."""
        try:
            report = json.loads(self._status.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {entry["hook"]: f"{entry['state']}: {entry['detail']}" for entry in report["hooks"]}

    def close(self) -> None:
        """Ends it and everything that it started."""
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        os.close(self._alive)  # the launcher ends its whole group when this closes
        if self._process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_SECONDS)
            self._process.kill()
            self._process.wait()


class Client:
    """vLLM's client in a process of its own; its messages go to a file in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "client.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tokenmill.bench.serving.client"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "TOKENMILL_HOOKS": "none", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
            )

    def run(self, flags: Sequence[str]) -> dict[str, Any]:
        """One run of `vllm bench serve`; its result.

        Raises:
            ServingError: The client ended, or a request failed.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(list(flags)).encode() + b"\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise ServingError(f"vLLM's client ended with {self._process.wait()}: {_last(self._log)}")
        result: dict[str, Any] = json.loads(line)
        if result.get("failed"):
            raise ServingError(
                f"{result['failed']} requests failed, the first with: {next(filter(None, result['errors']), '?')}"
            )
        return result

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _last(log: Path) -> str:
    """The last exception that a log names, but for vLLM's that only points to it; else its last line."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    for line in reversed(lines):
        named = _EXCEPTION.search(line)
        if named and "See root cause above" not in line:
            return named[0]
    return lines[-1].strip() if lines else "it said nothing"
