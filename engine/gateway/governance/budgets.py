"""What is said about budgets and rate limits: what a request may use, what it used, and why one is refused."""

from typing import Literal, NamedTuple

from tokenmill.engine.gateway.governance.accounts import Account

#: Length of the sliding window of rate limits, in seconds.
WINDOW_S = 60


class Reservation(NamedTuple):
    """The most that one request can use.

    Attributes:
        call: Unique id of the request.
        worker: The process that serves it.
        chain: Ids of the key's account and of all above it, the key's first.
        request_id: The client's name for it, for people.
        model, tier: What it asks for.
        amount: Micro-cents.
        prompt, completion: Tokens.
        at: When, in milliseconds.
    """

    call: str
    worker: str
    chain: tuple[str, ...]
    request_id: str
    model: str
    tier: str
    amount: int
    prompt: int
    completion: int
    at: int


class Part(NamedTuple):
    """A call of a request that is charged beside the one that answered; tokens, micro-cents.

    Attributes:
        kind: `escalated-from`: its answer was not sure enough; `failed`: it gave none, but may have done the work.
        status: Of its answer; 0: there was none.
        accepted, rejected: See `pipeline.Usage`.
    """

    kind: Literal["escalated-from", "failed"]
    backend: str
    tier: str
    prompt: int
    cached: int
    completion: int
    exact: bool
    cost: int
    status: int
    accepted: int = 0
    rejected: int = 0


class Spending(NamedTuple):
    """What one request used in the end; tokens, micro-cents.

    Attributes:
        backend, tier: Who answered; empty: nobody, or nobody knows.
        prompt, cached, completion: Tokens of the call that answered.
        exact: The backend counted the tokens.
        cost: What that call cost; what all cost is charged up to the amount reserved.
        attempts: Calls, those that cost nothing included.
        others: The other calls that cost something.
        accepted, rejected: See `pipeline.Usage`.
    """

    backend: str
    tier: str
    prompt: int
    cached: int
    completion: int
    exact: bool
    cost: int
    outcome: str
    status: int
    attempts: int
    others: tuple[Part, ...] = ()
    accepted: int = 0
    rejected: int = 0

    @property
    def total(self) -> int:
        """What all of its calls cost."""
        if not self.others:
            return self.cost
        return self.cost + sum(part.cost for part in self.others)


class Rate(NamedTuple):
    """The tightest limit per minute of a chain, with the request just reserved counted."""

    limit: int
    remaining: int


class Granted(NamedTuple):
    """A reservation that was made.

    Attributes:
        spent: Micro-cents of the key's period so far.
        requests, tokens: Where the chain stands; None: no limit.
    """

    spent: int
    requests: Rate | None
    tokens: Rate | None


class Refusal(NamedTuple):
    """Why a request may not be served now.

    Attributes:
        limit: Which limit; `at once`: of requests under way; `revoked`: the key itself is not good any more, the
            figures mean nothing.
        account: Whose.
        allowed: The limit, in its unit.
        used: What counts against it already.
        asked: What the request would add at most.
        retry_ms: When it may be tried again, in milliseconds from now; None: not by waiting.
    """

    limit: Literal["budget", "requests", "tokens", "at once", "revoked"]
    account: Account
    allowed: int
    used: int
    asked: int
    retry_ms: int | None


class Settlement(NamedTuple):
    """The end of a request that was reserved as `call`."""

    call: str
    spending: Spending
