"""Money as whole numbers: micro-cents (10^-8 dollars), so that sums are exact and budgets are kept to the unit.

A price of one dollar per million tokens is 100 micro-cents per token; prices are kept per million tokens, so that a
thousandth of a cent per million is still a whole number.
"""

import math
from dataclasses import dataclass

from tokenmill.errors import InputError

MICRO_CENTS_PER_DOLLAR = 100_000_000
_MILLION = 1_000_000
#: Above this, 64-bit columns could overflow when sums are formed: ten million dollars.
MOST_DOLLARS = 10_000_000


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
        prompt: Prompt tokens that were not cached.
        cached: Prompt tokens that were.
        completion: Generated tokens.
    """

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def cost(self, prompt: int, cached: int, completion: int) -> int:
        """The cost of one request in micro-cents, rounded up; `prompt` contains `cached`."""
        fresh = prompt - cached if prompt > cached else 0
        return -(-(fresh * self.prompt + cached * self.cached + completion * self.completion) // _MILLION)

    def bound(self, prompt: int, completion: int) -> int:
        """The most that a request of so many tokens can cost, in micro-cents."""
        return -(-(prompt * max(self.prompt, self.cached) + completion * self.completion) // _MILLION)
