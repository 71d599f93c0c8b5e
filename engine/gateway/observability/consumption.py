"""What calls to backends used, by who asked and who answered.

A call is counted in one place; the metrics that are sums over teams or over backends are made of it when somebody asks.
Where requests are charged, tokens and cost are those charged: metrics and ledger agree, also on calls whose tokens
nobody counted.
Only the event loop counts; families may be taken in any thread meanwhile (a copy of a dictionary is one step of the
interpreter).
"""

from collections.abc import Callable, Iterable

import msgspec

from tokenmill.engine.gateway.money import MICRO_CENTS_PER_DOLLAR
from tokenmill.engine.gateway.observability.snapshot import Family, Values
from tokenmill.engine.gateway.observability.tally import Tally
from tokenmill.engine.gateway.pipeline import Exchange

#: Where `governance.reserve` notes what a request was charged, a `Spending`.
CHARGED = "reserve"

#: (team, app, tier, backend).
_Key = tuple[str, str, str, str]


class _Line:
    """The sums of one team's and app's calls to one backend; the cost in micro-cents."""

    __slots__ = ("cached", "calls", "completion", "cost", "prompt")

    def __init__(self) -> None:
        self.calls = self.prompt = self.cached = self.completion = self.cost = 0

    def add(self, prompt: int, cached: int, completion: int, cost: int) -> None:
        self.prompt += prompt
        self.cached += cached
        self.completion += completion
        self.cost += cost


class Consumption:
    """Counts calls."""

    def __init__(self) -> None:
        self._lines: dict[_Key, _Line] = {}

    def count(self, team: str, app: str, exchange: Exchange) -> None:
        """Counts the calls of a request that has ended, each at its own backend.

        Args:
            team, app: Who asked; bounded names.
            exchange: The request.
        """
        charged = exchange.notes.get(CHARGED)
        for call in exchange.calls:
            backend, usage = call.target.backend, call.usage
            line = self._line((team, app, backend.tier, backend.name))
            line.calls += call.sent
            if charged is None:
                prompt, cached, completion = usage.prompt, usage.cached, usage.completion
                cost = backend.prices.cost(prompt, cached, completion, usage.written, usage.written_hour)
                line.add(prompt, cached, completion, cost)
        if charged is not None:
            for part in (charged, *charged.others):
                line = self._line((team, app, part.tier, part.backend))
                line.add(part.prompt, part.cached, part.completion, part.cost)

    def _line(self, key: _Key) -> _Line:
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line()
        return line

    def families(self) -> list[Family]:
        """Calls and tokens by backend; tokens and cost by who asked. What never came up has no sample."""
        where, whose = ("tier", "backend"), ("team", "app", "tier")
        return [
            self._sums("tokenmill_tokens", "Tokens by kind.", (*where, "kind"), _tokens_by_backend),
            self._sums("tokenmill_account_tokens", "Tokens by who asked.", (*whose, "kind"), _tokens_by_account),
            msgspec.structs.replace(
                self._sums("tokenmill_cost_dollars", "What the tokens cost, by who asked.", whose, _cost),
                parts=MICRO_CENTS_PER_DOLLAR,
            ),
            self._sums(
                "tokenmill_upstream_requests", "Requests sent to backends, repeated ones included.", where, _calls
            ),
        ]

    def _sums(self, name: str, text: str, labels: Values, parts: "_Parts") -> Family:
        tally = Tally(name, text, labels)
        for key, line in list(self._lines.items()):
            for values, amount in parts(key, line):
                if amount:
                    tally.add(values, amount)
        return tally.family()


_Parts = Callable[[_Key, _Line], Iterable[tuple[Values, float]]]


def _tokens_by_backend(key: _Key, line: _Line) -> Iterable[tuple[Values, float]]:
    where = key[2:]
    yield (*where, "prompt"), line.prompt
    yield (*where, "cached"), line.cached
    yield (*where, "completion"), line.completion


def _tokens_by_account(key: _Key, line: _Line) -> Iterable[tuple[Values, float]]:
    whose = key[:3]
    yield (*whose, "prompt"), line.prompt
    yield (*whose, "completion"), line.completion


def _cost(key: _Key, line: _Line) -> Iterable[tuple[Values, float]]:
    yield key[:3], line.cost


def _calls(key: _Key, line: _Line) -> Iterable[tuple[Values, float]]:
    yield key[2:], line.calls
