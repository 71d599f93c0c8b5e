"""Times, and durations as people and LiteLLM write them: `30s`, `10m`, `1h`, `30d`, `2w`, `1mo` (of 30 days)."""

import re
from datetime import UTC, datetime

from tokenmill.errors import InputError

_UNITS_MS = {
    "s": 1_000,
    "m": 60_000,
    "h": 3_600_000,
    "d": 86_400_000,
    "w": 7 * 86_400_000,
    "mo": 30 * 86_400_000,
}
_PATTERN = re.compile(r"([1-9][0-9]{0,8})\s*(mo|s|m|h|d|w)")
#: A hundred years: times stay within what everybody can show.
_MOST_MS = 36_525 * 86_400_000


def milliseconds(text: str) -> int:
    """A duration in milliseconds.

    Raises:
        InputError: It is none, or longer than a hundred years.
    """
    found = _PATTERN.fullmatch(text.strip())
    if found is None:
        raise InputError(f"{text[:40]!r} is no duration; write a number and s, m, h, d, w or mo, e.g. 30d")
    length = int(found[1]) * _UNITS_MS[found[2]]
    if length > _MOST_MS:
        raise InputError(f"{text[:40]!r} is longer than a hundred years; give a shorter duration")
    return length


def moment(text: str, now: int) -> int:
    """A time to come, in ISO 8601, as milliseconds; one without an offset is UTC.

    Args:
        text: As it was written.
        now: The time now, in milliseconds.

    Raises:
        InputError: It is none, in the past, or more than a hundred years away.
    """
    try:
        said = datetime.fromisoformat(text.strip())
    except ValueError:
        raise InputError(f"{text[:40]!r} is no time; write it like 2030-12-31T23:59:59Z") from None
    at = round((said if said.tzinfo is not None else said.replace(tzinfo=UTC)).timestamp() * 1000)
    if at <= now:
        raise InputError(f"{text[:40]!r} is in the past; give a time to come")
    if at - now > _MOST_MS:
        raise InputError(f"{text[:40]!r} is more than a hundred years away; give an earlier time")
    return at


def shown(length_ms: int | None) -> str | None:
    """A duration in its largest whole unit."""
    if length_ms is None:
        return None
    for unit in ("d", "h", "m", "s"):
        if length_ms % _UNITS_MS[unit] == 0:
            return f"{length_ms // _UNITS_MS[unit]}{unit}"
    return f"{length_ms / 1000:g}s"
