"""A backend process that counts what it reports, for each request by its id: the other side's books.

`python counting_upstream.py` prints three ports, all of one server, and serves until its standard input ends. A
request does what its `act` says: `refuse` (503), `break` (no answer) happen to the first attempt alone, `unsure` makes
its tokens improbable where probabilities are asked for; `stream` is the request's own field. `GET /books` returns
{request id: [[port, prompt, completion], ...]} of every count that went out.
"""

import asyncio
import json
import sys
from typing import Any

from aiohttp import web


class Upstream:
    """The server."""

    def __init__(self) -> None:
        self.books: dict[str, list[tuple[int, int, int]]] = {}
        self.seen: set[str] = set()

    async def model(self, request: web.Request) -> web.StreamResponse:
        """Answers one request, as far as its client stays."""
        try:
            return await self._answer(request)
        except ConnectionResetError:
            return web.Response()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        asked = json.loads(raw)
        identity = request.headers["x-request-id"]
        first = identity not in self.seen
        self.seen.add(identity)
        act = asked.get("act")
        if first and act == "refuse":
            return web.json_response({"error": {"message": "later"}}, status=503)
        if first and act == "break":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        await asyncio.sleep(asked["pause_s"])
        assert request.transport is not None
        port: int = request.transport.get_extra_info("sockname")[1]
        prompt, completion = len(raw) // 4, asked["tokens"]
        counted = port, prompt, completion
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        token = {"token": "x", "logprob": -3.0 if act == "unsure" else -0.01}
        told = asked.get("logprobs") is True
        if not asked.get("stream"):
            self.books.setdefault(identity, []).append(counted)
            message = {"role": "assistant", "content": "x" * completion}
            choice: dict[str, Any] = {"index": 0, "message": message}
            if told:
                choice["logprobs"] = {"content": [token] * completion}
            return web.json_response({"choices": [choice], "usage": usage})
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(completion):
            choice = {"index": 0, "delta": {"content": "x"}}
            if told:
                choice["logprobs"] = {"content": [token]}
            await response.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
        self.books.setdefault(identity, []).append(counted)
        await response.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    async def list_books(self, _request: web.Request) -> web.Response:
        """What was counted since the last call."""
        books, self.books, self.seen = self.books, {}, set()
        return web.json_response(books)


async def main() -> None:
    """Serves on three ports."""
    upstream = Upstream()
    application = web.Application()
    application.router.add_get("/health", lambda _: _ok())
    application.router.add_get("/books", upstream.list_books)
    application.router.add_post("/{path:.*}", upstream.model)
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.0)
    await runner.setup()
    for _ in range(3):
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=2048).start()
    print(*(address[1] for address in runner.addresses), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await runner.cleanup()


async def _ok() -> web.Response:
    return web.Response()


if __name__ == "__main__":
    asyncio.run(main())
