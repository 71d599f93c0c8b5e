"""SIGHUP: a changed file is taken without the loss of a request; one that cannot be taken changes nothing."""

import contextlib
import http.client
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.supervisor.running import FAKE, Running, call, until

ENGINE = "one: {backends: [{model: first, served_as: [first]}]}"
CONFIG = f"""
server: {{port: 0, workers: 2, drain_seconds: 10}}
tiers:
  {ENGINE}
"""
#: The fake engine stands for any server: this one lists what it serves.
FAR = """  two: {backends: [{url: "URL", name: NAME, models: {NAME: first}}]}
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    running = Running([*FAKE, str(config)], tmp_path)
    try:
        running.wait_ready()
        yield running
    finally:
        running.close()


def change(server: Running, text: str, says: str) -> None:
    """Has it read this file, and waits for what it says of it."""
    (server.folder / "config.yaml").write_text(text)
    before = server.text.count(says)
    server.signal(signal.SIGHUP)
    until(lambda: server.text.count(says) > before, 30, says)


def models(server: Running) -> set[str]:
    """The names of the models that a worker lists."""
    return {model["id"] for model in call(server.url + "/v1/models")[2]["data"]}


def ask(connection: http.client.HTTPConnection, tenths: int = 0) -> str:
    """The pid of the engine that answers."""
    body = json.dumps({"model": "first", "prompt": "x", "max_tokens": tenths})
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    answer = connection.getresponse()
    read = answer.read()
    assert answer.status == 200, read
    return str(json.loads(read)["choices"][0]["text"])


def test_a_changed_file_is_taken_and_no_request_is_lost(server: Running) -> None:
    workers = server.pids("gateway.worker")
    enough = threading.Event()
    answers: list[str] = []
    lost: list[BaseException] = []

    def client(pause_s: float, tenths: int) -> None:
        """Asks on one connection until the server closes it, as clients do."""
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        try:
            while not enough.is_set():
                answers.append(ask(connection, tenths))
                enough.wait(pause_s)
        except (OSError, http.client.HTTPException, AssertionError) as error:
            lost.append(error)
        finally:
            connection.close()

    # Without a pause, idle most of the time, and with requests that take longer than the change.
    clients = [threading.Thread(target=client, args=kind) for kind in ((0, 0), (0, 0), (0.3, 0), (1.5, 0), (0, 20))]
    for one in clients:
        one.start()
    try:
        until(lambda: len(answers) > 20, 20, "answers")
        engine = server.url
        for name in ("far", "farther"):
            # Its own backend may as well be the gateway itself.
            far = FAR.replace("NAME", name).replace("URL", engine)
            change(server, CONFIG + far, "configuration: taken")
            # The workers before take new connections for a tenth of a second more.
            until(lambda names={"first", name}: models(server) == names, 10, "the models of the new file")
        until(lambda: not workers & set(server.processes()), 30, "the workers before have ended")
    finally:
        enough.set()
        for one in clients:
            one.join()
    assert lost == []
    assert len(set(answers)) == 1, "the engine was started anew"
    until(lambda: len(server.pids("gateway.worker")) == 2, 30, "two workers")
    server.signal(signal.SIGTERM)
    assert server.wait_end(15) == 0
    assert server.processes() == {}


def test_a_file_that_cannot_be_taken_changes_nothing(server: Running) -> None:
    before = server.processes().keys()
    governed = f"governance: {{store: {server.folder}, master_key: 0123456789abcdef}}\n"
    for text, says in (
        ("tiers: {one: {backends: []}}", "not taken, all goes on as before: "),
        (CONFIG.replace("first", "second"), "what it starts has changed (one); start the server anew"),
        (CONFIG.replace("port: 0", "port: 1"), "'server.host' or 'server.port' has changed"),
        (CONFIG + governed, " ended with status 3: "),
    ):
        change(server, text, says)
    assert f"{server.folder} cannot be opened" in server.text
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port)) as connection:
        assert ask(connection)
    assert server.processes().keys() == before
    change(server, CONFIG, "configuration: taken")


def test_the_end_does_not_wait_for_the_workers_before(server: Running) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    asking = threading.Thread(target=ask, args=(connection, 30))
    asking.start()
    threading.Event().wait(0.5)  # the request is under way
    change(server, CONFIG, "configuration: taken")
    server.signal(signal.SIGTERM)
    asking.join(20)
    assert not asking.is_alive()
    connection.close()
    assert server.wait_end(15) == 0
    assert server.processes() == {}


def test_workers_that_are_to_take_over_end_with_everything(server: Running) -> None:
    workers = server.pids("gateway.worker")
    down = FAR.replace("NAME", "far").replace("URL", "http://127.0.0.1:9")  # is waited for
    (server.folder / "config.yaml").write_text(CONFIG + down)
    server.signal(signal.SIGHUP)
    (fresh, _) = until(lambda: len(new := server.pids("gateway.worker") - workers) == 2 and new, 10, "new workers")
    until(lambda: list(server.folder.glob(f"logs/*/figures/{fresh}-*")), 20, "it serves")
    os.kill(fresh, signal.SIGSTOP)  # it has much to do
    server.signal(signal.SIGTERM)
    until(lambda: "gateway: draining" in server.text, 9, "no more requests are taken")
    assert fresh in server.processes()
    server.signal(signal.SIGTERM)
    assert server.wait_end(8) == 0
    assert server.processes() == {}
