"""What a client is told where a limit refused its request, and what it has left where none did."""

import pytest

from tokenmill.engine.gateway.governance.accounts import Account, Limits
from tokenmill.engine.gateway.governance.budgets import Granted, Rate, Refusal
from tokenmill.engine.gateway.governance.reserve import _headers, refusal

TEAM = Account("search", "team", None, "Search", Limits(), 0, 0, 0, None)
#: As many micro-cents.
CENT = 1_000_000


@pytest.mark.parametrize(
    ("refused", "status", "code", "says", "headers"),
    [
        (
            Refusal("requests", TEAM, 3, 3, 1, 1200), 429, "rate_limit_exceeded",
            "The team `search` is limited to 3 requests per minute; 3 were used",
            {"retry-after": "2", "limit-requests": "3", "remaining-requests": "0", "reset-requests": "1.2s"},
        ),
        (
            Refusal("tokens", TEAM, 100, 60, 50, 30_000), 429, "rate_limit_exceeded",
            "60 were used or reserved in the last minute, this request may use 50.",
            {"retry-after": "30", "limit-tokens": "100", "remaining-tokens": "40", "reset-tokens": "30s"},
        ),
        (
            Refusal("tokens", TEAM, 100, 130, 101, None), 429, "rate_limit_exceeded",
            "It never fits: shorten it, or state a smaller `max_tokens`.",
            {"x-should-retry": "false", "limit-tokens": "100", "remaining-tokens": "0", "reset-tokens": "61s"},
        ),
        # What fits into a whole budget may come again when the next one begins.
        (
            Refusal("budget", TEAM, 100 * CENT, 99 * CENT, 100 * CENT, 60_000), 429, "insufficient_quota",
            "The budget of the team `search` is $1; $0.99 are spent or reserved, this request may cost $1. It begins "
            "anew when `Retry-After` says.",
            {"retry-after": "60"},
        ),
        (
            Refusal("budget", TEAM, 100 * CENT, 99 * CENT, 2 * CENT, 60_001), 429, "insufficient_quota",
            "It begins anew when `Retry-After` says.", {"retry-after": "61", "x-should-retry": "false"},
        ),
        (
            Refusal("budget", TEAM, 100 * CENT, 99 * CENT, 101 * CENT, 5000), 429, "insufficient_quota",
            "State a smaller `max_tokens`, or ask for a larger budget.", {"x-should-retry": "false"},
        ),
        (
            Refusal("budget", TEAM, 100 * CENT, 99 * CENT, 2 * CENT, None), 429, "insufficient_quota",
            "State a smaller `max_tokens`, or ask for a larger budget.", {"x-should-retry": "false"},
        ),
        (
            Refusal("revoked", TEAM, 0, 0, 0, None), 401, "invalid_api_key", "search was revoked.",
            {"www-authenticate": "Bearer"},
        ),
    ],
)  # fmt: skip
def test_a_refusal_says_why_and_when_to_come_back(
    refused: Refusal, status: int, code: str, says: str, headers: dict[str, str]
) -> None:
    error = refusal(refused)
    assert (error.status, error.code) == (status, code)
    assert says in error.message
    shown = {name.decode().removeprefix("x-ratelimit-"): value.decode() for name, value in error.headers}
    assert shown == headers


def test_what_is_left_is_told_with_what_was_spent() -> None:
    granted = Granted(5 * CENT, Rate(3, 2), Rate(100, -1))
    told = {name.decode(): value.decode() for name, value in _headers(granted, 7)}
    assert told == {
        "x-ratelimit-limit-requests": "3", "x-ratelimit-remaining-requests": "2", "x-ratelimit-reset-requests": "61s",
        "x-ratelimit-limit-tokens": "100", "x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "61s",
        "x-tokenmill-cost": "0.00000007", "x-tokenmill-key-spend": "0.05000007",
    }  # fmt: skip
    assert _headers(Granted(123 * CENT, None, None), None) == [(b"x-tokenmill-key-spend", b"1.23000000")]
