"""What `tokenmill serve` promises about processes, with a fake engine that starts at once."""

import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.supervisor.running import FAKE, Running, call, until

CONFIG = """
server: {port: PORT, workers: 2, drain_seconds: 10}
tiers:
  one: {backends: [{model: first, served_as: [first]}]}
  two: {backends: [{model: second, served_as: [second]}]}
"""


def start(folder: Path, text: str = CONFIG, port: int = 0) -> Running:
    config = folder / "config.yaml"
    config.write_text(text.replace("PORT", str(port)))
    return Running([*FAKE, str(config)], folder)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    running = start(tmp_path)
    try:
        running.wait_ready()
        yield running
    finally:
        running.close()


def complete(server: Running, model: str, tenths: int = 0) -> tuple[int, dict[str, str], Any]:
    return call(server.url + "/v1/completions", {"model": model, "prompt": "x", "max_tokens": tenths})


def served_by(server: Running, model: str) -> int:
    """The pid of the engine that answers, once the gateway worker that is asked knows that it is back."""

    def answer() -> Any:
        status, _, body = complete(server, model)
        return body if status == 200 else None

    return int(until(answer, 15, f"{model} serves")["choices"][0]["text"])


def test_progress_and_panel_are_plain_without_a_terminal(server: Running) -> None:
    assert "\x1b" not in server.text
    for words in (
        "one: starting engine",
        "one: loading weights",
        "one: warming",
        "one: ready",
        "gateway: starting workers",
        "gateway: ready",
    ):
        assert words in server.text
    panel = server.text.partition("is ready after")[2]
    assert f"URL  {server.url}/v1" in panel
    assert "Models  first  tier one" in panel
    assert "verification  a stand-in" in panel
    command = re.search(r"try: (curl .*)", panel)
    assert command
    assert '"model": "first"' in command[1] and "Authorization" not in command[1]
    assert "/dashboard" not in panel and "cannot be served" not in panel
    # Each worker judges for itself, and the kernel chooses which of the two answers.
    assert [call(server.url + "/ready")[0] for _ in range(20)] == [200] * 20


def test_who_starts_it_is_told_what_cannot_be_served_and_that_keys_are_asked_for(tmp_path: Path) -> None:
    more = f"""
  away: {{backends: [{{url: "http://127.0.0.1:9", models: {{far: far}}}}]}}
governance: {{store: {tmp_path / "gateway.db"}, master_key: 0123456789abcdef}}
"""
    running = start(tmp_path, CONFIG.rstrip() + more)
    try:
        running.wait_ready()
        until(lambda: "away: cannot be served yet: away: " in running.text, 10, "the line")
        assert f"{running.url}/docs  /ready  /admin/metrics  /dashboard" in running.text
        assert '-H "Authorization: Bearer $KEY"' in running.text
        assert "one: cannot" not in running.text
    finally:
        running.close()


def test_a_killed_engine_is_replaced_and_nothing_else(server: Running) -> None:
    other, workers = served_by(server, "second"), server.pids("gateway.worker")
    victim = served_by(server, "first")
    (grandchild,) = [pid for pid in server.pids("time.sleep") if os.getpgid(pid) == os.getpgid(victim)]
    os.kill(victim, signal.SIGKILL)

    def refused() -> bool:
        status, headers, body = complete(server, "first")
        if status == 200:  # not noticed yet
            return False
        assert status == 503, body
        assert int(headers["retry-after"]) >= 1
        assert body["error"]["message"]
        return True

    until(refused, 5, "503 while the engine is away")
    assert served_by(server, "second") == other
    assert served_by(server, "first") != victim
    assert grandchild not in server.processes()
    assert served_by(server, "second") == other
    assert server.pids("gateway.worker") == workers
    assert "one: killed by SIGKILL; starts again in 1 s" in server.text


def test_a_killed_gateway_worker_is_replaced(server: Running) -> None:
    engines = {served_by(server, "first"), served_by(server, "second")}
    victim = min(server.pids("gateway.worker"))
    os.kill(victim, signal.SIGKILL)
    until(lambda: len(server.pids("gateway.worker") - {victim}) == 2, 15, "two workers again")
    assert {served_by(server, "first"), served_by(server, "second")} == engines


def test_an_engine_that_reports_an_error_is_replaced(server: Running) -> None:
    before = served_by(server, "first")
    sign = server.engine_log("one").with_suffix(".hooks.sick")
    sign.touch()
    until(lambda: "one: its health page answers 503" in server.text, 20, "noticed")
    sign.unlink()
    assert served_by(server, "first") != before


def test_sigterm_drains(server: Running) -> None:
    answers: list[int] = []
    asking = threading.Thread(target=lambda: answers.append(complete(server, "first", tenths=15)[0]))
    asking.start()
    threading.Event().wait(0.5)  # the request is under way
    server.signal(signal.SIGTERM)
    assert server.wait_end(15) == 0
    asking.join(10)
    assert answers == [200]
    assert server.processes() == {}
    assert "draining" in server.text


def test_a_second_signal_does_not_wait(server: Running) -> None:
    def ask() -> None:
        with pytest.raises(OSError):
            complete(server, "first", tenths=80)

    asking = threading.Thread(target=ask)
    asking.start()
    threading.Event().wait(0.5)
    server.signal(signal.SIGINT)
    until(lambda: "draining" in server.text, 20, "draining")
    server.signal(signal.SIGINT)
    assert server.wait_end(5) == 0
    asking.join(10)
    assert server.processes() == {}


def test_nothing_survives_a_killed_parent_and_the_port_is_free_again(server: Running, tmp_path: Path) -> None:
    port = server.port
    server.signal(signal.SIGKILL)
    until(lambda: not server.processes(), 10, f"no process left: {server.processes()}")
    again = start(tmp_path, port=port)
    try:
        again.wait_ready()
        assert complete(again, "first")[0] == 200
    finally:
        again.close()


def test_an_engine_that_cannot_start_ends_the_start_in_one_line(tmp_path: Path) -> None:
    running = start(tmp_path, CONFIG.replace("model: first", "model: fails"))
    try:
        assert running.wait_end(20) == 1
        assert "one could not start: ended with status 1: ValueError: the model 'fails' has no weights" in running.text
        assert "Traceback" not in running.text
        assert running.processes() == {}
    finally:
        running.close()


def test_servers_on_one_port_of_two_addresses_keep_their_figures_apart(tmp_path: Path) -> None:
    first = start(tmp_path)
    others = []
    try:
        first.wait_ready()
        for address in ("127.0.0.2", "127.0.0.3"):
            text = CONFIG.replace("{port", f"{{host: {address}, port")
            others.append(start(tmp_path, text, first.port))
            others[-1].wait_ready()
        logs = [re.search(r"logs: written to: (\S+)", running.text) for running in (first, *others)]
        folders = [Path(found[1]) for found in logs if found is not None]
        assert [folder.name for folder in folders] == [str(first.port) + more for more in ("", "-2", "-3")]
        assert all(len(list(folder.glob("figures/*.lock"))) == 2 for folder in folders)
    finally:
        for running in (first, *others):
            running.close()


def test_a_headless_node_has_no_gateway(tmp_path: Path) -> None:
    running = Running([*FAKE, "first", "--headless", "--node-rank", "1"], tmp_path)
    try:
        until(lambda: "headless node runs" in running.text, 20, "started")
        (command,) = [text for text in running.processes().values() if "fake_engine" in text]
        assert command.split()[2:] == ["first", "--served-model-name", "first", "--headless", "--node-rank", "1"]
        assert running.pids("gateway.worker") == set()
        running.signal(signal.SIGTERM)
        assert running.wait_end(15) == 0
        assert running.processes() == {}
    finally:
        running.close()


def test_nohup_is_respected(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.replace("PORT", "0"))
    running = Running(["nohup", *FAKE, str(config)], tmp_path)
    try:
        running.wait_ready()
        running.signal(signal.SIGHUP)
        assert served_by(running, "first")
        running.signal(signal.SIGTERM)
        assert running.wait_end(15) == 0
    finally:
        running.close()


def test_a_taken_port_is_one_line_that_names_its_owner(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        running = start(tmp_path, port=port)
        try:
            assert running.wait_end(20) == 2
        finally:
            running.close()
    (line,) = running.lines
    assert f"port {port} on 127.0.0.1 is taken by" in line
    assert f"(pid {os.getpid()})" in line
    assert re.search(r"pass --port \d+$", line)
