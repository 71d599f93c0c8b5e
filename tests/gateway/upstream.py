"""A small server that speaks the OpenAI protocol over real HTTP and keeps books: what it saw, what it had open.

It does what the request's own `act` field says, so that a test reads in one place what the backend does:

    {"model": "tiny", "act": {"delay_s": 1}}         answers after a second
    {"act": {"until_open": 16}}                      answers once 16 requests have been open together
    {"stream": true, "act": {"chunks": 50}}          50 events at once, then usage and [DONE]
    {"stream": true, "act": {"interval_s": 0.01}}    events 10 ms apart
    {"stream": true, "act": {"tokens": 200}}         says that its events held 200 tokens
    {"stream": true, "act": {"cut_after": 3}}        breaks the connection after 3 events
    {"act": {"cut_after": 0}}                        breaks the connection without an answer
    {"stream": true, "act": {"head_s": 1}}           sends the head, and the events after a second
    {"stream": true, "act": {"cut_head": true}}      breaks the connection after the head, and that second
    {"stream": true, "act": {"error": {...}}}        sends this error after the events
    {"act": {"metrics": {...}}}                      says this beside its usage, like vLLM
    {"act": {"echo": 3}}                             repeats the last message, in a stream 3 characters at a time
    {"logprobs": true, "act": {"logprob": -3.0}}     gives each token this log probability
    {"act": {"small": {...}, "large": {...}}}        does by its model's name
    {"act": {"status": 422, "body": "...", "headers": {...}}}   answers just that
"""

import asyncio
import json
import threading
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from aiohttp import web

T = TypeVar("T")


@dataclass
class Books:
    """What the server saw.

    Attributes:
        requests: (path with query, headers, body) of each request to a model, in order.
        open: Requests open now.
        most_open: The most that were open at once.
        cancelled: Requests whose client hung up before their answer was complete.
        sent: Bytes of each complete answer, in the order in which they ended.
        prompt_tokens, completion_tokens: Sums over all usage that was reported.
    """

    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    open: int = 0
    most_open: int = 0
    cancelled: int = 0
    sent: list[bytes] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0


class FakeUpstream:
    """The server, in a thread with its own event loop.

    Args:
        models: The ids that it lists.
        port: 0: any free one.
    """

    def __init__(self, models: tuple[str, ...] = ("tiny",), port: int = 0) -> None:
        self.models = models
        self.books = Books()
        self.healthy = True
        #: What it says about itself at /metrics; None: there is no such page.
        self.metrics: bytes | None = None
        self.port = port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """Its base URL."""
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> "FakeUpstream":
        """Listens."""
        if not self._thread.is_alive():
            self._thread.start()
        self._call(self._start())
        return self

    def pause(self) -> None:
        """Stops listening and breaks every connection; `start` resumes on the same port."""
        self._call(self._stop())

    def stop(self) -> None:
        """Ends the server and its thread."""
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)

    async def _start(self) -> None:
        application = web.Application(client_max_size=256 * 1024 * 1024)
        application.router.add_get("/health", self._health)
        application.router.add_get("/metrics", self._metrics)
        application.router.add_get("/v1/models", self._list)
        self._add_routes(application)
        application.router.add_post("/{path:.*}", self._model)
        self._runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    def _add_routes(self, application: web.Application) -> None:
        """More paths of a server of another kind."""

    async def _stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 500)

    async def _metrics(self, _request: web.Request) -> web.Response:
        return web.Response(status=404) if self.metrics is None else web.Response(body=self.metrics)

    async def _list(self, _request: web.Request) -> web.Response:
        data = [{"id": name, "object": "model", "owned_by": "fake", "max_model_len": 4096} for name in self.models]
        return web.json_response({"object": "list", "data": data})

    async def _model(self, request: web.Request) -> web.StreamResponse:
        books = self.books
        books.open += 1
        books.most_open = max(books.most_open, books.open)
        try:
            raw = await request.read()
            books.requests.append(
                (request.path_qs, {name.lower(): text for name, text in request.headers.items()}, raw)
            )
            return await self._answer(request, raw)
        except (asyncio.CancelledError, ConnectionResetError):
            books.cancelled += 1
            raise
        finally:
            books.open -= 1

    async def _answer(self, request: web.Request, raw: bytes) -> web.StreamResponse:
        try:
            asked = json.loads(raw)
        except ValueError:
            asked = {}
        act = asked.get("act") if isinstance(asked.get("act"), dict) else {}
        act = act.get(asked.get("model"), act)
        if "delay_s" in act:
            await asyncio.sleep(act["delay_s"])
        while self.books.most_open < act.get("until_open", 0):
            await asyncio.sleep(0.01)
        if "status" in act:
            body = act.get("body", "").encode()
            self.books.sent.append(body)
            return web.Response(status=act["status"], body=body, headers=act.get("headers"))
        if act.get("cut_after") == 0:
            assert request.transport is not None
            request.transport.abort()
            await asyncio.sleep(0.2)
        chat = request.path.endswith("chat/completions")
        if asked.get("stream") is True:
            return await self._stream(request, raw, asked, act, chat)
        completion = int(asked.get("max_tokens") or 5)
        text = echoed(asked) if "echo" in act else "word " * completion
        choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        answer = {
            "id": "cmpl-1",
            "object": "chat.completion" if chat else "text_completion",
            "created": 1,
            "model": asked.get("model"),
            "choices": [{"index": 0, "finish_reason": "stop", "stop_reason": None, "token_ids": [1, 2], **choice}],
            "usage": self._usage(raw, completion),
            "prompt_logprobs": None,
            "service_tier": None,
        }
        if "metrics" in act:
            answer["metrics"] = act["metrics"]
        if asked.get("logprobs") and "logprob" in act:
            answer["choices"][0]["logprobs"] = {"content": [{"token": "word", "logprob": act["logprob"]}] * completion}
        body = json.dumps(answer).encode()
        self.books.sent.append(body)
        return web.Response(body=body, content_type="application/json", headers={"x-custom": "kept"})

    async def _stream(
        self, request: web.Request, raw: bytes, asked: dict[str, Any], act: dict[str, Any], chat: bool
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8", "x-custom": "kept"})
        await response.prepare(request)
        await asyncio.sleep(act.get("head_s", 0))
        if act.get("cut_head"):
            assert request.transport is not None
            request.transport.abort()
            await asyncio.sleep(0.2)
        sent: list[bytes] = []
        pieces = [f"w{index} " for index in range(act.get("chunks", 5))]
        if "echo" in act:
            text, size = echoed(asked), act["echo"]
            pieces = [text[start : start + size] for start in range(0, len(text), size)]
        chunks = len(pieces)
        for index, piece in enumerate(pieces):
            if act.get("cut_after") == index:
                assert request.transport is not None
                request.transport.abort()
                await asyncio.sleep(0.2)
            choice = {"delta": {"content": piece}} if chat else {"text": piece}
            if asked.get("logprobs") and "logprob" in act:
                choice["logprobs"] = {"content": [{"token": piece, "logprob": act["logprob"]}]}
            sent.append(await self._event(response, asked, [{"index": 0, "finish_reason": None, **choice}]))
            if "interval_s" in act:
                await asyncio.sleep(act["interval_s"])
        if "error" in act:
            await response.write(b"data: " + json.dumps({"error": act["error"]}).encode() + b"\n\n")
        if (asked.get("stream_options") or {}).get("include_usage"):
            more = {name: act[name] for name in ("metrics",) if name in act}
            sent.append(
                await self._event(response, asked, [], {"usage": self._usage(raw, act.get("tokens", chunks)), **more})
            )
        await response.write(b"data: [DONE]\n\n")
        self.books.sent.append(b"".join(sent) + b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _event(
        self, response: web.StreamResponse, asked: dict[str, Any], choices: list[Any], more: Any = None
    ) -> bytes:
        kind = "chat.completion.chunk"
        event = {"id": "c", "object": kind, "created": 1, "model": asked.get("model"), "choices": choices}
        event.update(more or {})
        text = b"data: " + json.dumps(event).encode() + b"\n\n"
        await response.write(text)
        return text

    def _usage(self, raw: bytes, completion: int) -> dict[str, int]:
        prompt = len(raw) // 4
        self.books.prompt_tokens += prompt
        self.books.completion_tokens += completion
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def echoed(asked: dict[str, Any]) -> str:
    """The last message, or the prompt."""
    if "prompt" in asked:
        return str(asked["prompt"])
    content = asked["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
