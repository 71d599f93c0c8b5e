"""Clients that mean harm, against real workers: forged keys, odd paths and headers, slow and oversized requests.

Tenants cannot name a server: backends come from the configuration file alone. No endpoint takes a URL (unknown fields
of the admin API are refused), and what a request to a model says about addresses goes on as text in its body.
"""

import json
import socket
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.gateway.running import read_all
from tests.gateway.workers import MASTER_KEY, Workers

QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)
PATHS = ("/v1/chat/completions", "/admin/keys", "/admin/accounts", "/key/generate", "/key/update", "/dashboard/login")


def raw(workers: Workers, *parts: bytes, pause_s: float = 0.0) -> bytes:
    with socket.create_connection(("127.0.0.1", workers.port), timeout=30) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause_s)
        return read_all(connection)


def status_of(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer[:200]
    return int(answer[9:12])


def alive(workers: Workers) -> bool:
    return workers.send("GET", "/health")[0] == 200 and all(one.poll() is None for one in workers.processes)


@pytest.mark.parametrize("path", PATHS)
def test_any_body_is_answered_and_never_with_a_server_error(workers: Workers, path: str) -> None:
    json_values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
        max_leaves=8,
    )
    bodies = st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode())

    @QUICK
    @given(bodies)
    def fuzz(body: bytes) -> None:
        status, _, answer = workers.send("POST", path, body)
        assert status < 500, answer
        assert b"Traceback" not in answer and MASTER_KEY.encode() not in answer

    fuzz()
    assert alive(workers)


WORDS = (
    "model",
    "messages",
    "kind",
    "name",
    "key",
    "keys",
    "models",
    "limits",
    "max_budget",
    "duration",
    "metadata",
    "stream",
)


@pytest.mark.parametrize(
    "key",
    ["", " ", "sk-", "sk-" + "0" * 43, MASTER_KEY[:-1], MASTER_KEY + "0", MASTER_KEY.upper(), "master", "key-none",
     "x" * 5000, "sk-' OR '1'='1", "sk-%00", "0" * 64],
)  # fmt: skip
def test_forged_keys_open_nothing(workers: Workers, key: str) -> None:
    for method, path in (
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/admin/keys"),
        ("GET", "/key/info"),
    ):
        status, _, answer = workers.send(method, path, {"model": "tiny"} if method == "POST" else None, key)
        assert status == 401, (path, answer)


def test_a_hash_from_the_database_is_no_key(workers: Workers) -> None:
    made = workers.json("POST", "/key/generate", {})
    assert workers.chat(made["key"])[0] == 200
    for stolen in (made["token"], made["token_id"]):
        assert workers.chat(stolen)[0] == 401
        assert workers.send("GET", "/key/info", key=stolen)[0] == 401


@pytest.mark.parametrize(
    "path",
    ["/admin/../admin/keys", "//admin/keys", "/admin//keys", "/admin/keys/", "/admin/keys%00", "/ADMIN/keys", "/adminx",
     "/dashboard/../admin/keys", "/dashboard/templates/base.html.jinja", "/dashboard/style.css/../site.py",
     "/dashboard/%2e%2e/site.py", "/key/generate/", "/v1/../admin/keys"],
)  # fmt: skip
def test_odd_paths_reach_nothing(workers: Workers, path: str) -> None:
    request = f"GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n".encode()
    answer = raw(workers, request)
    assert status_of(answer) in (400, 401, 404, 405), answer
    assert b"import " not in answer and b"{% extends" not in answer


@pytest.mark.parametrize(
    "head",
    [b"authorization: Bearer a\r\nauthorization: Bearer b\r\n", b"authorization: Basic QTpC\r\n", b"authorization:\r\n",
     b"authorization: Bearer \xff\xfe\r\n", b"x-api-key: \xe2\x82\xac\r\n", b"cookie: tokenmill_session=\xff:1:0\r\n",
     b"x-forwarded-for: 127.0.0.1\r\nx-real-ip: 127.0.0.1\r\nx-original-url: /admin/keys\r\n",
     b"content-type: application/json; charset=utf-7\r\n", b"traceparent: 00-0-0-0\r\n"],
)  # fmt: skip
def test_odd_headers_open_nothing(workers: Workers, head: bytes) -> None:
    for path in (b"/admin/keys", b"/dashboard", b"/v1/models"):
        answer = raw(workers, b"GET " + path + b" HTTP/1.1\r\nhost: a\r\nconnection: close\r\n" + head + b"\r\n")
        assert status_of(answer) in (400, 401, 303), answer


def test_a_header_cannot_be_smuggled_through_a_value(workers: Workers) -> None:
    made = workers.json(
        "POST", "/admin/keys", {"name": "x\r\nset-cookie: a=b", "metadata": {"a\r\nb": "c"}}, status=201
    )
    status, headers, _ = workers.send("GET", f"/admin/keys/{made['id']}")
    assert status == 200 and "set-cookie" not in headers
    status, headers, _ = workers.send("GET", "/admin/keys/none%0d%0aset-cookie:%20a=b")
    assert status == 404 and "set-cookie" not in headers


def test_statements_cannot_be_smuggled_through_a_value(workers: Workers) -> None:
    hostile = "x'; DROP TABLE keys; --"
    assert workers.send("GET", "/admin/ledger?by=team&team=" + "x%27%3B%20DROP%20TABLE%20keys%3B--")[0] == 200
    assert workers.send("POST", "/admin/accounts", {"kind": "team", "parent": hostile})[0] == 400
    workers.json("POST", "/admin/keys", {"name": hostile}, status=201)
    assert workers.json("GET", "/admin/keys")["keys"]


def test_oversized_requests_are_refused(workers: Workers) -> None:
    head = b"POST /admin/keys HTTP/1.1\r\nhost: a\r\nauthorization: Bearer " + MASTER_KEY.encode() + b"\r\n"
    assert status_of(raw(workers, head + b"content-length: 999999999999\r\n\r\n")) == 413
    assert status_of(raw(workers, b"GET /admin/keys HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 70_000 + b"\r\n\r\n")) == 431
    long = "a" * 4000
    assert workers.send("GET", f"/admin/keys/{long}")[0] == 404
    assert alive(workers)


def test_slow_clients_do_not_hold_up_the_others(workers: Workers) -> None:
    head = b"POST /admin/keys HTTP/1.1\r\nhost: a\r\nauthorization: Bearer " + MASTER_KEY.encode() + b"\r\n"
    slow: list[Any] = []
    for _ in range(40):
        connection = socket.create_connection(("127.0.0.1", workers.port), timeout=30)
        connection.sendall(head + b"content-length: 100\r\n\r\n{")
        slow.append(connection)
    assert alive(workers)
    workers.json("GET", "/admin/keys")
    for connection in slow:
        connection.close()
    assert alive(workers)
