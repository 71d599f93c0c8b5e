"""Stages in order, a reply on its way back, and an end that comes once however the request ends."""

import asyncio
from collections.abc import AsyncGenerator, Callable

import pytest

from tokenmill.engine.gateway.api_error import ApiError
from tokenmill.engine.gateway.app import Gateway
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.pipeline import Exchange, Handler, Reply, Stage, compose
from tokenmill.engine.gateway.portfolio import Portfolio
from tokenmill.engine.gateway.request import ANSWER, ON_HANGUP
from tokenmill.engine.gateway.settings import Settings


class Recorder:
    """A stage that writes down what happens."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log

    async def handle(self, exchange: Exchange, proceed: Handler) -> Reply:
        """See `Stage`."""
        self.log.append(f"{self.name} down")
        exchange.on_end(lambda ended: self.log.append(f"{self.name} end {ended.outcome}"))
        reply = await proceed(exchange)
        self.log.append(f"{self.name} up")
        return reply


class Refuse:
    """A stage that lets nothing through."""

    name = "refuse"

    async def handle(self, exchange: Exchange, proceed: Handler) -> Reply:
        """See `Stage`."""
        raise ApiError(403, "not you")


class Answer:
    """A stage that answers itself: a stream that breaks after some chunks where told to."""

    name = "answer"

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken
        self.closed = False

    async def handle(self, exchange: Exchange, proceed: Handler) -> Reply:
        """See `Stage`."""
        exchange.taps.append(lambda chunk: exchange.notes.setdefault("seen", []).append(chunk))
        return Reply(200, [(b"content-type", b"text/event-stream")], None, self.chunks())

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The stream."""
        try:
            for index in range(3):
                yield b"%d" % index
            if self.broken:
                raise ZeroDivisionError
        finally:
            self.closed = True


def run(stages: list[Stage], gone_after: int | None = None) -> list[dict[str, object]]:
    """What the gateway sends for one request; the client hangs up after some messages."""
    gateway = Gateway(Portfolio([Backend("a", "http://a", "t", ("m",))], Settings()), stages)
    sent: list[dict[str, object]] = []

    async def main() -> None:
        hang_up: list[Callable[[], None]] = []

        async def receive() -> dict[str, object]:
            return {"type": "http.request", "body": b'{"model":"m"}'}

        async def send(message: object) -> None:
            assert isinstance(message, dict)
            sent.append(message)
            if len(sent) == gone_after:
                hang_up[0]()
                await asyncio.sleep(1)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
        scope[ON_HANGUP], scope[ANSWER] = hang_up.append, lambda *_: False
        await gateway(scope, receive, send)  # type: ignore[arg-type]

    asyncio.run(main())
    return sent


def test_stages_wrap_each_other_and_end_in_reverse() -> None:
    log: list[str] = []
    sent = run([Recorder("a", log), Recorder("b", log), Answer()])
    assert log == ["a down", "b down", "b up", "a up", "b end ok", "a end ok"]
    assert b"".join(message.get("body", b"") for message in sent) == b"012"  # type: ignore[misc]
    assert "more_body" not in sent[-1]


def test_refusal_ends_the_request_too() -> None:
    log: list[str] = []
    sent = run([Recorder("a", log), Refuse(), Recorder("b", log)])
    assert log == ["a down", "a end refused"]
    assert sent[0]["status"] == 403
    assert b'"permission_error"' in sent[1]["body"]  # type: ignore[operator]


def test_hang_up_ends_the_request_and_closes_the_stream() -> None:
    log: list[str] = []
    answer = Answer()
    run([Recorder("a", log), answer], gone_after=2)
    assert log == ["a down", "a up", "a end gone"]
    assert answer.closed


def test_stream_that_fails_is_never_finished(caplog: pytest.LogCaptureFixture) -> None:
    log: list[str] = []
    sent = run([Recorder("a", log), Answer(broken=True)])
    assert log == ["a down", "a up", "a end failed"]
    assert all(message.get("more_body") for message in sent[1:])
    assert "in the middle of its reply" in caplog.text


def test_stage_that_fails_is_a_500_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        name = "broken"

        async def handle(self, exchange: Exchange, proceed: Handler) -> Reply:
            raise ZeroDivisionError("a secret of ours")

    sent = run([Broken()])
    assert sent[0]["status"] == 500
    assert b"secret" not in sent[1]["body"]  # type: ignore[operator]
    assert "a secret of ours" in caplog.text


def test_every_end_runs_once_though_one_fails() -> None:
    exchange = Exchange("/", [], b"", body=None, model=None, request_id="r", forward=[])
    log: list[str] = []
    exchange.on_end(lambda _: log.append("first"))
    exchange.on_end(lambda _: log.append(str(1 / 0)))
    exchange.on_end(lambda _: log.append("third"))
    with pytest.raises(ZeroDivisionError):
        exchange.end()
    exchange.end()
    assert log == ["third", "first"]


def test_a_stage_may_proceed_twice() -> None:
    class Twice:
        name = "twice"

        async def handle(self, exchange: Exchange, proceed: Handler) -> Reply:
            first = await proceed(exchange)
            second = await proceed(exchange)
            return Reply(200, body=(first.body or b"") + (second.body or b""))

    async def bottom(_exchange: Exchange) -> Reply:
        return Reply(200, body=b"x")

    exchange = Exchange("/", [], b"", body=None, model=None, request_id="r", forward=[])
    assert asyncio.run(_call(compose([Twice(), Twice()], bottom), exchange)).body == b"xxxx"


async def _call(handler: Handler, exchange: Exchange) -> Reply:
    return await handler(exchange)
