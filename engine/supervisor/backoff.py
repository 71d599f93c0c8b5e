"""How long to wait before a process that died is started again."""

from dataclasses import dataclass


@dataclass
class Backoff:
    """1, 2, 4 ... seconds, at most `longest`; from the start again after a run of at least `calm` seconds.

    Attributes:
        first: The first wait, in seconds.
        longest: The longest wait, in seconds.
        calm: A run this long, in seconds, forgives the deaths before it.
        deaths: Deaths in a row so far.
    """

    first: float = 1.0
    longest: float = 30.0
    calm: float = 60.0
    deaths: int = 0

    def after(self, seconds_ready: float) -> float:
        """The wait after a run that was ready for so many seconds (0: never)."""
        self.deaths = 1 if seconds_ready >= self.calm else self.deaths + 1
        return min(self.longest, self.first * 2.0 ** min(self.deaths - 1, 16))
