"""Conversations of the Responses API, of which each turn is kept by one server of a tier."""

import asyncio
import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import web

from tests.gateway.running import RunningGateway, wait_until
from tests.gateway.upstream import FakeUpstream
from tests.gateway.workers import MASTER_KEY, Workers
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.kept import SLOT_BYTES, SLOTS, Kept
from tokenmill.engine.gateway.pipeline import Exchange
from tokenmill.engine.gateway.portfolio import Target
from tokenmill.engine.gateway.settings import Settings

PATH = "/v1/responses"


class Keeping(FakeUpstream):
    """Keeps its responses in its memory, as vLLM does, and knows no others."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, str | None] = {}
        self.asked = 0

    async def _answer(self, request: web.Request, raw: bytes) -> web.StreamResponse:
        self.asked += 1
        asked = json.loads(raw)
        earlier = asked.get("previous_response_id")
        if earlier is not None and earlier not in self.kept:
            error = {
                "message": f"Response with id '{earlier}' not found.",
                "type": "invalid_request_error",
                "code": 404,
            }
            return web.json_response({"error": error}, status=404)
        name = f"resp_{secrets.token_hex(16)}"
        self.kept[name] = earlier
        answer: dict[str, Any] = {
            **{
                "id": name,
                "created_at": 1,
                "model": "tiny",
                "object": "response",
                "status": "completed",
                "error": None,
            },
            **{"output": [], "previous_response_id": earlier, "parallel_tool_calls": True, "tools": []},
            **{"tool_choice": "auto", "usage": {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5}},
        }
        if not asked.get("stream"):
            return web.json_response(answer)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for number, kind in enumerate(("response.created", "response.completed")):
            # In vLLM's order of members, and in OpenAI's.
            event = {"response": answer, "sequence_number": number, "type": kind}
            ordered = event if asked.get("instructions") else dict(reversed(event.items()))
            await response.write(f"event: {kind}\n".encode())
            if asked.get("instructions") and not number:
                await asyncio.sleep(0.02)  # as where each line is a write of its own
            await response.write(f"data: {json.dumps(ordered, separators=(',', ':'))}\n\n".encode())
        await response.write_eof()
        return response


@pytest.fixture
def servers() -> Iterator[list[Keeping]]:
    made = [Keeping() for _ in range(3)]
    for server in made:
        server.start()
    yield made
    for server in made:
        server.stop()


def backends(servers: list[Keeping]) -> list[Backend]:
    return [Backend(f"b{number}", server.url, "t", ("tiny",)) for number, server in enumerate(servers)]


def converse(url: str, key: str, turns: int, *, stream: bool = False, instructions: str | None = None) -> None:
    """Goes on from each response in the next request, each on a connection of its own."""
    earlier: str | None = None
    more: Any = {"instructions": instructions} if instructions else {}
    for _ in range(turns):
        with openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0) as client:
            answer: Any = client.responses.create(
                model="tiny", input="hi", previous_response_id=earlier, stream=stream, **more
            )
            earlier = [event.response.id for event in answer][-1] if stream else answer.id


@pytest.mark.parametrize("stream", [False, True])
def test_each_turn_goes_to_the_server_that_keeps_the_last_one(servers: list[Keeping], stream: bool) -> None:
    # Nothing is sent again here: who does not know an earlier response has the last word.
    settings = Settings(probe_interval_s=0.1, most_retries=0)
    with RunningGateway(*backends(servers), settings=settings) as gateway:
        conversations = 0
        # Where a first turn goes is chance among servers with nothing to do: until each has had one.
        while conversations < 12 or (conversations < 200 and not all(server.kept for server in servers)):
            converse(gateway.url, "none", 5, stream=stream, instructions=(None, "brief")[conversations % 2])
            conversations += 1
    assert all(server.kept for server in servers)
    asked = sum(server.asked for server in servers)
    assert sum(len(server.kept) for server in servers) == asked == 5 * conversations


def test_workers_tell_each_other(servers: list[Keeping], tmp_path: Path) -> None:
    settings = Settings(probe_interval_s=0.1, most_retries=0)
    with Workers(tmp_path, *backends(servers), count=3, settings=settings) as workers:
        for _ in range(10):
            converse(workers.url, MASTER_KEY, 6)
    assert sum(len(server.kept) for server in servers) == 60


def test_a_gateway_that_does_not_know_asks_around(servers: list[Keeping]) -> None:
    servers[2].kept["resp_of_before"] = None
    with RunningGateway(*backends(servers)) as gateway:
        for _ in range(5):
            assert gateway.post(PATH, {"model": "t", "input": "", "previous_response_id": "resp_of_before"})[0] == 200
        status, _, body = gateway.post(PATH, {"model": "t", "input": "", "previous_response_id": "resp_of_nobody"})
    assert (status, json.loads(body)["error"]["message"]) == (404, "Response with id 'resp_of_nobody' not found.")
    assert all(server.asked > len(server.kept) - (server is servers[2]) for server in servers)


def test_while_its_server_is_down_nobody_else_says_that_there_is_no_such_response(servers: list[Keeping]) -> None:
    with RunningGateway(*backends(servers)) as gateway:
        body = {"model": "t", "input": ""}
        kept = json.loads(gateway.post(PATH, body)[2])["id"]
        holder = next(server for server in servers if kept in server.kept)
        holder.pause()
        following = {**body, "previous_response_id": kept}
        assert gateway.post(PATH, following)[0] == 503
        holder.start()
        wait_until(lambda: gateway.post(PATH, following)[0] == 200)


@pytest.mark.parametrize("earlier", [None, 7, [], "", "\ud800", "x" * 100_000])
def test_what_names_no_response_goes_as_any_other(servers: list[Keeping], earlier: Any) -> None:
    with RunningGateway(*backends(servers[:1])) as gateway:
        raw = json.dumps({"model": "t", "input": "", "previous_response_id": earlier}).encode()
        assert gateway.post(PATH, raw)[0] in (200, 400, 404, 500)
        assert gateway.get("/health")[0] == 200


def test_it_is_bounded_and_a_full_disk_is_no_reason_to_fail(tmp_path: Path) -> None:
    one, other = (Target(Backend(name, "http://127.0.0.1:1", "t"), Settings()) for name in ("one", "other"))
    kept = Kept(tmp_path / "folder" / "kept")
    exchange = Exchange(PATH, [], b"", body=None, model=None, request_id="", forward=[])
    for number in range(SLOTS + 1000):
        kept.learn(b'{"id":"resp_%d"}' % number, one if number % 2 else other, exchange)
    assert (tmp_path / "folder" / "kept").stat().st_size == SLOTS * SLOT_BYTES
    (tmp_path / "file").write_bytes(b"")
    Kept(tmp_path / "file" / "kept").learn(b'{"id":"resp"}', one, exchange)
