"""Money as whole numbers: micro-cents (10^-8 dollars), so that sums are exact and budgets are kept to the unit.

A price of one dollar per million tokens is 100 micro-cents per token; prices are kept per million tokens, so that a
thousandth of a cent per million is still a whole number.
"""

import math
from dataclasses import dataclass
from typing import Literal

from tokenmill.errors import InputError

MICRO_CENTS_PER_DOLLAR = 100_000_000
_MILLION = 1_000_000
#: Above this, 64-bit columns could overflow when sums are formed: ten million dollars.
MOST_DOLLARS = 10_000_000
#: For how long, at most, a backend may keep what it writes of a prompt into its cache: not at all, minutes, an hour.
Writes = Literal["none", "minutes", "hour"]


def micro_cents(dollars: float) -> int:
    """Dollars as micro-cents, rounded to the nearest.

    Raises:
        InputError: Not a number from 0 to `MOST_DOLLARS`.
    """
    if not math.isfinite(dollars) or not 0 <= dollars <= MOST_DOLLARS:
        raise InputError(f"{dollars} dollars is outside 0 to {MOST_DOLLARS}; give an amount within")
    return round(dollars * MICRO_CENTS_PER_DOLLAR)


def dollars(amount: int) -> float:
    """Micro-cents as dollars, for people and for JSON."""
    return amount / MICRO_CENTS_PER_DOLLAR


@dataclass(frozen=True)
class Prices:
    """What a backend's tokens cost, in micro-cents per million tokens.

    Attributes:
        prompt: Prompt tokens that were neither cached nor written into the cache.
        cached: Prompt tokens that were cached.
        completion: Generated tokens.
        written: Prompt tokens that were written into the cache; None: like `prompt`.
        written_hour: Those of them that are kept for an hour; None: like `written`.
    """

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    written: int | None = None
    written_hour: int | None = None

    @property
    def writing(self) -> tuple[int, int]:
        """(price of a token that is written into the cache, of one that is kept for an hour)."""
        written = self.prompt if self.written is None else self.written
        return written, written if self.written_hour is None else self.written_hour

    def cost(self, prompt: int, cached: int, completion: int, written: int = 0, written_hour: int = 0) -> int:
        """The cost of one request in micro-cents, rounded up; `prompt` contains `cached` and `written`.

        `written` contains `written_hour`.
        """
        fresh = prompt - cached - written
        amount = max(fresh, 0) * self.prompt + cached * self.cached + completion * self.completion
        if written:
            minutes, hour = self.writing
            amount += (written - written_hour) * minutes + written_hour * hour
        return -(-amount // _MILLION)

    def bound(self, prompt: int, completion: int, writes: Writes = "hour") -> int:
        """The most that a request of so many tokens can cost, in micro-cents."""
        dearest = max(self.prompt, self.cached)
        if writes != "none":
            minutes, hour = self.writing
            dearest = max(dearest, minutes, hour if writes == "hour" else 0)
        return -(-(prompt * dearest + completion * self.completion) // _MILLION)
