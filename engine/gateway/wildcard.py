"""Names with `*` in them that stand for others: `gpt-4*`, `openai/*`."""


class Wildcard:
    """A pattern in which each `*` stands for any text, also none; everything else stands for itself.

    Args:
        pattern: The pattern.
    """

    def __init__(self, pattern: str) -> None:
        first, *rest = pattern.split("*")
        self._first = first
        self._middle = rest[:-1]
        #: None: there is no `*`.
        self._last = rest[-1] if rest else None

    def matches(self, name: str) -> bool:
        """Whether the pattern stands for a name; takes no longer than the two are long, whatever they are."""
        if self._last is None:
            return name == self._first
        at, end = len(self._first), len(name) - len(self._last)
        if at > end or not name.startswith(self._first) or not name.endswith(self._last):
            return False
        for part in self._middle:
            found = name.find(part, at, end)
            if found < 0:
                return False
            at = found + len(part)
        return True
