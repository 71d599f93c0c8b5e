"""A circuit breaker for one backend and one model, and a budget that bounds retries.

The breaker is closed (requests pass) until `failures` in a row, then open (none pass) for a cooldown, then half-open:
one request is let through; its success closes the circuit, its failure opens it for twice as long. Failures of requests
that were under way when it opened change nothing: a backend that dies takes all of them with it. One breaker per
backend *and model*: a model that fails must not take its neighbours down.

Nor must a caller whose requests no backend can bear: where all failures in a row were answers to one key, the circuit
is open for that key alone. It is open for all as soon as another key's request fails, too, with none answered in
between, or the backend is not heard: a connection that fails or breaks, or silence, is taken for its own doing. Where
it is open for all, the next trial after one key's is another's, if one comes within a first cooldown.
"""

import time
from collections.abc import Callable

#: The cooldown doubles with each failed trial up to this many times its first length.
MAX_BACKOFF = 16


class Breaker:
    """One circuit.

    Args:
        failures: Failures in a row that open it.
        cooldown_s: How long it stays open the first time.
        clock: Seconds, monotonic.
    """

    __slots__ = (
        *("_clock", "_cooldown_s", "_failures", "_in_a_row"),
        *("_last", "_only", "_openings", "_trial_since", "_until"),
    )

    def __init__(self, failures: int, cooldown_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._failures = failures
        self._cooldown_s = cooldown_s
        self._clock = clock
        self._in_a_row = 0
        #: The key that all failures of the row were answers to; None: several, or they are nobody's.
        self._only: str | None = None
        #: The key of the last failure.
        self._last: str | None = None
        self._openings = 0
        self._until = 0.0
        self._trial_since: float | None = None

    @property
    def state(self) -> str:
        """`closed`, `open` or `half-open`, for all or for one key."""
        if not self._openings:
            return "closed"
        return "open" if self._clock() < self._until else "half-open"

    def wait_s(self, key: str | None = None) -> float:
        """Seconds until a request may pass; 0 when one may now.

        Args:
            key: Whose; None: nobody's in particular.
        """
        if not self._openings or self._only not in (None, key):
            return 0.0
        now, until = self._clock(), self._until
        if key is not None and key == self._last and self._only is None:
            until += self._cooldown_s
        if now < until:
            return until - now
        # A trial whose end was never reported (its client hung up) does not block the next one for ever.
        if self._trial_since is not None and now - self._trial_since < self._cooldown_s:
            return self._cooldown_s - (now - self._trial_since)
        return 0.0

    def begin(self, key: str | None = None) -> None:
        """A request is being sent, with this key."""
        if self._openings and self._only in (None, key):
            self._trial_since = self._clock()

    def succeeded(self) -> None:
        """A request was answered: the circuit closes."""
        self._in_a_row = 0
        if self._openings:
            self._openings = 0
            self._trial_since = None

    def failed(self, key: str | None = None) -> None:
        """A request failed for a reason that is the backend's.

        Args:
            key: Whose request was answered with the failure; None: it was not answered, or there are no keys.
        """
        if not self._in_a_row:
            self._only = key
        elif self._only is not None and self._only != key:
            self._only = None
            self._openings = 0  # the others have not waited yet: their first time is a short one
        self._last = key
        self._in_a_row += 1
        if self._openings and self._clock() < self._until:
            return  # it was under way when the circuit opened, and tells nothing new
        if self._openings or self._in_a_row >= self._failures:
            self._until = self._clock() + self._cooldown_s * min(2**self._openings, MAX_BACKOFF)
            self._openings += 1
            self._trial_since = None


class RetryBudget:
    """How many requests may be sent again: `ratio` per request made, saved up to `burst`.

    With every backend failing half of its requests, upstream load grows by at most `ratio`.
    """

    __slots__ = ("_burst", "_left", "_ratio")

    def __init__(self, ratio: float, burst: float = 10.0) -> None:
        self._ratio = ratio
        self._burst = burst
        self._left = burst

    def earn(self) -> None:
        """A new request was made."""
        self._left = min(self._left + self._ratio, self._burst)

    def spend(self) -> bool:
        """Whether a request may be sent again; if so, it is counted."""
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
