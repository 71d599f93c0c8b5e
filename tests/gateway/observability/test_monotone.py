"""Counters never go down, whichever worker a scrape meets: Prometheus would take it for a restart and add them anew."""

import json
import re
import threading
from http.client import HTTPConnection
from pathlib import Path

from tests.gateway.observability.test_figures import VLLM
from tests.gateway.running import wait_until
from tests.gateway.upstream import FakeUpstream
from tests.gateway.workers import Workers
from tokenmill.engine.gateway.backends import Backend

COUNTED = re.compile(r"^(\w+_(?:total|sum|count|bucket)(?:\{.*\})?) (\S+)$", re.MULTILINE)


def connected_to_each(workers: Workers) -> list[HTTPConnection]:
    """A connection to each of the workers."""
    found: dict[int, HTTPConnection] = {}

    def everyone() -> bool:
        # Some at once: of those that come one by one a worker that is always the quicker may take each.
        opened = [HTTPConnection("127.0.0.1", workers.port, timeout=30) for _ in range(4)]
        for connection in opened:
            connection.connect()
        for connection in opened:
            connection.request("GET", "/ready")
            if found.setdefault(json.loads(connection.getresponse().read())["worker"], connection) is not connection:
                connection.close()
        return len(found) == len(workers.processes)

    wait_until(everyone)
    return list(found.values())


def test_no_counter_falls_whichever_worker_answers(tmp_path: Path) -> None:
    upstream = FakeUpstream().start()
    upstream.metrics = VLLM
    backend = Backend("a", upstream.url, "utility", models=("tiny",))
    with Workers(tmp_path, backend, count=2) as workers:
        key = workers.json("POST", "/admin/keys", {}, status=201)["key"]
        enough = threading.Event()

        def ask() -> None:
            while not enough.is_set():
                assert workers.chat(key, stream=True)[0] == 200

        clients = [threading.Thread(target=ask) for _ in range(4)]
        for client in clients:
            client.start()
        connections = connected_to_each(workers)
        try:
            known: dict[str, float] = {}
            for number in range(24):
                upstream.metrics = VLLM.replace(b"} 200.0", b"} %d.0" % (200 + number))
                connection = connections[number % 2]
                connection.request("GET", "/metrics")
                text = connection.getresponse().read().decode()
                told = {name: float(value) for name, value in COUNTED.findall(text)}
                assert [name for name, value in known.items() if told[name] < value] == []
                known = told
                enough.wait(0.2)
        finally:
            enough.set()
            for client in clients:
                client.join()
            for connection in connections:
                connection.close()
        asked = next(value for name, value in known.items() if name.startswith("tokenmill_requests_total"))
        assert asked > 20
        assert known['tokenmill_engine_prefix_cache_query_tokens_total{backend="a",tier="utility"}'] > 200
    upstream.stop()
