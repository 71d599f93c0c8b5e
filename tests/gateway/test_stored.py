"""Responses that a server keeps: who may read, continue and cancel them, and what those cost that it makes later."""

import json
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import web

from tests.gateway.governance.governed import MASTER_KEY, Governed, Row, governing, options
from tests.gateway.running import RunningGateway, wait_until
from tests.gateway.upstream import FakeUpstream
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.governance import keys
from tokenmill.engine.gateway.governance.accounts import Limits
from tokenmill.engine.gateway.governance.schema import SCHEMA
from tokenmill.engine.gateway.money import Prices
from tokenmill.engine.gateway.settings import Settings
from tokenmill.engine.gateway.store import Store

PATH = "/v1/responses"
_WAYS = (("GET", ""), ("GET", "?stream=true"), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items"))
#: What each of the server's responses used.
USAGE = {"input_tokens": 30, "output_tokens": 20, "total_tokens": 50}


class Responding(FakeUpstream):
    """The Responses API as vLLM serves it: responses in memory, worked on in the background until `finish`."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, dict[str, Any]] = {}
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        #: Streams end in their midst, not the work.
        self.breaks_off = False

    def _add_routes(self, application: web.Application) -> None:
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
            application.router.add_route(method, f"{PATH}/{{id}}{path}", self._stored)

    async def _stored(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(
            (request.method, request.path_qs, {name.lower(): text for name, text in request.headers.items()})
        )
        name = request.match_info["id"]
        response = self.kept.get(name)
        if response is None:
            error = {"message": f"Response with id '{name}' not found.", "type": "invalid_request_error", "code": 404}
            return web.json_response({"error": error}, status=404)
        if request.method == "DELETE":
            return web.json_response({"detail": "Method Not Allowed"}, status=405)
        if request.method == "POST":
            response["status"] = "cancelled"
        if request.query.get("stream") == "true":
            return await self._events(request, response, "response.completed")
        return web.json_response(response)

    async def _answer(self, request: web.Request, raw: bytes) -> web.StreamResponse:
        asked = json.loads(raw)
        earlier, background = asked.get("previous_response_id"), bool(asked.get("background"))
        if earlier is not None and earlier not in self.kept:
            error = {"message": f"Response with id '{earlier}' not found.", "code": 404}
            return web.json_response({"error": error}, status=404)
        name = asked.get("request_id") or f"resp_{secrets.token_hex(16)}"
        response = {
            **{"id": name, "created_at": 1, "model": "tiny", "object": "response", "error": None, "output": []},
            **{"status": "queued" if background else "completed", "background": background},
            **{"parallel_tool_calls": True, "tools": [], "tool_choice": "auto", "previous_response_id": earlier},
            **{"usage": None if background or asked.get("wait") else USAGE},
        }
        self.kept[name] = response
        if not asked.get("stream"):
            return web.json_response(response)
        return await self._events(request, response, "response.created", asked.get("wait", False))

    async def _events(
        self, request: web.Request, response: dict[str, Any], kind: str, wait: bool = False
    ) -> web.StreamResponse:
        """One event and, of what is being worked on, nothing more until the client goes."""
        stream = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await stream.prepare(request)
        event = {"response": response, "sequence_number": 0, "type": kind}
        await stream.write(f"event: {kind}\ndata: {json.dumps(event)}\n\n".encode())
        if self.breaks_off:
            request.transport.close()  # type: ignore[union-attr]
        elif wait or response["status"] == "queued":
            await stream.write(b'event: response.in_progress\ndata: {"type": "response.in_progress"}\n\n')
            never: Any = self._loop.create_future()
            await never
        return stream

    def finish(self, name: str, status: str = "completed") -> None:
        """The work is done."""
        self.kept[name] |= {"status": status, "usage": None if status in ("failed", "cancelled") else USAGE}


@pytest.fixture
def servers() -> Iterator[list[Responding]]:
    made = [Responding() for _ in range(3)]
    for server in made:
        server.start()
    yield made
    for server in made:
        server.stop()


def backends(servers: list[Responding]) -> list[Backend]:
    prices = Prices(100, 50, 200)
    return [Backend(f"b{number}", server.url, "t", ("tiny",), prices=prices) for number, server in enumerate(servers)]


@pytest.fixture
def governed(servers: list[Responding], tmp_path: Path) -> Iterator[Governed]:
    place = str(tmp_path / "books.db")
    settings = Settings(probe_interval_s=0.1, drain_s=1.0)
    with governing(place, *backends(servers), settings=settings) as running:
        yield running


def of_team(governed: Governed, team: str) -> str:
    """A key of a team."""
    return governed.store.write_now(lambda connection: keys.create(connection, "test", parent=team))[1]


def made(governed: Governed, key: str, **fields: Any) -> str:
    """The id of a new response."""
    status, _, body = governed.ask(key, {"model": "tiny", "input": "hi", "max_output_tokens": 100, **fields}, PATH)
    assert status == 200, body
    name: str = json.loads(body)["id"]
    return name


def asking(governed: Governed, key: str, method: str, path: str) -> tuple[int, Any]:
    """(status, the parsed answer)."""
    status, _, body = governed.gateway.send(method, path, headers={"authorization": f"Bearer {key}"})
    return status, json.loads(body)


def holder(servers: list[Responding], name: str) -> Responding:
    return next(server for server in servers if name in server.kept)


def test_the_official_client_reads_and_cancels_where_the_response_is_kept(
    governed: Governed, servers: list[Responding]
) -> None:
    key = governed.key()[1]
    with openai.OpenAI(base_url=governed.gateway.url + "/v1", api_key=key, max_retries=0) as client:
        for _ in range(6):
            response = client.responses.create(model="tiny", input="hi", background=True, max_output_tokens=100)
            assert client.responses.retrieve(response.id).status == "queued"
            assert client.responses.cancel(response.id).status == "cancelled"
            assert client.responses.retrieve(response.id).status == "cancelled"
            event: Any = next(iter(client.responses.retrieve(response.id, stream=True)))
            assert (event.type, event.response.id) == ("response.completed", response.id)
            with pytest.raises(openai.APIStatusError, match="Method Not Allowed"):
                client.responses.delete(response.id)
        with pytest.raises(openai.NotFoundError, match="Response with id 'resp_nobodys' not found"):
            client.responses.retrieve("resp_nobodys")
    assert {len(server.kept) > 0 for server in servers} == {True}
    for server in servers:
        # None of them was asked for what another keeps, nor got the client's key.
        assert all(path.split("/")[3].split("?")[0] in server.kept for _, path, _ in server.asked)
        assert all("authorization" not in headers for _, _, headers in server.asked)


def test_keys_of_a_team_share_what_no_other_key_sees(governed: Governed, servers: list[Responding]) -> None:
    teams = [governed.team(Limits()) for _ in range(2)]
    one, same, other = of_team(governed, teams[0]), of_team(governed, teams[0]), of_team(governed, teams[1])
    alone = [governed.key()[1] for _ in range(2)]
    for owner, friends, strangers in (
        (one, [one, same, MASTER_KEY], [other, alone[0]]),
        (alone[0], [alone[0], MASTER_KEY], [alone[1], one]),
    ):
        name = made(governed, owner)
        following = {"model": "tiny", "input": "and?", "previous_response_id": name}
        for friend in friends:
            assert asking(governed, friend, "GET", f"{PATH}/{name}")[0] == 200
            assert governed.ask(friend, following, PATH)[0] == 200
        before = len(holder(servers, name).asked)
        for stranger in strangers:
            for method, path in (
                ("GET", ""),
                ("GET", "?stream=true"),
                ("DELETE", ""),
                ("POST", "/cancel"),
                ("GET", "/input_items"),
            ):
                status, said = asking(governed, stranger, method, f"{PATH}/{name}{path}")
                assert (status, said["error"]["message"]) == (404, f"Response with id '{name}' not found.")
            for path in (PATH, f"{PATH}/compact", f"{PATH}/input_tokens"):
                status, _, body = governed.ask(stranger, following, path)
                assert (status, json.loads(body)["error"]["message"]) == (404, f"Response with id '{name}' not found.")
        assert len(holder(servers, name).asked) == before
        assert asking(governed, "sk-nobody", "GET", f"{PATH}/{name}")[0] == 401


def test_what_is_not_known_to_be_a_keys_own_is_not_found(governed: Governed, servers: list[Responding]) -> None:
    for server in servers:
        server.kept["resp_before"] = {"id": "resp_before", "status": "completed"}
    key = governed.key()[1]
    following = {"model": "tiny", "input": "and?", "previous_response_id": "resp_before"}
    assert governed.ask(key, following, PATH)[0] == 404
    assert governed.ask(MASTER_KEY, following, PATH)[0] == 200
    assert asking(governed, key, "GET", f"{PATH}/resp_before")[0] == 404


def test_nobody_names_his_response_like_anothers(governed: Governed) -> None:
    key = governed.key()[1]
    body = {"model": "tiny", "input": "hi", "request_id": "resp_mine", "store": False}
    status, _, said = governed.ask(key, body, PATH)
    assert (status, json.loads(said)["error"]["param"]) == (400, "request_id")
    assert governed.ask(key, {**body, "request_id": None}, PATH)[0] == 200


@pytest.mark.parametrize("said", ["conv_theirs", {"id": "conv_theirs"}])
def test_no_key_goes_on_with_a_conversation_of_the_account(
    governed: Governed, servers: list[Responding], said: Any
) -> None:
    key = governed.key()[1]
    status, _, answer = governed.ask(key, {"model": "tiny", "input": "hi", "conversation": said}, PATH)
    assert (status, json.loads(answer)["error"]["param"]) == (400, "conversation")
    assert not any(server.kept for server in servers)
    made(governed, key, conversation=None)
    made(governed, MASTER_KEY, conversation=said)


def test_a_server_learns_nothing_of_who_reads(governed: Governed, servers: list[Responding]) -> None:
    key = governed.key()[1]
    name = made(governed, key)
    said = {
        "x-forwarded-for": "203.0.113.7",
        "x-forwarded-user": "anna",
        "cookie": "a=b",
        "x-request-id": "anna@b.example",
    }
    headers = {"authorization": f"Bearer {key}", "openai-beta": "responses=v1", **said}
    assert governed.gateway.send("GET", f"{PATH}/{name}", headers=headers)[0] == 200
    _, _, seen = holder(servers, name).asked[-1]
    assert seen["openai-beta"] == "responses=v1"
    assert not (said.keys() | {"authorization"}) & seen.keys()


def test_a_gateway_that_is_started_anew_knows_whose_they_are(servers: list[Responding], tmp_path: Path) -> None:
    place = str(tmp_path / "books.db")
    store = Store(place, SCHEMA)

    def running() -> RunningGateway:
        return RunningGateway(*backends(servers), governance=options(place), key=MASTER_KEY)

    with running() as gateway:
        governed = Governed(gateway, store)
        (_, key), (_, other) = governed.key(), governed.key()
        name = made(governed, key)
    with running() as gateway:
        governed = Governed(gateway, store)
        assert asking(governed, key, "GET", f"{PATH}/{name}")[0] == 200
        assert asking(governed, other, "GET", f"{PATH}/{name}")[0] == 404
    store.close()


def test_without_keys_everybody_reads_them(servers: list[Responding]) -> None:
    with RunningGateway(*backends(servers)) as gateway:
        name = json.loads(gateway.post(PATH, {"model": "tiny", "input": "hi", "background": True})[2])["id"]
        for path in (f"{PATH}/{name}", f"/responses/{name}", f"/openai{PATH}/{name}"):
            assert gateway.get(path)[0] == 200
        assert gateway.get(f"{PATH}/resp_nobodys")[0] == 404
        assert gateway.get(f"{PATH}/../models")[0] == 404
        status, headers, _ = gateway.send("PUT", f"{PATH}/{name}")
        assert (status, headers["allow"]) == (405, "GET, DELETE, OPTIONS")
        status, headers, _ = gateway.send("OPTIONS", f"{PATH}/{name}/cancel")
        assert (status, headers["allow"]) == (204, "POST, OPTIONS")
        assert gateway.send("POST", f"{PATH}/{name}/cancel", b"{}")[0] == 200
        holder(servers, name).pause()
        status, headers, _ = gateway.get(f"{PATH}/{name}")
        assert status == 503 and "retry-after" in headers


def test_a_lone_server_is_asked_for_what_the_gateway_does_not_know(servers: list[Responding]) -> None:
    servers[0].kept["resp_before"] = {"id": "resp_before", "status": "completed"}
    with RunningGateway(*backends(servers[:1])) as gateway:
        assert gateway.get(f"{PATH}/resp_before")[0] == 200


def ended(governed: Governed, key: str) -> list[Row]:
    wait_until(lambda: governed.ledger(key))
    return governed.ledger(key)


def test_a_background_response_is_settled_when_it_is_there(governed: Governed, servers: list[Responding]) -> None:
    identity, key = governed.key()
    name = made(governed, key, background=True)
    assert asking(governed, key, "GET", f"{PATH}/{name}")[0] == 200
    assert governed.ledger(identity) == []
    assert governed.account(identity).reserved > 0
    holder(servers, name).finish(name)
    (row,) = ended(governed, identity)
    assert (row.prompt, row.completion, row.exact, row.outcome) == (30, 20, True, "ok")
    assert governed.account(identity).reserved == 0


def test_its_request_took_as_long_as_its_client_waited(governed: Governed, servers: list[Responding]) -> None:
    identity, key = governed.key()
    begun = time.monotonic()
    name = made(governed, key, background=True)
    kept = holder(servers, name)
    wait_until(lambda: kept.asked)
    waited = time.monotonic() - begun
    kept.finish(name)
    ended(governed, identity)
    headers = {"authorization": f"Bearer {MASTER_KEY}"}

    def seconds() -> list[float]:
        lines = governed.gateway.send("GET", "/admin/metrics", headers=headers)[2].decode().splitlines()
        return [float(line.split()[-1]) for line in lines if line.startswith("tokenmill_request_duration_seconds_sum")]

    wait_until(seconds)
    assert sum(seconds()) <= waited


def test_its_prompt_is_not_kept_for_as_long(governed: Governed) -> None:
    key, prompt = governed.key()[1], "x" * 4_000_000
    made(governed, key, background=True, input=prompt)
    before = _memory_kb(governed.gateway.process.pid)
    for _ in range(20):
        made(governed, key, background=True, input=prompt)
    assert _memory_kb(governed.gateway.process.pid) - before < 10 * len(prompt) // 1024


def _memory_kb(pid: int) -> int:
    """The memory that a process has."""
    return int(Path(f"/proc/{pid}/status").read_text(encoding="utf-8").partition("VmRSS:")[2].split()[0])


@pytest.mark.parametrize("read", [False, True])
def test_so_is_one_whose_client_leaves_its_stream(governed: Governed, servers: list[Responding], read: bool) -> None:
    identity, key = governed.key()
    with openai.OpenAI(base_url=governed.gateway.url + "/v1", api_key=key, max_retries=0) as client:
        stream = client.responses.create(model="tiny", input="hi", background=True, stream=True, max_output_tokens=100)
        event: Any = next(iter(stream))
        name: str = event.response.id
        stream.close()
    wait_until(lambda: holder(servers, name).books.open == 0)
    assert governed.ledger(identity) == []
    if read:
        assert asking(governed, key, "GET", f"{PATH}/{name}")[0] == 200
    holder(servers, name).finish(name)
    (row,) = ended(governed, identity)
    assert (row.prompt, row.completion, row.exact, row.outcome) == (30, 20, True, "gone")


def test_a_stream_that_breaks_off_ends_there_for_its_client(governed: Governed, servers: list[Responding]) -> None:
    identity, key = governed.key()
    for server in servers:
        server.breaks_off = True
    body = json.dumps({"model": "tiny", "input": "hi", "background": True, "stream": True, "max_output_tokens": 100})
    head = f"POST {PATH} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\ncontent-length: {len(body)}\r\n\r\n"
    answer = governed.gateway.raw((head + body).encode())
    assert b"response.created" in answer and b"upstream_cut" in answer and not answer.endswith(b"0\r\n\r\n")
    assert governed.ledger(identity) == []
    (name,) = [name for server in servers for name in server.kept]
    holder(servers, name).finish(name)
    (row,) = ended(governed, identity)
    assert (row.completion, row.exact, row.outcome) == (20, True, "cut")


@pytest.mark.parametrize("stream", [False, True])
def test_its_backend_has_no_room_for_another_until_then(
    servers: list[Responding], tmp_path: Path, stream: bool
) -> None:
    backend = Backend("b", servers[0].url, "t", ("tiny",), max_concurrency=1)
    place = str(tmp_path / "books.db")
    store = Store(place, SCHEMA)
    with RunningGateway(backend, governance=options(place), key=MASTER_KEY) as gateway:
        governed = Governed(gateway, store)
        with openai.OpenAI(base_url=gateway.url + "/v1", api_key=MASTER_KEY, max_retries=0) as client:
            answer: Any = client.responses.create(model="tiny", input="hi", background=True, stream=stream)
            if stream:
                next(iter(answer))
                answer.close()
                wait_until(lambda: servers[0].books.open == 0)
        body = {"model": "tiny", "input": "hi"}
        assert governed.ask(MASTER_KEY, body, PATH)[0] in (429, 503)
        (name,) = servers[0].kept
        servers[0].finish(name)
        wait_until(lambda: governed.ask(MASTER_KEY, body, PATH)[0] == 200)
    store.close()


@pytest.mark.parametrize(("status", "completion"), [("failed", 0), ("cancelled", 100)])
def test_one_without_a_count_is_charged_like_any_other(
    governed: Governed, servers: list[Responding], status: str, completion: int
) -> None:
    identity, key = governed.key()
    name = made(governed, key, background=True)
    holder(servers, name).finish(name, status)
    (row,) = ended(governed, identity)
    assert (row.completion, row.outcome) == (completion, "ok")


def test_a_worker_that_is_replaced_sees_it_through(servers: list[Responding], tmp_path: Path) -> None:
    place = str(tmp_path / "books.db")
    store = Store(place, SCHEMA)
    settings = Settings(probe_interval_s=0.1, drain_s=0.1)
    with RunningGateway(*backends(servers), settings=settings, governance=options(place), key=MASTER_KEY) as gateway:
        governed = Governed(gateway, store)
        identity, key = governed.key()
        name = made(governed, key, background=True)
        gateway.process.send_signal(signal.SIGHUP)
        looked = len(holder(servers, name).asked)
        wait_until(lambda: len(holder(servers, name).asked) > looked + 1)
        assert gateway.process.poll() is None
        holder(servers, name).finish(name)
        assert gateway.process.wait(timeout=30) == 0
    (row,) = governed.ledger(identity)
    assert (row.completion, row.exact) == (20, True)
    store.close()


def test_a_stream_that_a_stop_cuts_is_charged_what_was_seen_of_it(servers: list[Responding], tmp_path: Path) -> None:
    place = str(tmp_path / "books.db")
    store = Store(place, SCHEMA)
    settings = Settings(probe_interval_s=0.1, drain_s=0.1)
    with RunningGateway(*backends(servers), settings=settings, governance=options(place), key=MASTER_KEY) as gateway:
        governed = Governed(gateway, store)
        with openai.OpenAI(base_url=gateway.url + "/v1", api_key=MASTER_KEY, max_retries=0) as client:
            for background in (False, True):
                fields: Any = {"background": background, "extra_body": {"wait": True}}
                stream = client.responses.create(model="tiny", input="hi", stream=True, max_output_tokens=100, **fields)
                events: Any = iter(stream)
                assert [next(events).type for _ in range(2)] == ["response.created", "response.in_progress"]
            gateway.process.send_signal(signal.SIGTERM)
            gateway.process.wait(timeout=20)
    assert sorted(row.completion for row in governed.ledger("master")) == [2, 100]
    store.close()


def test_one_that_the_gateway_does_not_live_to_see_is_charged_its_bound(
    servers: list[Responding], tmp_path: Path
) -> None:
    place = str(tmp_path / "books.db")
    store = Store(place, SCHEMA)
    settings = Settings(probe_interval_s=0.1, drain_s=1.0)
    with RunningGateway(*backends(servers), settings=settings, governance=options(place), key=MASTER_KEY) as gateway:
        governed = Governed(gateway, store)
        identity, key = governed.key()
        made(governed, key, background=True)
    (row,) = governed.ledger(identity)
    assert (row.completion, row.exact, governed.account(identity).reserved) == (100, False, 0)
    store.close()


def test_background_is_a_truth_value_or_an_error(governed: Governed, servers: list[Responding]) -> None:
    asked = {"model": "tiny", "input": "", "background": "yes", "stream": True}
    status, _, body = governed.ask(governed.key()[1], asked, PATH)
    assert (status, json.loads(body)["error"]["param"]) == (400, "background")
    assert not any(server.kept for server in servers)
