"""The stage that reserves what a request can cost before it is sent, and has it settled when it has ended."""

import asyncio
import functools
import itertools

from tokenmill.engine.gateway.api_error import ApiError, Header, Headers, quote, retry_after
from tokenmill.engine.gateway.database import StoreUnavailableError, now_ms
from tokenmill.engine.gateway.governance import bounds, budgets, charges, identify, narrowing
from tokenmill.engine.gateway.governance.bounds import Bound
from tokenmill.engine.gateway.governance.budgets import Granted, Refusal, Reservation, Settlement, Spending
from tokenmill.engine.gateway.governance.service import Governance
from tokenmill.engine.gateway.money import MICRO_CENTS_PER_DOLLAR, dollars
from tokenmill.engine.gateway.observability.consumption import CHARGED
from tokenmill.engine.gateway.pipeline import Exchange, Handler, Reply
from tokenmill.engine.gateway.portfolio import Target

#: Seconds after which a limit is whole again, the request that was just counted included.
_RESET_S = budgets.WINDOW_S + 1
#: OpenAI's clients do not wait longer than this, but try again at once; it is better to tell them not to.
_CLIENT_PATIENCE_MS = 60_000
#: Seconds until a request that is one too many at once is tried again, each time: who has the end of an answer asks the
#: next, perhaps of another worker, and that one is settled a moment later.
_ENDING_S = (0.01, 0.04, 0.2)


class Reserve:
    """Reserves at the dearest of the routes, plus the tier that may take over; what does not fit is taken out of them.

    Args:
        governance: The store.
    """

    name = "reserve"

    def __init__(self, governance: Governance) -> None:
        self._governance = governance
        self._numbers = itertools.count()
        self._open = 0
        self._completion_bound = governance.options.completion_bound

    async def handle(self, exchange: Exchange, proceed: Handler) -> Reply:
        """See `pipeline.Stage`."""
        asked = bounds.asked(exchange)

        def bound_at(target: Target) -> Bound:
            return asked.at(target, self._completion_bound)

        wanted = self._reservation(exchange, bound_at)
        settles = True

        known: Spending | None = None

        def settle(ended: Exchange) -> None:
            self._open -= 1
            if settles:
                spending = charges.spending(ended, bound_at) if known is None else charges.ended(known, ended)
                ended.notes[CHARGED] = spending
                store.post_item(apply, Settlement(wanted.call, spending), dispensable=not ended.calls)

        # Before the reservation is made: a client that hangs up meanwhile leaves nothing behind.
        exchange.on_end(settle)
        exchange.meter = True
        self._open += 1
        store, apply = self._governance.store, self._governance.apply
        try:
            answer = await self._reserve(wanted)
            while isinstance(answer, Refusal):
                final = narrowing.narrow(exchange, bound_at, answer)
                if final is not None:
                    settles = False
                    raise refusal(final)
                # Each round takes something out, so there are few.
                wanted = self._reservation(exchange, bound_at)
                answer = await self._reserve(wanted)
        except StoreUnavailableError as error:
            settles = error.perhaps_done
            raise self._governance.unwritable(error) from error
        reply = await proceed(exchange)
        if reply.body is not None and exchange.goes_on is None:
            # Every call has ended: all that may change is how the request does.
            known = charges.spending(exchange, bound_at)
        reply.headers = [*reply.headers, *_headers(answer, None if known is None else known.total)]
        return reply

    async def _reserve(self, wanted: Reservation) -> Granted | Refusal:
        answer = await self._write(wanted)
        for pause_s in _ENDING_S:
            if not isinstance(answer, Refusal) or answer.limit != "at once" or not answer.allowed:
                break
            await asyncio.sleep(pause_s)
            answer = await self._write(wanted)
        return answer

    async def _write(self, wanted: Reservation) -> Granted | Refusal:
        try:
            answer: Granted | Refusal = await self._governance.store.write_item(
                self._governance.apply, wanted, alone=self._open == 1
            )
        except StoreUnavailableError:
            raise
        except Exception as error:
            raise self._governance.unwritable(error) from error
        return answer

    def _reservation(self, exchange: Exchange, bound_at: narrowing.BoundAt) -> Reservation:
        assert exchange.principal is not None, "Reserve stands below Identify"
        first = exchange.routes[0]
        needed = narrowing.need(exchange, bound_at)
        worker = self._governance.worker.id
        return Reservation(
            f"{worker}-{next(self._numbers)}",
            worker,
            exchange.principal.chain,
            exchange.request_id,
            exchange.model or first.model or "",
            first.targets[0].backend.tier if first.targets else "",
            *needed,
            now_ms(),
        )


def _headers(granted: Granted, cost: int | None) -> Headers:
    """What the client is told of its limits, and of what it has spent; None: what this one costs is not known yet."""
    headers: Headers = []
    # The limit is whole again when this request has left the window.
    if granted.requests is not None:
        headers += _rate_headers("requests", *granted.requests, _RESET_S)
    if granted.tokens is not None:
        headers += _rate_headers("tokens", *granted.tokens, _RESET_S)
    spent = granted.spent
    if cost is not None:
        spent += cost
        headers.append((b"x-tokenmill-cost", _exact_dollars(cost)))
    headers.append((b"x-tokenmill-key-spend", _exact_dollars(spent)))
    return headers


def _exact_dollars(amount: int) -> bytes:
    return b"%d.%08d" % divmod(amount, MICRO_CENTS_PER_DOLLAR)


def _rate_headers(kind: str, limit: int, remaining: int, reset_s: float) -> Headers:
    limit_header, remaining_name, reset_header = _rate_frame(kind, limit, reset_s)
    return [limit_header, (remaining_name, b"%d" % max(remaining, 0)), reset_header]


@functools.lru_cache(maxsize=1024)
def _rate_frame(kind: str, limit: int, reset_s: float) -> tuple[Header, bytes, Header]:
    """What is the same in the headers of many requests."""
    name = f"x-ratelimit-%s-{kind}"
    reset = f"{reset_s:g}s".encode()
    limit_header = ((name % "limit").encode(), b"%d" % limit)
    return limit_header, (name % "remaining").encode(), ((name % "reset").encode(), reset)


def refusal(found: Refusal) -> ApiError:
    """The answer to a request that a limit refused."""
    if found.limit == "revoked":
        return identify.revoked(found.account.id)
    whose = f"{found.account.kind} `{quote(found.account.id)}`"
    if found.limit == "budget":
        return _over_budget(found, whose)
    if found.limit == "at once":
        return _too_many(found, whose)
    message = (
        f"The {whose} is limited to {found.allowed} {found.limit} per minute; {found.used} were used or reserved in "
        f"the last minute, this request may use {found.asked}."
    )
    if found.retry_ms is None:
        message += " It never fits: shorten it, or state a smaller `max_tokens`."
        wait = [(b"x-should-retry", b"false")]
    else:
        wait = [retry_after(found.retry_ms / 1000 + 0.5)]
    reset_s = _RESET_S if found.retry_ms is None else round(found.retry_ms / 1000, 3)
    headers = [*wait, *_rate_headers(found.limit, found.allowed, found.allowed - found.used, reset_s)]
    return ApiError(429, message, code="rate_limit_exceeded", kind=found.limit, headers=headers)


def _too_many(found: Refusal, whose: str) -> ApiError:
    message = f"The {whose} is limited to {found.allowed} requests at once; {found.used} are under way."
    if found.retry_ms is None:
        message += " Ask for a higher limit."
        headers = [(b"x-should-retry", b"false")]
    else:
        message += " Try again when one of them has ended, or ask for a higher limit."
        headers = [retry_after(found.retry_ms / 1000)]
    return ApiError(429, message, code="rate_limit_exceeded", kind="requests", headers=headers)


def _over_budget(found: Refusal, whose: str) -> ApiError:
    message = (
        f"The budget of the {whose} is ${dollars(found.allowed):.8g}; ${dollars(found.used):.8g} are spent or "
        f"reserved, this request may cost ${dollars(found.asked):.8g}."
    )
    if found.asked <= found.allowed and found.retry_ms is not None:
        message += " It begins anew when `Retry-After` says."
        headers: Headers = [retry_after(found.retry_ms / 1000 + 0.5)]
        if found.retry_ms > _CLIENT_PATIENCE_MS:
            headers.append((b"x-should-retry", b"false"))
    else:
        # A fitting request may still pass; this one will not by waiting.
        message += " State a smaller `max_tokens`, or ask for a larger budget."
        headers = [(b"x-should-retry", b"false")]
    return ApiError(429, message, code="insufficient_quota", kind="insufficient_quota", headers=headers)
