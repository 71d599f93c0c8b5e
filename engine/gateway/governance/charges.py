"""What a request is charged, from what its calls used.

* The backend counted: exactly that.
* A stream without a count (cut by the backend, left by the client, or from a server that does not count): the bound
  of its prompt, and one token for each event seen.
* Sent, and nothing seen that could be counted (the client hung up before the answer, the backend was silent, broke
  off within an answer that is no stream, or does not count): the call's whole bound, because nobody knows how far it
  came.
* Nothing for a call that was answered with an error, or whose backend broke off before any byte of an answer: the
  gateway holds such a request for not done, too, and may repeat it.

Nothing is charged above the call's bound but what a backend counted itself; of that, nothing above the reservation.
"""

from collections.abc import Callable

from tokenmill.engine.gateway.governance.bounds import Bound
from tokenmill.engine.gateway.governance.budgets import Spending
from tokenmill.engine.gateway.pipeline import Call, Exchange, Usage
from tokenmill.engine.gateway.portfolio import Target


def used(call: Call, bound: Bound) -> Usage:
    """The tokens that one call is charged for."""
    usage = call.usage
    if usage.exact:
        return usage
    if not call.taken or call.status >= 400:
        return Usage(exact=True)
    if usage.completion == 0:
        return Usage(bound.prompt, 0, bound.completion)
    return Usage(bound.prompt, 0, min(usage.completion, bound.completion))


def spending(exchange: Exchange, bound_at: Callable[[Target], Bound]) -> Spending:
    """What a request used, all its calls together, each at its backend's prices.

    Args:
        exchange: The request, ended or with its whole answer there.
        bound_at: The bound of a call to a backend.
    """
    prompt = cached = completion = cost = 0
    exact = True
    for call in exchange.calls:
        usage = call.usage if call.usage.exact else used(call, bound_at(call.target))
        prompt += usage.prompt
        cached += usage.cached
        completion += usage.completion
        exact = exact and usage.exact
        cost += call.target.backend.prices.cost(usage.prompt, usage.cached, usage.completion)
    backend = exchange.calls[-1].target.backend if exchange.calls else None
    return Spending(
        backend.name if backend else "",
        backend.tier if backend else "",
        prompt,
        cached,
        completion,
        exact,
        cost,
        exchange.outcome,
        exchange.status,
        len(exchange.calls),
    )
