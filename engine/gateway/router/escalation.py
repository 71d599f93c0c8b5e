"""Asks the cheaper tier first and the better one only where the first is not sure.

The first tier is asked for the probabilities of its tokens. Where their confidence is below the threshold, and there is
time and budget, the second tier's answer is given instead, whole: nothing of the first one is shown. A stream is held
back until it is judged: all of it, or its first `hold_tokens` tokens. In the latter case what follows is released
unjudged; the rule is that the beginning decides. When the allowance ends while a stream is held back, or while the
second tier has not begun to answer, the first answer is given as it is.

What is released are the first tier's own bytes, but for the log probabilities where the client did not ask for them.
Where the second tier fails, the first one's answer is given after all. Where the first one fails, another tier is
asked; for a stream that fails while it is held back, the second one.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from tokenmill.engine.gateway.api_error import ApiError
from tokenmill.engine.gateway.body import Body
from tokenmill.engine.gateway.connection import CutError
from tokenmill.engine.gateway.fallback import passes_on, trouble_of
from tokenmill.engine.gateway.pipeline import Exchange, Handler, Reply
from tokenmill.engine.gateway.portfolio import Route
from tokenmill.engine.gateway.router.confidence import confidence, logprobs_of, without_logprobs
from tokenmill.engine.gateway.router.hold import Held, hold
from tokenmill.engine.gateway.router.settings import EscalationSettings
from tokenmill.engine.gateway.sse import Events, data_of, event

#: What stands in a field that asks for no log probabilities; anything else is between the client and the backend, which
#: may take a 1 for a true.
_UNASKED = (None, b"null", b"false", b"0")


class Escalation:
    """Judges answers; stands below everything that reserves money, for it may ask twice.

    Args:
        settings: Tiers, threshold, times.
    """

    name = "escalation"

    def __init__(self, settings: EscalationSettings) -> None:
        self._settings = settings

    async def handle(self, exchange: Exchange, proceed: Handler) -> Reply:
        """See `pipeline.Stage`."""
        if exchange.decision is None or exchange.decision.escalation is None or exchange.body is None:
            return await proceed(exchange)
        routes, body, payload = exchange.routes, exchange.body, exchange.payload
        asked = any(body.raw_field(name) not in _UNASKED for name in ("logprobs", "top_logprobs"))
        first = _of_tier(routes, self._settings.first, logprobs=True)
        if not first:
            return await proceed(exchange)
        exchange.routes = first
        if not asked:
            exchange.body = Body(body.with_fields({"logprobs": True}))
            exchange.payload = exchange.body.raw
        reply = await _answered(exchange, proceed)
        exchange.body, exchange.payload = body, payload
        if not asked and _refuses_logprobs(reply):
            # It is asked again as the client wrote it: what was refused is not the client's wish.
            reply = await _answered(exchange, proceed)
        then, held = _of_tier(routes, self._settings.then), None
        others = _without(routes, first) if exchange.calls else routes
        if isinstance(reply, Reply) and reply.chunks is not None and (left_s := self._left_s(exchange)) > 0:
            held = await hold(reply.chunks, self._settings.hold_tokens, left_s)
            exchange.on_end(held.end)
            reply.chunks = held.chunks()
            if (failure := _failure(held, exchange)) is not None:
                await held.close()
                # What has come is charged, and beside it money is reserved for this tier.
                reply, others = failure, then
        if _another_may_do_better(reply, exchange):
            return await _instead(exchange, proceed, others, reply)
        if isinstance(reply, ApiError):
            raise reply
        if reply.status >= 400:
            return reply
        release = _unchanged if asked else _cleaned
        return await self._judged(exchange, proceed, reply, held, then, release)

    def _left_s(self, exchange: Exchange) -> float:
        """What is left of the allowance."""
        return self._settings.allowance_s - (time.perf_counter() - exchange.started)

    async def _judged(
        self,
        exchange: Exchange,
        proceed: Handler,
        reply: Reply,
        held: Held | None,
        then: list[Route],
        release: Callable[[Reply], Reply],
    ) -> Reply:
        settings = self._settings
        logprobs = logprobs_of(reply.body or b"") if held is None else held.logprobs
        sure = confidence(logprobs, settings.statistic)
        note: dict[str, Any] = {"confidence": sure, "escalated": False}
        exchange.notes[self.name] = note
        left_s = 0.0 if held is not None and held.late else self._left_s(exchange)
        if sure is None or sure >= settings.threshold or left_s <= 0 or not then:
            return _with_note(release(reply), note)
        target = exchange.target
        exchange.routes = then
        try:
            better = await self._better(exchange, proceed, left_s)
        except BaseException:
            if held is not None:
                await held.close()
            raise
        if better is None:
            exchange.target = target
            return _with_note(release(reply), note)
        if held is not None:
            await held.close()
        note["escalated"] = True
        return _with_note(better, note)

    async def _better(self, exchange: Exchange, proceed: Handler, left_s: float) -> Reply | None:
        """The second tier's answer; None where it fails, of a stream with its first event, or has not begun in time."""
        try:
            async with asyncio.timeout(left_s):
                better = await proceed(exchange)
        except (ApiError, TimeoutError):
            return None
        if better.status < 400 and better.chunks is not None:
            begun = await hold(better.chunks, 0, max(self._left_s(exchange), 0))
            exchange.on_end(begun.end)
            better.chunks = begun.chunks()
            if _failure(begun, exchange) is not None:
                await begun.close()
                return None
        return better if better.status < 400 else None


async def _answered(exchange: Exchange, proceed: Handler) -> Reply | ApiError:
    """The answer, or the gateway's own error in its place."""
    try:
        return await proceed(exchange)
    except ApiError as error:
        return error


def _refuses_logprobs(reply: Reply | ApiError) -> bool:
    return isinstance(reply, Reply) and reply.status in (400, 422) and b"logprobs" in (reply.body or b"")


def _of_tier(routes: Sequence[Route], tier: str, *, logprobs: bool = False) -> list[Route]:
    """The routes' backends of one tier; with `logprobs`, those that can tell the probabilities."""
    found = []
    for route in routes:
        kept = tuple(
            target
            for target in route.targets
            if target.backend.tier == tier and (not logprobs or "logprobs" in target.backend.capabilities)
        )
        if kept:
            found.append(route.only(kept))
    return found


def _without(routes: Sequence[Route], others: Sequence[Route]) -> list[Route]:
    """The routes without the backends of others."""
    left_out = {target for route in others for target in route.targets}
    found = []
    for route in routes:
        kept = tuple(target for target in route.targets if target not in left_out)
        if kept:
            found.append(route.only(kept))
    return found


def _another_may_do_better(reply: Reply | ApiError, exchange: Exchange) -> bool:
    if isinstance(reply, ApiError) or reply.status < 400 or exchange.target is None:
        return passes_on(reply.status)
    return trouble_of(reply, exchange, exchange.target) in ("failed", "context")


def _failure(held: Held, exchange: Exchange) -> Reply | ApiError | None:
    """What a stream comes to that failed while it was held back; None: it did not."""
    if held.broken is None or exchange.target is None:
        return held.error
    name = exchange.target.backend.name
    if isinstance(held.broken, CutError):
        return ApiError(502, f"The backend {name} broke off in the middle of its answer.", code="upstream_cut")
    return ApiError(504, f"The backend {name} was silent for too long.", code="timeout")


async def _instead(exchange: Exchange, proceed: Handler, routes: Sequence[Route], failed: Reply | ApiError) -> Reply:
    """Another tier's answer where the first one failed or could not be asked.

    Where the others fail, too, the first one's error goes back, if it has given one.
    """
    target, asked = exchange.target, bool(exchange.calls)
    exchange.routes = routes
    if not asked:
        return await proceed(exchange)
    try:
        other = await proceed(exchange) if routes else None
    except ApiError:
        other = None
    if other is not None and other.status < 400:
        return other
    exchange.target = target
    if isinstance(failed, ApiError):
        raise failed
    return failed


def _with_note(reply: Reply, note: dict[str, Any]) -> Reply:
    reply.headers = [*reply.headers, (b"x-tokenmill-escalated", b"true" if note["escalated"] else b"false")]
    if note["confidence"] is not None:
        reply.headers.append((b"x-tokenmill-confidence", b"%.4f" % note["confidence"]))
    return reply


def _unchanged(reply: Reply) -> Reply:
    return reply


def _cleaned(reply: Reply) -> Reply:
    """The reply without the log probabilities that only the gateway asked for."""
    if reply.chunks is not None:
        reply.chunks = _cleaned_stream(reply.chunks)
    elif reply.body is not None:
        reply.body = without_logprobs(reply.body)
    return reply


async def _cleaned_stream(chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    events = Events()
    try:
        async for chunk in chunks:
            out = b"".join(map(_cleaned_event, events.feed(chunk)))
            if out:
                yield out
        rest = events.rest()
        if rest:
            yield _cleaned_event(rest)
    finally:
        await chunks.aclose()


def _cleaned_event(raw: bytes) -> bytes:
    data = data_of(raw)
    if data is None:
        return raw
    cleaned = without_logprobs(data)
    return raw if cleaned is data else event(cleaned, raw)
