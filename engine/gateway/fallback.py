"""Who is asked next when a backend could not answer a request, and what goes back when nobody can.

Within a tier a request goes on to another backend, a bounded number of times. Each other tier of its routes is asked
once more at most, in their order: the tiers that the router ranked below, and the ones that the configuration names as
fallbacks after errors, after a prompt that is too long, after a refusal of its content. The routes are those that
policies, allow-lists and the reservation have left: nothing here adds one. When every tier fails, the first one's error
goes back as it came; where it gave none, because nobody there answered, a fallback's verdict on the request does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from tokenmill.engine.gateway.api_error import ApiError
from tokenmill.engine.gateway.balance import Balancer
from tokenmill.engine.gateway.breaker import RetryBudget
from tokenmill.engine.gateway.governance import bounds
from tokenmill.engine.gateway.kept import PATH as RESPONSES
from tokenmill.engine.gateway.kept import refers_back
from tokenmill.engine.gateway.pipeline import Exchange, Reply
from tokenmill.engine.gateway.portfolio import Route, Target, of_tier
from tokenmill.engine.gateway.router.features import BYTES_PER_TOKEN, features_of

#: What a failure means. `unsent`: the backend has not seen the request; `failed`: another backend may do better;
#: `lost`: the backend took it and is not heard of any more, so it may have done the work; `context`: the prompt is too
#: long for it; `policy`: it does not answer such content; `final`: the request itself is at fault.
Trouble = Literal["unsent", "failed", "lost", "context", "policy", "final"]

#: The backend's word that the fault is not the request's.
_PASSING = frozenset({408, 429})
#: The backend does not know the gateway's key, or nothing of this name: not the client's doing, except where the
#: client's own key is passed on, or the path or body names something that is kept there.
_WRONG_KEY = frozenset({401, 403})
_STATELESS = frozenset(
    {
        *(f"/v1/{name}" for name in ("chat/completions", "completions", "embeddings", "rerank", "score", "pooling")),
        *("/rerank", "/v2/rerank", "/score", "/pooling"),
    }
)
_TOO_LONG = frozenset({"context_length_exceeded"})
#: How servers without that code say it: vLLM and OpenAI, Anthropic, SGLang, llama.cpp.
_TOO_LONG_TEXTS = (
    "maximum context length",
    "prompt is too long",
    "longer than the model's context length",
    "exceeds the available context size",
)
_NOT_ANSWERED = frozenset({"content_policy_violation", "content_filter"})


def passes_on(status: int) -> bool:
    """Whether an answer of this status means that another backend may do better, whatever the request is."""
    return status >= 500 or status in _PASSING


def trouble_of(reply: Reply, exchange: Exchange, target: Target) -> Trouble:
    """What a backend's answer with an error status means."""
    status = reply.status
    if passes_on(status):
        return "failed"
    code, message = _said(reply.body or b"")
    if code in _NOT_ANSWERED:
        return "policy"
    if status in _WRONG_KEY and (target.backend.api_key is not None or exchange.principal is not None):
        return "failed"
    bridged = exchange.endpoint == RESPONSES and target.backend.protocol == "anthropic"
    if status == 404 and (exchange.endpoint in _STATELESS or refers_back(exchange) or bridged):
        return "failed"
    if status in (400, 413, 422) and (code in _TOO_LONG or any(text in message for text in _TOO_LONG_TEXTS)):
        return "context"
    return "final"


def _said(body: bytes) -> tuple[str, str]:
    """(code, message in lower case) of an error in OpenAI's shape; empty where it has none."""
    try:
        content: Any = orjson.loads(body)
    except orjson.JSONDecodeError:
        return "", ""
    error = content.get("error") if isinstance(content, dict) else None
    if not isinstance(error, dict):
        return "", ""
    return str(error.get("code") or ""), str(error.get("message") or "").lower()


def fitting(routes: Sequence[Route], exchange: Exchange) -> Sequence[Route]:
    """The routes with the fallbacks for long prompts put where they belong.

    They are left out where the prompt's bound shows that it fits, so that nothing is reserved at their price. Where by
    the router's estimate it cannot fit into any backend that was asked for, those are left out.

    Raises:
        ApiError: 400 for a field of a wrong type.
    """
    if not any(route.after == "context" for route in routes):
        return routes
    asked = bounds.asked(exchange)
    stated = (asked.completion or 0) * asked.answers
    least, most = len(exchange.payload) // BYTES_PER_TOKEN + stated, asked.prompt + stated
    windows = [target.context_window for route in routes if not route.after for target in route.targets]
    known = [window for window in windows if window is not None]
    if len(known) == len(windows):
        if most <= min(known):
            return [route for route in routes if route.after != "context"]
        if least > max(known) and features_of(exchange).at_once + stated > max(known):
            instead = [Route(route.targets, route.model, route.why) for route in routes if route.after == "context"]
            return [*instead, *(route for route in routes if route.after == "error")]
    return routes


@dataclass(frozen=True)
class Failure:
    """A backend's failure, as it goes back to the client: an answer, or an error of the gateway's own."""

    target: Target
    answer: Reply | ApiError


class Way:
    """One request's way from backend to backend.

    Args:
        routes: Where it may go.
        most_retries: Most times that it is sent again within a tier; None: until each backend was asked.
        retries: What sending again within a tier draws on.

    Attributes:
        failure: What goes back if nobody does better.
    """

    __slots__ = ("_asked", "_first_tier", "_left_out", "_most", "_now", "_resent", "_retries", "_routes", "failure")

    def __init__(self, routes: Sequence[Route], most_retries: int | None, retries: RetryBudget) -> None:
        self.failure: Failure | None = None
        self._routes = routes
        self._most = most_retries
        self._retries = retries
        self._now = routes
        if len(routes) > 1:
            # Nobody is left of those that were asked for where policies took them out: then whoever is there.
            self._now = [route for route in routes if route.after in ("", "error")] or routes
        self._asked: dict[str, int] = {}
        #: Tiers in which a backend has seen the request.
        self._resent: set[str] = set()
        self._left_out: list[Target] = []
        self._first_tier = ""

    @property
    def candidates(self) -> Sequence[Route]:
        """The routes that come into question, those that were tried included."""
        return self._now

    def next(self, exchange: Exchange, balancer: Balancer) -> tuple[Route, Target] | None:
        """The best route that has a backend which can serve now and may be asked; None: nobody is left."""
        while (choice := self._choose(exchange, balancer)) is not None:
            target = choice[1]
            tier = target.backend.tier
            before = self._asked.get(tier, 0)
            if before and not self._may_repeat(tier, before):
                self._leave_out(tier)
                continue
            self._asked[tier] = before + 1
            self._left_out.append(target)
            if not self._first_tier:
                self._first_tier = tier
            return choice
        return None

    def failed(self, failure: Failure, trouble: Trouble) -> bool:
        """Takes a failure down; returns whether it goes on."""
        tier = failure.target.backend.tier
        first = tier == self._first_tier
        if first or self.failure is None:
            self.failure = failure
        if trouble != "unsent":
            self._resent.add(tier)
        if not first:
            if trouble not in ("unsent", "failed"):
                self._leave_out(tier)
            if (
                trouble != "final"
                or not isinstance(self.failure.answer, ApiError)
                or isinstance(failure.answer, ApiError)
            ):
                return True
            # Of the first tier nobody has answered; what is wrong with the request says more than that.
            self.failure = failure
            return False
        if trouble == "context":
            self._now = self._after("context") or self._after("error") or self._below(tier)
        elif trouble == "policy":
            self._now = self._after("policy")
        elif trouble == "lost":
            self._leave_out(tier)
        return trouble != "final"

    def _choose(self, exchange: Exchange, balancer: Balancer) -> tuple[Route, Target] | None:
        for route in self._now:
            target = balancer.choose(route, exchange, self._left_out)
            if target is not None:
                return route, target
        return None

    def _may_repeat(self, tier: str, before: int) -> bool:
        if self._most is not None and before > self._most:
            return False
        return tier not in self._resent or self._retries.spend()

    def _leave_out(self, tier: str) -> None:
        self._left_out += of_tier(self._routes, tier)

    def _after(self, what: str) -> list[Route]:
        return [route for route in self._routes if route.after == what]

    def _below(self, tier: str) -> list[Route]:
        """The routes of other tiers alone: those that the router ranked below."""
        return [route for route in self._routes if all(target.backend.tier != tier for target in route.targets)]
