"""Who hangs up is felt on the other side at once: clients free slots, backends are never mistaken for done."""

import http.client
import json
import socket
import time

import pytest

from tests.gateway.running import RunningGateway, read_all, wait_until
from tests.gateway.upstream import FakeUpstream
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.settings import Settings

CHAT = "/v1/chat/completions"


def request_bytes(body: dict[str, object]) -> bytes:
    """A whole HTTP request."""
    raw = json.dumps(body).encode()
    return b"POST %s HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % (CHAT.encode(), len(raw)) + raw


def unframed(wire: bytes) -> bytes:
    """The content of a whole chunked body (RFC 9112, 7.1). A frame may end anywhere, also within a word."""
    parts: list[bytes] = []
    position = 0
    while True:
        end = wire.index(b"\r\n", position)
        size = int(wire[position:end], 16)
        position = end + 2
        assert wire[position + size : position + size + 2] == b"\r\n", "a frame is not as long as it says"
        if size == 0:
            assert position + 2 == len(wire), "something follows the last frame"
            return b"".join(parts)
        parts.append(wire[position : position + size])
        position += size + 2


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_hangs_up_frees_the_slot(gateway: RunningGateway, upstream: FakeUpstream, stream: bool) -> None:
    act = {"chunks": 1000, "interval_s": 0.05} if stream else {"delay_s": 30}
    connection = socket.create_connection(("127.0.0.1", gateway.port))
    connection.sendall(request_bytes({"model": "tiny", "stream": stream, "act": act}))
    if stream:
        assert connection.recv(100)
    wait_until(lambda: upstream.books.open == 1)
    connection.close()
    wait_until(lambda: upstream.books.open == 0, timeout_s=10)
    assert upstream.books.cancelled == 1
    wait_until(lambda: b'tokenmill_outstanding_requests{backend="a",tier="utility"} 0.0' in gateway.get("/metrics")[2])
    assert b'outcome="gone"' in gateway.get("/metrics")[2]


def test_client_that_hangs_up_before_a_streams_first_byte_frees_the_slot(
    gateway: RunningGateway, upstream: FakeUpstream
) -> None:
    connection = socket.create_connection(("127.0.0.1", gateway.port))
    connection.sendall(request_bytes({"model": "tiny", "stream": True, "act": {"head_s": 1.5}}))
    wait_until(lambda: upstream.books.open == 1)
    connection.close()
    wait_until(lambda: upstream.books.cancelled == 1, timeout_s=10)
    assert upstream.books.open == 0
    wait_until(lambda: b'tokenmill_outstanding_requests{backend="a",tier="utility"} 0.0' in gateway.get("/metrics")[2])


def test_client_that_hangs_up_while_its_socket_is_full_frees_the_slot(
    gateway: RunningGateway, upstream: FakeUpstream
) -> None:
    connection = socket.create_connection(("127.0.0.1", gateway.port))
    connection.sendall(request_bytes({"model": "tiny", "stream": True, "act": {"chunks": 200_000}}))
    assert connection.recv(100)
    time.sleep(0.5)  # nobody reads: the gateway's and then the backend's socket fill up
    assert upstream.books.open == 1
    connection.close()
    wait_until(lambda: upstream.books.open == 0, timeout_s=10)


def test_client_that_takes_nothing_is_cut_off(upstream: FakeUpstream) -> None:
    settings = Settings(probe_interval_s=0.1, stall_timeout_s=0.2)
    with (
        RunningGateway(Backend("a", upstream.url, "utility"), settings=settings) as impatient,
        socket.create_connection(("127.0.0.1", impatient.port)) as connection,
    ):
        connection.sendall(request_bytes({"model": "tiny", "stream": True, "act": {"chunks": 400_000}}))
        assert connection.recv(100)
        wait_until(lambda: upstream.books.open == 0)
        assert upstream.books.cancelled == 1
        assert not upstream.books.sent


def test_client_that_takes_a_little_at_a_time_is_not_cut_off(upstream: FakeUpstream) -> None:
    settings = Settings(probe_interval_s=0.1, stall_timeout_s=0.3)
    with RunningGateway(Backend("a", upstream.url, "utility"), settings=settings) as impatient:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            connection.connect(("127.0.0.1", impatient.port))
            body = {"model": "tiny", "stream": True, "act": {"chunks": 60_000}}
            connection.sendall(request_bytes(body).replace(b"host: a", b"host: a\r\nconnection: close"))
            answer = b""
            while part := connection.recv(400_000):
                answer += part
                time.sleep(0.04)
        assert unframed(answer.partition(b"\r\n\r\n")[2]) == upstream.books.sent[0]


def test_many_clients_that_hang_up(gateway: RunningGateway, upstream: FakeUpstream) -> None:
    connections = [socket.create_connection(("127.0.0.1", gateway.port)) for _ in range(50)]
    for connection in connections:
        connection.sendall(request_bytes({"model": "tiny", "act": {"delay_s": 30}}))
    wait_until(lambda: upstream.books.open == 50)
    for connection in connections:
        connection.close()
    wait_until(lambda: upstream.books.open == 0, timeout_s=10)
    assert upstream.books.cancelled == 50


@pytest.mark.parametrize("cut_after", [0, 3])
def test_stream_cut_by_the_backend_is_seen(gateway: RunningGateway, upstream: FakeUpstream, cut_after: int) -> None:
    del upstream
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=10)
    connection.request("POST", CHAT, json.dumps({"model": "tiny", "stream": True, "act": {"cut_after": cut_after}}))
    answer = connection.getresponse()
    if cut_after == 0:
        assert answer.status == 503
        assert answer.headers["retry-after"]
        assert json.loads(answer.read())["error"]["code"] == "service_unavailable"
    else:
        assert answer.status == 200
        with pytest.raises(http.client.IncompleteRead) as raised:
            answer.read()
        events = raised.value.partial.split(b"\n\n")
        assert len(events) == cut_after + 2
        assert json.loads(events[cut_after].removeprefix(b"data: "))["error"]["code"] == "upstream_cut"
        assert b"[DONE]" not in raised.value.partial
    connection.close()


@pytest.mark.parametrize("stream", [False, True])
def test_silent_backend_is_a_timeout(gateway: RunningGateway, upstream: FakeUpstream, stream: bool) -> None:
    act = {"interval_s": 30} if stream else {"delay_s": 30}
    raw = request_bytes({"model": "tiny", "stream": stream, "act": act}).replace(b"host: a", b"connection: close")
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as connection:
        connection.sendall(raw)
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 200 " if stream else b"HTTP/1.1 504 ")
    assert b'"code":"timeout"' in answer
    assert not answer.endswith(b"0\r\n\r\n") or not stream
    wait_until(lambda: upstream.books.open == 0, timeout_s=10)


def test_slow_reader_gets_everything(gateway: RunningGateway, upstream: FakeUpstream) -> None:
    body = {"model": "tiny", "stream": True, "act": {"chunks": 50_000}}
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=30) as connection:
        connection.sendall(request_bytes(body).replace(b"host: a", b"host: a\r\nconnection: close"))
        time.sleep(0.5)
        answer = read_all(connection)
    head, _, wire = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head.lower()
    content = unframed(wire)
    assert content.count(b"chat.completion.chunk") == 50_000
    assert content == upstream.books.sent[0]
