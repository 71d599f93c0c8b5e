"""What was seen of each backend lately: how long it takes to its first token, its queue included."""

from tokenmill.engine.gateway.pipeline import Exchange
from tokenmill.engine.gateway.portfolio import Target
from tokenmill.engine.gateway.router.groups import Group

#: Weight of the newest observation in the moving average.
NEWEST = 0.1


class Observed:
    """Moving averages of times to the first byte of streamed answers, by backend."""

    def __init__(self) -> None:
        self._first_token_s: dict[str, float] = {}

    def first_token_s(self, target: Target) -> float:
        """Expected seconds to the first token; 0 where none was seen yet."""
        return self._first_token_s.get(target.backend.name, 0.0)

    def soonest_s(self, group: Group) -> float:
        """That of the best of some backends; infinite where all are full."""
        return min(self.first_token_s(target) if target.has_room() else float("inf") for target in group.targets)

    def learn(self, exchange: Exchange) -> None:
        """Takes in a request that has ended; one that was escalated or not streamed says nothing."""
        if exchange.target is None or not exchange.first_chunk_at or exchange.attempts != 1:
            return
        name, seen = exchange.target.backend.name, exchange.first_chunk_at - exchange.started
        before = self._first_token_s.get(name)
        self._first_token_s[name] = seen if before is None else before + NEWEST * (seen - before)
