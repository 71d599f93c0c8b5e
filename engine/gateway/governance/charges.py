"""What a request is charged, from what its calls used.

* The backend counted: exactly that; what it wrote into its cache, and what it found there, at their own prices.
* A stream without a count (cut by the backend, left by the client, or from a server that does not count): the bound
  of its prompt, or what the backend had said of it at the stream's begin (Anthropic's do), and for each event seen what
  the events of this backend's model hold (`event_tokens`).
* Sent, and nothing seen that could be counted (the client hung up before the answer, the backend was silent, broke
  off within an answer that is no stream, or does not count): the call's whole bound, because nobody knows how far it
  came.
* Nothing for a call that was answered with an error, or whose backend broke off before any byte of an answer: the
  gateway holds such a request for not done, too, and may repeat it.

A bound of a prompt costs the most that its tokens can cost: any of them may have been written into a cache.
Nothing is charged above the call's bound but what a backend counted itself; of that, nothing above the reservation.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from tokenmill.engine.gateway.governance.bounds import Bound
from tokenmill.engine.gateway.governance.budgets import Part, Spending
from tokenmill.engine.gateway.observability.decisions import was_escalated
from tokenmill.engine.gateway.pipeline import Call, Exchange, Usage
from tokenmill.engine.gateway.portfolio import Target


def used(call: Call, bound: Bound) -> Usage:
    """The tokens that one call is charged for."""
    usage = call.usage
    if usage.exact:
        return usage
    if not call.taken or call.status >= 400:
        return Usage(exact=True)
    completion = min(usage.completion, bound.completion) if usage.completion else bound.completion
    return replace(usage, completion=completion) if usage.prompt else Usage(bound.prompt, 0, completion)


def spending(exchange: Exchange, bound_at: Callable[[Target], Bound]) -> Spending:
    """What a request used, each call at its backend's prices.

    Args:
        exchange: The request, ended or with its whole answer there.
        bound_at: The bound of a call to a backend.
    """
    calls, answering = exchange.calls, exchange.answering
    if answering is None:
        return Spending("", "", 0, 0, 0, True, 0, exchange.outcome, exchange.status, 0)
    usage, cost = _charge(answering, bound_at)
    backend = answering.target.backend
    return Spending(
        backend.name,
        backend.tier,
        usage.prompt,
        usage.cached,
        usage.completion,
        usage.exact,
        cost,
        exchange.outcome,
        exchange.status,
        len(calls),
        _parts(exchange, answering, bound_at) if len(calls) > 1 else (),
        usage.accepted,
        usage.rejected,
    )


def ended(known: Spending, exchange: Exchange) -> Spending:
    """What was known when all calls had ended, with how the request itself did."""
    return known._replace(outcome=exchange.outcome, status=exchange.status)


def _parts(exchange: Exchange, answering: Call, bound_at: Callable[[Target], Bound]) -> tuple[Part, ...]:
    parts = []
    escalated = was_escalated(exchange)
    for call in exchange.calls:
        if call is answering:
            continue
        usage, cost = _charge(call, bound_at)
        if usage.prompt or usage.completion or cost:
            backend = call.target.backend
            kind: Literal["escalated-from", "failed"] = "escalated-from" if escalated and call.status else "failed"
            parts.append(
                Part(kind, backend.name, backend.tier, usage.prompt, usage.cached, usage.completion, usage.exact, cost,
                     call.status, usage.accepted, usage.rejected)
            )  # fmt: skip
    return tuple(parts)


def _charge(call: Call, bound_at: Callable[[Target], Bound]) -> tuple[Usage, int]:
    """(tokens, micro-cents) of one call."""
    usage, prices = call.usage, call.target.backend.prices
    if not usage.exact:
        bound = bound_at(call.target)
        usage = used(call, bound)
        if not call.usage.prompt:
            return usage, prices.bound(usage.prompt, usage.completion, bound.writes)
    return usage, prices.cost(usage.prompt, usage.cached, usage.completion, usage.written, usage.written_hour)
