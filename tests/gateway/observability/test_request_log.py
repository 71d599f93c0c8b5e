"""The request log of a real worker: one line per request, no prompt and no key in it."""

import asyncio
import errno
import json
from pathlib import Path
from typing import Any

from tests.gateway.running import wait_until
from tests.gateway.upstream import FakeUpstream
from tests.gateway.workers import Workers
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.observability.request_log import FLUSH_S, RequestLog
from tokenmill.engine.gateway.pipeline import Exchange


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("{")]


def test_one_line_per_request_without_prompt_or_key(tmp_path: Path, upstream: FakeUpstream) -> None:
    with Workers(tmp_path, Backend("a", upstream.url, "utility", models=("tiny",)), request_log=True) as workers:
        key = workers.json("POST", "/admin/keys", {}, status=201)
        secret = [{"role": "user", "content": "my secret prompt"}]
        assert workers.chat(key["key"], messages=secret)[0] == 200
        assert workers.chat(key["key"], messages=secret, stream=True)[0] == 200
        assert workers.chat(key["key"], "nobody", messages=secret)[0] == 404
        assert workers.chat("sk-wrong", messages=secret)[0] == 401
        wait_until(lambda: len(lines(workers.log)) == 4)
        plain, stream, missing, stranger = lines(workers.log)
        assert (plain["status"], plain["tier"], plain["backend"], plain["key"]) == (200, "utility", "a", key["id"])
        assert plain["completion_tokens"] == 5 and plain["outcome"] == "ok"
        assert stream["first_token_seconds"] <= stream["seconds"]
        assert (missing["status"], missing["outcome"], missing["tier"]) == (404, "refused", None)
        assert (stranger["status"], stranger["key"]) == (401, None)
        text = workers.log.read_text(encoding="utf-8")
        assert "secret" not in text and key["key"] not in text and "sk-wrong" not in text


def test_bodies_stand_in_it_only_where_the_policy_says_so() -> None:
    for bodies in (False, True):
        written: list[bytes] = []
        log = RequestLog(bodies, written.append)
        exchange = Exchange("/v1/x", [], b"the body", body=None, model="m\n", request_id="r", forward=[])
        log.note(exchange)
        log.flush()
        (line,) = written[0].splitlines()
        assert json.loads(line).get("body") == ("the body" if bodies else None)


def test_what_cannot_be_written_is_lost_and_the_next_is_written() -> None:
    written: list[bytes] = []
    full = [True]

    def write(text: bytes) -> None:
        if full[0]:
            raise OSError(errno.ENOSPC, "no space left on device")
        written.append(text)

    async def serve() -> None:
        log = RequestLog(False, write)
        await log.start()
        exchange = Exchange("/v1/x", [], b"", body=None, model=None, request_id="r", forward=[])
        for _ in range(3):
            log.note(exchange)
        await asyncio.sleep(2 * FLUSH_S)
        full[0] = False
        while not written:
            log.note(exchange)
            await asyncio.sleep(FLUSH_S)
        await log.stop()

    asyncio.run(asyncio.wait_for(serve(), 20))
    events = [json.loads(line) for line in b"".join(written).splitlines()]
    assert sum(line.get("requests", 0) for line in events if line["event"] == "lost") >= 3


def test_a_stuck_reader_costs_lines_and_not_memory() -> None:
    written: list[bytes] = []
    log = RequestLog(False, written.append)
    exchange = Exchange("/v1/x", [], b"", body=None, model=None, request_id="r", forward=[])
    for _ in range(10_005):
        log.note(exchange)
    log.flush()
    last = json.loads(written[0].splitlines()[-1])
    assert (last["event"], last["requests"]) == ("lost", 5)
