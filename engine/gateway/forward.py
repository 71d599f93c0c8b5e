"""The bottom of the pipeline: sends a request to a backend of its routes and relays the answer.

A request is sent again, to another backend, only where that is safe: no connection was made, the connection broke
before any byte of an answer (of a stream: of its body, for which its head waits), or the backend answered with an error
of its own. Within a tier all but the first draw on a retry budget; `fallback` says which tier is asked next. After the
first byte of an answer nothing is repeated.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Any

from tokenmill.engine.gateway import (
    affinity,
    anthropic,
    anthropic_stream,
    first_event,
    responses_answer,
    responses_bridge,
    responses_stream,
)
from tokenmill.engine.gateway.api_error import (
    EVENT_STREAM,
    EVENT_STREAM_TYPE,
    JSON,
    ApiError,
    Headers,
    UntranslatableError,
    retry_after,
    unavailable,
    with_error_object,
)
from tokenmill.engine.gateway.balance import Balancer, refusal
from tokenmill.engine.gateway.breaker import RetryBudget
from tokenmill.engine.gateway.connection import ConnectFailedError, CutError, NoAnswerError, SilenceError
from tokenmill.engine.gateway.defaults import PATH as CHAT
from tokenmill.engine.gateway.defaults import defaults_for
from tokenmill.engine.gateway.fallback import Failure, Trouble, Way, trouble_of
from tokenmill.engine.gateway.kept import PATH as RESPONSES
from tokenmill.engine.gateway.kept import Kept
from tokenmill.engine.gateway.pipeline import Call, Exchange, Reply
from tokenmill.engine.gateway.portfolio import FALLBACK, Route, Target
from tokenmill.engine.gateway.settings import Settings
from tokenmill.engine.gateway.upstream import Answer, Upstream
from tokenmill.engine.gateway.usage import HiddenUsage, StreamUsage, counting_options, read_usage

#: The backend says that it did not take the request.
_NOT_TAKEN = (429, 503)
#: The backend is at fault: counted by the circuit breaker.
_FAULT = (500, 502, 503, 504, 529)
#: What the gateway says where a backend took a request and was not heard of again; see `Forwarder._attempt`.
_LOST = (502, 504)


class Lease:
    """One request's hold on a backend: counted while open, its outcome reported once.

    Args:
        call: What is sent to which backend.
        key: Whose request it is; None: nobody must identify himself.
    """

    __slots__ = ("_answer", "_breaker", "_key", "_open", "call", "lasts", "target")

    def __init__(self, call: Call, key: str | None = None) -> None:
        self.call = call
        self._key = key
        self.target = target = call.target
        self._breaker = target.breaker(call.model)
        self._open = True
        #: The backend goes on with the work when it has answered.
        self.lasts = False
        self._answer: Answer | None = None
        target.outstanding += 1
        target.pace.sent()
        self._breaker.begin(key)

    def holds(self, answer: Answer) -> None:
        """The head of the backend's answer is there; the lease closes the answer with itself."""
        self._answer = answer

    def heard(self, status: int) -> None:
        """The backend has answered; a stream, when its first bytes have come."""
        if status in _FAULT:
            self._breaker.failed(self._key)
        elif status != 429:
            self._breaker.succeeded()
            self.target.mark_up()

    def failed(self) -> None:
        """The backend did not."""
        self._breaker.failed()

    def done(self) -> None:
        """The answer was read to its end, or is given up: frees the backend's slot, unless it goes on."""
        if not self.lasts:
            self.close()
        elif self._answer is not None:
            self._answer.close()

    def close(self, _exchange: Exchange | None = None) -> None:
        """Frees the backend's slot; closes the connection if the answer was not read to its end."""
        if self._open:
            self._open = False
            self.target.outstanding -= 1
            if self._answer is not None:
                self._answer.close()


class Forwarder:
    """Sends requests upstream.

    Args:
        upstream: The HTTP client.
        settings: For limits and messages.
        kept: Which backend keeps which response.
    """

    def __init__(self, upstream: Callable[[], Upstream], settings: Settings, kept: Kept) -> None:
        self._upstream = upstream
        self._kept = kept
        self._settings = settings
        self._balancer = Balancer()
        self._retries = RetryBudget(settings.retry_ratio)

    async def handle(self, exchange: Exchange) -> Reply:
        """The answer of the first backend that gives one, or the first tier's error; raises `ApiError` as such."""
        self._retries.earn()
        routes = await self._kept.narrowed(exchange) if exchange.endpoint.startswith(RESPONSES) else exchange.routes
        way = Way(routes, self._settings.most_retries, self._retries)
        held: list[Lease] = []
        while (choice := way.next(exchange, self._balancer)) is not None:
            route, target = choice
            answer: Reply | ApiError
            trouble: Trouble
            try:
                answer, lease = await self._attempt(exchange, target, route)
            except ConnectFailedError as error:
                # Nothing was sent: trying the next backend repeats nothing.
                target.mark_down(str(error))
                answer, trouble = self._unavailable(target, "cannot be reached"), "unsent"
            except NoAnswerError:
                answer, trouble = self._unavailable(target, "closed the connection without an answer"), "failed"
            except UntranslatableError as error:
                answer, trouble = error, "unsent"  # a backend that speaks OpenAI's protocol may do it
            except ApiError as error:
                answer, trouble = error, "lost" if error.status in _LOST else "final"
            else:
                told = answer.error or answer
                if told.status < 400:
                    if route.why == FALLBACK:
                        answer.headers = [*answer.headers, (b"x-tokenmill-fallback", target.backend.tier.encode())]
                    for failed in held:
                        failed.close()
                    return answer
                trouble = trouble_of(told, exchange, target)
                held.append(lease)  # of a stream that begins with an error: it goes back if nobody does better
            if not way.failed(Failure(target, answer), trouble):
                break
        failure = way.failure
        if failure is None:
            raise refusal(way.candidates, self._settings, exchange.key)
        exchange.target = failure.target
        if isinstance(failure.answer, ApiError):
            raise failure.answer
        return failure.answer

    def _unavailable(self, target: Target, what: str) -> ApiError:
        return unavailable(f"The backend {target.backend.name} {what}.", self._settings.retry_after_s)

    async def _attempt(self, exchange: Exchange, target: Target, route: Route) -> tuple[Reply, Lease]:
        """One request to one backend; its outcome is told to the circuit breaker."""
        translated = target.backend.protocol == "anthropic" and exchange.endpoint not in anthropic.OWN_PATHS
        # Before the backend is taken: what its protocol has no words for uses up neither its pace nor a trial.
        said = _in_messages(exchange, target, route) if translated else None
        call = Call(target, route.model)
        lease = Lease(call, exchange.key)
        exchange.on_end(lease.close)
        exchange.target = target
        exchange.attempts += 1
        exchange.calls.append(call)
        if target.backend.tokens_per_minute is not None:
            exchange.on_end(lambda _: target.pace.used(call.usage.prompt + call.usage.completion))
        name = target.backend.name
        try:
            counting = counting_options(exchange)
            if said is None:
                reply = await self._ask(exchange, lease, route, counting)
            else:
                reply = await self._ask_anthropic(exchange, lease, said, counting)
        except (ConnectFailedError, NoAnswerError) as error:
            call.taken = False
            call.sent = not isinstance(error, ConnectFailedError)
            lease.failed()
            lease.close()
            raise
        except asyncio.CancelledError:
            # Given up before its answer: the request may go on with another.
            lease.close()
            raise
        except SilenceError:
            lease.failed()
            lease.close()
            silence = f"The backend {name} was silent for {target.longest_silence_s:g} s."
            raise ApiError(504, silence, code="timeout") from None
        except CutError:
            lease.failed()
            lease.close()
            raise ApiError(
                502, f"The backend {name} broke off in the middle of its answer.", code="upstream_cut"
            ) from None
        call.status = reply.status if reply.error is None else reply.error.status
        if reply.chunks is not None:
            hidden = HiddenUsage() if counting is not None and _is_event_stream(reply) else None
            counted = StreamUsage(call.usage, target.event_tokens(route.model))
            reply.chunks = _relay(reply.chunks, lease, counted, hidden)
        elif reply.status < 400 and reply.body is not None:
            read_usage(reply.body, call.usage)
        return reply, lease

    async def _ask(self, exchange: Exchange, lease: Lease, route: Route, counting: dict[str, Any] | None) -> Reply:
        target = lease.target
        name = _upstream_model(exchange, target, route)
        payload: bytes | bytearray = exchange.payload
        changes: dict[str, Any] = {} if counting is None else {"stream_options": counting}
        if name != exchange.model:
            changes["model"] = name
        if target.backend.defaults and exchange.body is not None:
            changes |= defaults_for(target.backend.defaults, exchange.endpoint, exchange.body)
        if (salt := affinity.salt(exchange, target)) is not None:
            changes["cache_salt"] = salt
        if changes and exchange.body is not None:
            payload = exchange.body.with_fields(changes)
        elif changes and exchange.form is not None and name is not None:
            payload = await exchange.form.with_model(name)
        headers = exchange.forward
        if target.backend.protocol == "anthropic":
            headers = anthropic.headers(headers, target.backend.api_key, own=True)
        elif target.backend.api_key is not None:
            headers = with_key(headers, target.backend.api_key)
        lease.call.taken = lease.call.sent = True
        answer = await self._upstream().send(b"POST", target.origin, exchange.target_path, headers, payload)
        lease.holds(answer)
        if 300 <= answer.status < 400:
            return _redirected(lease, answer.status)
        if answer.status < 400 and answer.content_type != b"application/json":
            await answer.begun()
            error = None
            if answer.content_type == EVENT_STREAM_TYPE:
                error = await first_event.error_in(answer)
                if exchange.endpoint == RESPONSES:
                    await self._kept.learn_streamed(answer, target, exchange)
                    lease.lasts = exchange.goes_on is not None
            lease.heard(answer.status if error is None else error.status)
            return Reply(answer.status, answer.headers, None, answer.chunks(), error)
        body = await answer.read()
        lease.heard(answer.status)
        if answer.status < 400 and exchange.endpoint == RESPONSES:
            self._kept.learn(body, target, exchange)
        lease.lasts = exchange.goes_on is not None
        lease.done()
        return self._with_retry_after(whole(answer, body))

    async def _ask_anthropic(
        self, exchange: Exchange, lease: Lease, said: bytes, counting: dict[str, Any] | None
    ) -> Reply:
        backend = lease.target.backend
        assert exchange.body is not None, "it was translated"
        options = exchange.body.get("stream_options", dict[str, Any]) or {}
        bridged = exchange.endpoint == RESPONSES
        headers = anthropic.headers(exchange.forward, backend.api_key)
        lease.call.taken = lease.call.sent = True
        answer = await self._upstream().send(b"POST", lease.target.origin, anthropic.PATH, headers, said)
        lease.holds(answer)
        if 300 <= answer.status < 400:
            return _redirected(lease, answer.status)
        kept = [header for header in answer.headers if header[0] != b"content-type"]
        if answer.status < 400 and answer.content_type == EVENT_STREAM_TYPE:
            counts = bridged or counting is not None or bool(options.get("include_usage"))
            try:
                chunks = await anthropic_stream.begun(answer.chunks(), counts, lease.call.usage)
            except anthropic_stream.RefusedError as refused:
                lease.heard(refused.status)
                lease.close()
                return self._with_retry_after(Reply(refused.status, [*kept, JSON], refused.body))
            lease.heard(answer.status)
            if bridged:
                chunks = responses_stream.translated(chunks, exchange.body)
            return Reply(200, [*kept, EVENT_STREAM], None, chunks)
        body = await answer.read()
        lease.heard(answer.status)
        lease.close()
        if answer.status < 400:
            body = anthropic.answer(body)
            if bridged:
                body = responses_answer.whole(body, exchange.body)
            return Reply(answer.status, [*kept, JSON], body)
        status, body = anthropic.error(answer.status, body)
        return self._with_retry_after(Reply(status, [*kept, JSON], body))

    def _with_retry_after(self, reply: Reply) -> Reply:
        if reply.status in _NOT_TAKEN and all(name != b"retry-after" for name, _ in reply.headers):
            reply.headers = [*reply.headers, retry_after(self._settings.retry_after_s)]
        return reply


def with_key(headers: Headers, key: str) -> Headers:
    """A request's headers with a backend's key in the place of the client's."""
    kept = [header for header in headers if header[0] not in anthropic.CREDENTIALS]
    return [*kept, (b"authorization", b"Bearer " + key.encode())]


def whole(answer: Answer, body: bytes) -> Reply:
    """A backend's answer that is no stream; an error gets an `error` object where it has none."""
    reply = Reply(answer.status, answer.headers, body)
    if (
        answer.status >= 400
        and all(name != b"content-encoding" for name, _ in answer.headers)
        and (wrapped := with_error_object(answer.status, body)) is not None
    ):
        reply.body = wrapped
        reply.headers = [*(header for header in answer.headers if header[0] != b"content-type"), JSON]
    return reply


def _upstream_model(exchange: Exchange, target: Target, route: Route) -> str | None:
    """The backend's own name of the model; None where neither request nor route names one (the backend decides)."""
    if exchange.model is None and route.model is None and target.backend.protocol == "openai":
        return None
    return target.own_model(route.model) or exchange.model


def _in_messages(exchange: Exchange, target: Target, route: Route) -> bytes:
    """A request in the words of Anthropic's Messages API.

    Raises:
        UntranslatableError: It has none for it.
        ApiError: 400 for what is malformed.
    """
    name, backend, body = _upstream_model(exchange, target, route), target.backend, exchange.body
    bridged = exchange.endpoint == RESPONSES
    if not (bridged or exchange.endpoint == CHAT) or body is None or name is None:
        raise UntranslatableError(f"The backend of this model ({backend.name}) offers {anthropic.OFFERED} only.")
    with responses_bridge.own_words() if bridged else contextlib.nullcontext():
        if bridged:
            body = responses_bridge.chat_of(body, drop=backend.drop_unknown)
        added = defaults_for(backend.defaults, CHAT, body)
        payload = body.with_fields(added) if added else body.raw
        return anthropic.request(payload, name, backend.max_output_tokens, backend.drop_unknown)


def _redirected(lease: Lease, status: int) -> Reply:
    """502: the client is sent nowhere, which would be past every key and policy, and tells inner addresses."""
    lease.heard(502)
    lease.close()
    what = f"The backend {lease.target.backend.name} redirects (status {status})"
    error = ApiError(502, f"{what}; correct its address in the configuration.", code="upstream_redirect")
    return Reply(502, [JSON], error.body())


def _is_event_stream(reply: Reply) -> bool:
    return any(name == b"content-type" and value.startswith(EVENT_STREAM_TYPE) for name, value in reply.headers)


async def _relay(
    chunks: AsyncGenerator[bytes, None], lease: Lease, usage: StreamUsage, hidden: HiddenUsage | None
) -> AsyncGenerator[bytes, None]:
    """The stream, with its tokens counted and its backend's slot freed at its end, whatever that is.

    Args:
        chunks: What the backend sends.
        lease: The hold on it.
        usage: Counts.
        hidden: Takes out what was asked of the backend beyond the client's wish; None: nothing was.
    """
    try:
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                usage.feed(chunk)
                shown = chunk if hidden is None else hidden.feed(chunk)
                if shown:
                    yield shown
            if hidden is not None and (rest := hidden.finish()):
                yield rest
    except (CutError, SilenceError):
        lease.failed()
        raise
    finally:
        usage.finish()
        lease.done()
