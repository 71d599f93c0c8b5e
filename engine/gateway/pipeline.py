"""The road of a request: an `Exchange` goes down through ordered stages and a `Reply` comes back up.

A stage is one concern (identify, reserve budget, route, cache, count). It wraps the stages below it:

    class Limit:
        name = "limit"

        async def handle(self, exchange: Exchange, proceed: Handler) -> Reply:
            if self.exhausted(exchange):
                raise ApiError(429, "...")          # refuse: nothing below runs
            exchange.on_end(self.settle)            # runs once, however the request ends
            reply = await proceed(exchange)         # may be called again (escalation) or not at all (cache)
            reply.headers.append((b"x-left", b"3"))
            return reply

Rules that keep it fast and right:

* `handle` returns when the reply's head is known; a stream's bytes follow later. To watch them without touching them,
  add a function to `exchange.taps` (called with each chunk as it is sent). To change them, wrap `reply.chunks`.
* Whatever must happen at the end (settle, release, record) belongs in `on_end`: it runs exactly once, also when the
  client hung up or the upstream broke, with `exchange.outcome` set. It must not block and must not await.
* A stage holds no state of a request in itself: use `exchange.notes[stage.name]`.
"""

import functools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tokenmill.engine.gateway.api_error import Headers
from tokenmill.engine.gateway.body import Body
from tokenmill.engine.gateway.heads import first_values

if TYPE_CHECKING:
    from tokenmill.engine.gateway.decision import Decision
    from tokenmill.engine.gateway.form import Form
    from tokenmill.engine.gateway.portfolio import Route, Target
    from tokenmill.engine.gateway.principal import Principal

#: Of a longer body a log shows the beginning.
MOST_LOGGED = 64 * 1024
#: How a request ended. `refused`: by the gateway itself (an `ApiError`); `failed`: the backend answered with an error
#: or not at all; `cut`: the backend broke off after its answer began; `gone`: the client hung up.
Outcome = Literal["open", "ok", "refused", "failed", "cut", "gone"]


@dataclass
class Usage:
    """Tokens of one request, as far as they are known.

    Attributes:
        prompt: Prompt tokens; cached and written ones included. The backend said so; 0: it said nothing.
        cached: Prompt tokens that the backend had cached.
        completion: Generated tokens.
        exact: The backend said so of all. Otherwise `completion` is worked out from the stream's events
            (`event_tokens`).
        accepted, rejected: Tokens that were guessed before the model made them, by a draft model or the client, as far
            as the backend says so: right guesses, which are among `completion`, and wrong ones.
        written: Prompt tokens that the backend wrote into its cache.
        written_hour: Those of them that it keeps for an hour, not for minutes.
    """

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    exact: bool = False
    accepted: int = 0
    rejected: int = 0
    written: int = 0
    written_hour: int = 0


@dataclass
class Call:
    """One request to a backend on behalf of an exchange, and what it used there.

    Attributes:
        target: The backend.
        model: The model's public name.
        usage: Its tokens; filled in while the answer passes.
        status: Status of the answer; 0: there was none.
        taken: The backend may have worked on it.
        sent: It went out: there was a connection, and the backend's protocol has words for it.
    """

    target: "Target"
    model: str | None
    usage: Usage = field(default_factory=Usage)
    status: int = 0
    taken: bool = False
    sent: bool = False


@dataclass
class Reply:
    """An answer on its way to the client.

    Attributes:
        status: HTTP status.
        headers: Response headers, names in lower case, without framing (`content-length`, `transfer-encoding`).
        body: The whole body, or None for a stream.
        chunks: The stream's bytes; used when `body` is None.
        error: What the stream says first, where that is an error, as the answer that it would have been.
    """

    status: int
    headers: Headers = field(default_factory=list)
    body: bytes | None = b""
    chunks: AsyncGenerator[bytes, None] | None = None
    error: "Reply | None" = None


class Exchange:
    """One request to a model and everything that is known about it.

    Attributes:
        endpoint: The request's path, `/v1/chat/completions`.
        method: Its method.
        query: Its query string, raw.
        headers: Its headers, raw, names in lower case.
        fields: The first value of each, by its name.
        payload: Its body, raw.
        body: Its top-level JSON fields; None for a multipart form.
        form: The form; None for JSON.
        model: The model asked for; None where the request names none.
        request_id: The client's `x-request-id`, or a new one.
        started: `time.perf_counter()` when the request's head had arrived.
        forward: Headers for the backend, names in lower case, without hop-by-hop ones and framing.
        routes: Where the request may go, best first; set by the first routing stage, narrowed by later ones.
        target: The backend that answers; None until one was chosen.
        attempts: Requests sent upstream for it.
        status: The reply's HTTP status; 0 until it is known.
        first_chunk_at, last_chunk_at: `time.perf_counter()` of the reply's first and last bytes; 0.0 until then.
        calls: What was sent upstream for it, in order; the last one's answer is the reply.
        principal: Whose request it is; None where nobody must identify himself.
        decision: Why it goes where it goes; None where it asks for a model by name.
        meter: Have the backend count a stream's tokens even where the client did not ask for it; the client does
            not see the count.
        outcome: How it ended; `open` until then.
        answered_at: `time.perf_counter()` of its reply's end, where the exchange goes on after it; else 0.0.
        goes_on: Id of the response that its backend goes on with after the answer; None: it does not.
        taps: Called with every chunk of a streamed reply as it is sent.
        notes: What stages keep about this request, by the stage's name.
    """

    # What nearly every request begins with costs nothing here.
    method = "POST"
    form: "Form | None" = None
    routes: "Sequence[Route]" = ()
    target: "Target | None" = None
    attempts = 0
    status = 0
    first_chunk_at = 0.0
    last_chunk_at = 0.0
    principal: "Principal | None" = None
    decision: "Decision | None" = None
    meter = False
    outcome: Outcome = "open"
    answered_at = 0.0
    goes_on: str | None = None

    def __init__(
        self,
        endpoint: str,
        headers: Headers,
        payload: bytes,
        *,
        body: Body | None,
        model: str | None,
        request_id: str,
        forward: Headers,
        query: bytes = b"",
        started: float | None = None,
        fields: Mapping[bytes, bytes] | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.headers = headers
        self.fields = first_values(headers) if fields is None else fields
        self.payload = payload
        self.body = body
        self.model = model
        self.request_id = request_id
        self.forward = forward
        self.query = query
        self.started = time.perf_counter() if started is None else started
        self.calls: list[Call] = []
        self.taps: list[Callable[[bytes], None]] = []
        self.notes: dict[str, Any] = {}
        self._at_end: list[Callable[[Exchange], None]] = []

    @property
    def answering(self) -> Call | None:
        """The call whose answer, or error, the client got; None: nothing was sent."""
        calls = self.calls
        if len(calls) <= 1:
            return calls[0] if calls else None
        return next((call for call in reversed(calls) if call.target is self.target), calls[-1])

    @property
    def key(self) -> str | None:
        """The public id of the key it came with; None where nobody must identify himself."""
        return None if self.principal is None else self.principal.key

    @property
    def usage(self) -> Usage:
        """The tokens of all its calls together."""
        if len(self.calls) == 1:
            return self.calls[0].usage
        usages = [call.usage for call in self.calls]
        return Usage(
            sum(usage.prompt for usage in usages),
            sum(usage.cached for usage in usages),
            sum(usage.completion for usage in usages),
            all(usage.exact for usage in usages),
            sum(usage.accepted for usage in usages),
            sum(usage.rejected for usage in usages),
            sum(usage.written for usage in usages),
            sum(usage.written_hour for usage in usages),
        )

    @property
    def seconds(self) -> float:
        """From its head to its reply's end, or until now."""
        return (self.answered_at or time.perf_counter()) - self.started

    @property
    def target_path(self) -> bytes:
        """Path and query as they go to a backend."""
        path = self.endpoint.encode()
        return path + b"?" + self.query if self.query else path

    def header(self, name: bytes) -> bytes | None:
        """The first value of a request header; its name in lower case."""
        return self.fields.get(name)

    def on_end(self, action: Callable[["Exchange"], None]) -> None:
        """Has `action(exchange)` called once when the request has ended, in reverse order of registration."""
        self._at_end.append(action)

    def answered(self) -> None:
        """The reply has ended, and the exchange goes on, perhaps for hours: its body, of megabytes, is given up.

        Of `payload` as much stays as a log may show.
        """
        self.answered_at = time.perf_counter()
        self.body = None
        self.payload = self.payload[:MOST_LOGGED]

    def end(self) -> None:
        """Runs what `on_end` collected; called by the server alone. One action's failure does not stop the others."""
        failure: Exception | None = None
        while self._at_end:
            try:
                self._at_end.pop()(self)
            except Exception as error:  # noqa: BLE001
                failure = error
        if failure is not None:
            raise failure


Handler = Callable[[Exchange], Awaitable[Reply]]


class Stage(Protocol):
    """One concern on the road of a request; see the module's text."""

    name: str

    def handle(self, exchange: Exchange, proceed: Handler) -> Awaitable[Reply]:
        """Answers, refuses (`ApiError`), or calls `proceed` and returns its reply, changed or not.

        One that does nothing with the reply needs not be a coroutine: it returns what `proceed` does.
        """
        ...


def compose(stages: Sequence[Stage], last: Handler) -> Handler:
    """The stages as one handler, the first outermost, `last` at the bottom."""

    for stage in reversed(stages):
        # Not a closure: that would be a call of the interpreter's for each stage and request.
        last = functools.partial(stage.handle, proceed=last)
    return last
