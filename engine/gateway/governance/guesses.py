"""Credentials that nobody has: a line in the log now and then, and an end to guessing a master key that is short.

A long master key takes longer to guess than there is time. A short one (`guessable_master_key`) is found within seconds
where nothing slows the guesses down; so, after a few unknown keys within a minute, this process takes no key for the
master key until the minute is over. Keys that are known go on meanwhile.
"""

import logging
import time
from collections.abc import Callable

from tokenmill.engine.gateway.api_error import ApiError, retry_after
from tokenmill.engine.gateway.governance.options import Options
from tokenmill.engine.gateway.seldom import Seldom

log = logging.getLogger("tokenmill.gateway.governance")

#: Unknown keys within a minute that a short master key is compared with, in each process.
MOST_GUESSES = 10
_MINUTE_S = 60.0


class Guesses:
    """The unknown keys that this process has seen.

    Args:
        options: Say what the master key is.
        clock: Seconds, monotonic.
    """

    def __init__(self, options: Options, clock: Callable[[], float] = time.monotonic) -> None:
        self._options = options
        self._clock = clock
        self._unknown = Seldom(clock=clock)
        self._minute_ends = float("-inf")
        self._count = 0

    def is_master(self, key_digest: str) -> bool:
        """Whether a digest is the master key's, unless too many were tried."""
        if self._count >= MOST_GUESSES and self._wait_s():
            return False
        return self._options.is_master(key_digest)

    def refused(self) -> ApiError | None:
        """Counts a key that nobody has; the answer where it may have been the master key and was not compared: 429."""
        if count := self._unknown.due():
            log.warning("refused %d requests with a key that is not known here", count)
        if not self._options.guessable:
            return None
        if wait_s := self._wait_s():
            message = "Too many unknown API keys; try again when Retry-After says."
            return ApiError(429, message, code="too_many_unknown_keys", headers=[retry_after(wait_s + 0.5)])
        now = self._clock()
        if now >= self._minute_ends:
            self._minute_ends, self._count = now + _MINUTE_S, 0
        self._count += 1
        if self._count == MOST_GUESSES:
            log.warning(
                "%d unknown keys within a minute: the master key, which is short enough to be guessed, is not taken "
                "for %.0f s; set one of 16 characters or more",
                MOST_GUESSES,
                self._minute_ends - now,
            )
        return None

    def _wait_s(self) -> float:
        """Seconds until keys are compared with the master key again; 0: they are."""
        return max(self._minute_ends - self._clock(), 0.0) if self._count >= MOST_GUESSES else 0.0
