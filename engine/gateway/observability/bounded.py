"""A bound on the number of different values of a metric's label."""

OTHER = "other"


class Bounded:
    """Lets the first `limit` names through and calls all later ones `other`, so that series cannot grow without end.

    A name keeps its series once it has one: counters must not change what they count.

    Args:
        limit: Most names.
    """

    __slots__ = ("_limit", "_names")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._names: set[str] = set()

    def name(self, name: str | None) -> str:
        """The label for a name; empty for none."""
        if name is None:
            return ""
        if name in self._names:
            return name
        if len(self._names) < self._limit:
            self._names.add(name)
            return name
        return OTHER
