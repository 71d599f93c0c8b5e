"""How many requests and tokens one backend may be sent in a minute, as its provider allows.

Kept per process: several gateway workers share a limit in equal parts. A request is counted when it is sent, its
tokens when they are known, so the first answers of a minute may pass a limit on tokens; nothing is sent after that.
"""

import time
from collections import deque
from collections.abc import Callable

WINDOW_S = 60.0


class Pace:
    """The last minute of one backend; sliding, exact to the request.

    Args:
        requests: Most requests in any minute; None: any number.
        tokens: Tokens after which no request follows within the minute; None: any number.
        clock: Seconds, monotonic.
    """

    __slots__ = ("_clock", "_requests", "_sent", "_spent", "_tokens", "_total")

    def __init__(self, requests: int | None, tokens: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._requests = requests
        self._tokens = tokens
        self._clock = clock
        self._sent: deque[float] = deque()
        self._spent: deque[tuple[float, int]] = deque()
        self._total = 0

    def allows(self) -> bool:
        """Whether one more request may be sent now."""
        if self._requests is None and self._tokens is None:
            return True
        since = self._clock() - WINDOW_S
        if self._requests is not None:
            while self._sent and self._sent[0] <= since:
                self._sent.popleft()
            if len(self._sent) >= self._requests:
                return False
        if self._tokens is not None:
            while self._spent and self._spent[0][0] <= since:
                self._total -= self._spent.popleft()[1]
            return self._total < self._tokens
        return True

    def sent(self) -> None:
        """A request goes out."""
        if self._requests is not None:
            self._sent.append(self._clock())

    def used(self, tokens: int) -> None:
        """An answer has ended and took this many tokens, prompt and completion."""
        if self._tokens is not None and tokens:
            self._spent.append((self._clock(), tokens))
            self._total += tokens


def share(limit: int | None, workers: int) -> int | None:
    """One process's part of a limit: never none of it, so a limit below the number of processes is that number."""
    return None if limit is None else max(1, limit // workers)
