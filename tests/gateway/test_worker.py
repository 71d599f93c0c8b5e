"""The worker process: its document, its end, its parent's end."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.gateway.running import RunningGateway, is_alive, read_all, wait_until
from tests.gateway.upstream import FakeUpstream
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.observability.options import Options
from tokenmill.engine.gateway.settings import Document, Settings
from tokenmill.errors import ConfigurationError

WORKER = [sys.executable, "-m", "tokenmill.engine.gateway.worker", "--fd"]


def test_document_survives_the_pipe() -> None:
    backend = Backend("a", "http://h:1/v1", "t", ("m", "n"), {"m": "x"}, "secret", weight=2, canary=0.1, zone="cloud")
    document = Document((backend,), Settings(max_body_bytes=1), parent_pid=3)
    assert Document.from_json(document.to_json()) == document
    assert "secret" not in repr(document)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "cannot be read"),
        ("{}", "backends"),
        ('{"backends": []}', "no backend"),
        ('{"backends": [{"name": "a", "base_url": "ftp://x", "tier": "t"}]}', "base_url"),
        ('{"backends": [{"name": "a", "base_url": "http://x", "tier": "t", "weight": 0}]}', "weight"),
        ('{"backends": [{"name": "a", "base_url": "http://x", "tier": "t", "canary": 2}]}', "canary"),
        ('{"backends": [{"name": "a", "base_url": "http://x", "tier": 3}]}', "tier"),
    ],
)
def test_wrong_document_is_one_line(text: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        Document.from_json(text.encode())


def test_worker_reports_a_wrong_document_and_ends() -> None:
    done = subprocess.run([*WORKER, "0"], input="{}", capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("gateway worker: error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("level", "status", "says"),
    [
        ("loud", 2, "TOKENMILL_LOG_LEVEL='loud' is not accepted"),
        ("info", 3, "observability.traces needs opentelemetry"),
    ],
)
def test_what_a_worker_cannot_use_is_one_line(level: str, status: int, says: str) -> None:
    document = Document((Backend("a", "http://h", "t"),), observability=Options(traces="http://h/v1/traces"))
    program = (
        "import sys; sys.modules['opentelemetry.sdk.resources'] = None;"
        "from tokenmill.engine.gateway.worker import main; sys.exit(main())"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = subprocess.run(
            [sys.executable, "-c", program, "--fd", str(listener.fileno())],
            input=document.to_json(), capture_output=True, timeout=30, check=False, pass_fds=[listener.fileno()],
            env={**os.environ, "TOKENMILL_LOG_LEVEL": level},
        )  # fmt: skip
    (line,) = done.stderr.decode().splitlines()
    assert (done.returncode, line.startswith(f"gateway worker: error: {says}")) == (status, True), line


def test_base_url_with_and_without_v1() -> None:
    for url in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"):
        assert Backend("a", url, "t").root == "http://h:1"
    assert Backend("a", "https://h/api/v1", "t").root == "https://h/api"


def test_sigterm_lets_open_streams_end_and_accepts_no_more(shared_upstream: FakeUpstream) -> None:
    body = json.dumps({"model": "tiny", "stream": True, "act": {"chunks": 20, "interval_s": 0.05}}).encode()
    answers: list[bytes] = []
    gateway = RunningGateway(Backend("a", shared_upstream.url, "utility"))
    gateway.wait_ready()
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=30) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        answers.append(connection.recv(1000))
        reader = threading.Thread(target=lambda: answers.append(read_all(connection)))
        reader.start()
        gateway.process.send_signal(signal.SIGTERM)
        wait_until(lambda: refuses(gateway.port))
        reader.join(timeout=30)
    assert b"".join(answers).endswith(b"0\r\n\r\n")
    assert b"[DONE]" in answers[1]
    assert gateway.process.wait(timeout=30) == 0


def test_a_part_of_a_second_is_time_to_drain(shared_upstream: FakeUpstream) -> None:
    body = json.dumps({"model": "tiny", "act": {"delay_s": 0.2}}).encode()
    gateway = RunningGateway(Backend("a", shared_upstream.url, "utility"), settings=Settings(drain_s=0.99))
    gateway.wait_ready()
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=30) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: shared_upstream.books.open == 1)
        gateway.process.send_signal(signal.SIGTERM)
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")
    assert gateway.process.wait(timeout=30) == 0


def test_drain_is_bounded(shared_upstream: FakeUpstream) -> None:
    body = json.dumps({"model": "tiny", "act": {"delay_s": 60}}).encode()
    gateway = RunningGateway(Backend("a", shared_upstream.url, "utility"), settings=Settings(drain_s=1.0))
    gateway.wait_ready()
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=30) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: shared_upstream.books.open == 1)
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(timeout=30) == 0
    wait_until(lambda: shared_upstream.books.open == 0)


def test_worker_dies_with_its_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import socket, subprocess, sys, time\n"
        "listener = socket.create_server(('127.0.0.1', 0))\n"
        f"command = {WORKER!r} + [str(listener.fileno())]\n"
        "worker = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()])\n"
        "worker.stdin.write(sys.stdin.buffer.read())\n"
        "worker.stdin.close()\n"
        "print(worker.pid, listener.getsockname()[1], flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdin is not None
    assert parent.stdout is not None
    with parent.stdin as stdin, parent.stdout as stdout:
        stdin.write(Document((Backend("a", "http://127.0.0.1:9", "t"),)).to_json())
        stdin.close()
        pid, port = map(int, stdout.readline().split())
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
            assert read_all(connection).startswith(b"HTTP/1.1 200 ")
        parent.kill()
        parent.wait()
    wait_until(lambda: not is_alive(pid))


def refuses(port: int) -> bool:
    """Whether nobody listens."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except ConnectionRefusedError:
        return True
    return False
