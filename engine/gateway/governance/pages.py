"""The accounts that transactions work on, as they are in memory, and how long what is there may be trusted.

A process that writes alone would read what it wrote itself a moment before: its pages stay good until somebody else
has changed anything in the database, which the database says (`store.Connection.version`).
"""

from collections.abc import Iterable, Sequence
from typing import Any

from tokenmill.engine.gateway.database import Connection
from tokenmill.engine.gateway.governance.accounts import Account
from tokenmill.engine.gateway.governance.budgets import WINDOW_S, Refusal, Reservation

#: Accounts kept between transactions; beyond it all are forgotten.
MOST_KEPT = 10_000
#: Seconds that the clocks of two machines may differ by; what is further ahead was written by a clock that was wrong.
AHEAD_S = 2 * WINDOW_S
#: Milliseconds after which a request that is one too many at once may be tried again: nobody knows when one will end.
NEXT_MS = 1000


class Window:
    """Requests and tokens of one account by second, with sums of the last minute.

    What comes in the second of the last request is only added to the sums; what they have grown by is put down for that
    second when it is over, or when somebody wants to know.

    Args:
        rows: (second, requests, tokens).

    Attributes:
        since: The first second of the sums, a minute before that of the last `move`.
        requests, tokens: The sums.
    """

    __slots__ = ("_by_second", "_changed", "_dropped", "_last", "_noted", "requests", "since", "tokens")

    def __init__(self, rows: Iterable[Sequence[int]]) -> None:
        self._by_second: dict[int, list[int]] = {row[0]: [row[1], row[2]] for row in rows}
        self._changed: set[int] = set()
        self.since = self._dropped = -1
        self.requests = self.tokens = 0
        #: The second of the last request, among those that are kept and in the sums; -1: there is none.
        self._last = -1
        #: The sums of which everything is put down.
        self._noted = (0, 0)

    def move(self, second: int) -> None:
        """Has the sums cover the minute before `second` and what came since."""
        since, before = second - WINDOW_S, self.since
        if since == before:
            return
        self._note()
        self.since = since
        if before < since <= before + WINDOW_S:
            for at in range(before, since):
                pair = self._by_second.get(at)
                if pair is not None:
                    self.requests -= pair[0]
                    self.tokens -= pair[1]
        else:
            counted = [pair for at, pair in self._by_second.items() if at >= since]
            self.requests = sum(pair[0] for pair in counted)
            self.tokens = sum(pair[1] for pair in counted)
        self._noted = (self.requests, self.tokens)
        if self._last < since:
            self._last = -1

    def _note(self) -> None:
        """Puts down what has come in the second of the last request."""
        requests, tokens = self._noted
        if self.requests != requests or self.tokens != tokens:
            self._noted = (self.requests, self.tokens)
            self._count(self._last, self.requests - requests, self.tokens - tokens)

    def _count(self, second: int, requests: int, tokens: int) -> None:
        pair = self._by_second.setdefault(second, [0, 0])
        pair[0] += requests
        pair[1] += tokens
        self._changed.add(second)

    def oldest(self) -> int | None:
        """The first second that is counted."""
        self._note()
        return min((at for at in self._by_second if at >= self.since), default=None)

    def add(self, second: int, requests: int, tokens: int) -> None:
        """Counts; a second that has left the window already is not counted again."""
        if second == self._last:
            self.requests += requests
            self.tokens += tokens
            return
        self._note()
        if not requests and second not in self._by_second:
            return
        self._count(second, requests, tokens)
        if second >= self.since:
            self.requests += requests
            self.tokens += tokens
            self._noted = (self.requests, self.tokens)
            if requests:
                self._last = second

    def drop_outside(self, second: int, until: int) -> tuple[int | None, int | None]:
        """Forgets the seconds before one and those after another; returns (the last of those, the first of these).

        What is far ahead was counted by a clock that was set back since: it would count for as long as that was.
        """
        if second == self._dropped:
            return None, None
        self._note()
        self._dropped = second
        old = [at for at in self._by_second if at < second]
        ahead = [at for at in self._by_second if at > until]
        for at in old + ahead:
            pair = self._by_second.pop(at)
            if at >= self.since:
                self.requests -= pair[0]
                self.tokens -= pair[1]
        self._noted = (self.requests, self.tokens)
        self._changed.difference_update(old, ahead)
        if not second <= self._last <= until:
            self._last = -1
        return max(old, default=None), min(ahead, default=None)

    def changed(self) -> list[tuple[int, int, int]]:
        """(second, requests, tokens) of what was counted since the last call."""
        self._note()
        changed = [(at, self._by_second[at][0], self._by_second[at][1]) for at in self._changed]
        self._changed.clear()
        return changed


class Page:
    """One account as it is being worked on.

    Call `renew` outside of `period_start` to `ends`.

    Attributes:
        account: As it was read; its sums are those of then.
        revoked: It is a key that is not good any more.
        limits: Of the account.
        ends: When its period does, in milliseconds; None: it has none.
        window: None: no limit needs one.
    """

    __slots__ = (
        "account",
        "ends",
        "limits",
        "period_start",
        "reserved",
        "revoked",
        "soft_reached_at",
        "spent",
        "under_way",
        "window",
    )

    def __init__(self, account: Account, revoked: bool, window: Window | None) -> None:
        self.account = account
        self.limits = account.limits
        self.revoked = revoked
        self.window = window
        self.period_start = account.period_start
        self.ends = account.period_end
        self.spent = account.spent
        self.reserved = account.reserved
        self.soft_reached_at = account.soft_reached_at
        self.under_way = account.under_way

    def renew(self, now: int) -> None:
        """Begins a new period with nothing spent; call it when the old one is over.

        What requests under way have reserved stays reserved, and is spent in the period in which they end. One that is
        far ahead was begun by a clock that was set back since: it begins now, with what was spent.
        """
        length = self.limits.period_ms
        if length is not None and now < self.period_start:
            if self.period_start - now > AHEAD_S * 1000:
                self.period_start = now
                self.ends = now + length
        elif length is not None:
            self.period_start += (now - self.period_start) // length * length
            self.ends = self.period_start + length
            self.spent = 0
            self.soft_reached_at = None

    def refusal(self, wanted: Reservation, second: int, asked: int) -> Refusal | None:
        """Why the account's limits refuse a request of so many tokens in this second; None when they do not."""
        limits, window = self.limits, self.window
        most = limits.hard_limit
        if most is not None and self.spent + self.reserved + wanted.amount > most:
            end = None if self.ends is None else self.ends - wanted.at
            return Refusal("budget", self.account, most, self.spent + self.reserved, wanted.amount, end)
        most = limits.requests_at_once
        if most is not None and self.under_way >= most:
            return Refusal("at once", self.account, most, self.under_way, 1, NEXT_MS if most else None)
        if window is None:
            return None
        if window.since != second - WINDOW_S:
            window.move(second)
        most = limits.requests_per_minute
        if most is not None and window.requests + 1 > most:
            return Refusal("requests", self.account, most, window.requests, 1, _wait(window, wanted.at))
        most = limits.tokens_per_minute
        if most is not None and window.tokens + asked > most:
            wait = _wait(window, wanted.at) if asked <= most else None
            return Refusal("tokens", self.account, most, window.tokens, asked, wait)
        return None


def _wait(window: Window, at: int) -> int:
    """Milliseconds until the oldest second is outside of the window, all of it."""
    oldest = window.oldest()
    return WINDOW_S * 1000 if oldest is None else (oldest + WINDOW_S + 1) * 1000 - at


class Kept:
    """What one process knows between its transactions.

    Attributes:
        pages: Accounts by id.
        reservations: Rows that this process has written and not removed, by call.
        chains: What reservations say of a chain, by its accounts.
    """

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self.reservations: dict[str, tuple[Any, ...]] = {}
        self.chains: dict[tuple[str, ...], str] = {}
        self._good_for: object = None

    def check(self, connection: Connection) -> None:
        """Forgets everything unless it is what the database holds; call it at the begin of a transaction."""
        version = connection.version()
        if version is None or version != self._good_for or len(self.pages) > MOST_KEPT:
            self.pages.clear()
            self.reservations.clear()
            self.chains.clear()
        # Until the transaction has written everything.
        self._good_for = None

    def written(self, connection: Connection) -> None:
        """The transaction has written what is here; should it be rolled back, the version says so."""
        self._good_for = connection.version()
