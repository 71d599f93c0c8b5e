"""Numbers in groups of four, as cards and others are printed, told from rows of a table."""

import re
from collections.abc import Callable

from tokenmill.engine.gateway.sensitivity.checks import DIGITS, SEPARATORS, Check, is_one_of, number

#: Groups of four, the same between all of them; as many as this are a row of a table.
_FOURS = re.compile(rb"[0-9]{4}([ ._/-]{1,4})[0-9]{4}(?:\1[0-9]{4})*(?![0-9])")
_ROW = 9
#: An identifier that has groups of four in its middle (RFC 9562).
_UUID = re.compile(rb"[0-9A-Fa-f]{8}-(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}(?![0-9A-Fa-f])")


#: The groups' values, what stands between them, where they end, and whether something may go on with the last of them.
_Row = tuple[list[int], bytes, int, bool]


class _Rows:
    """Rows of groups of four in the text that was looked at last: several kinds are looked for in the same rows."""

    def __init__(self) -> None:
        self._text = b""
        self._known: dict[int, _Row | None] = {}

    def at(self, text: bytes, first: int) -> _Row | None:
        """The row that begins there; None: none does."""
        if text is not self._text:
            self._text, self._known = text, {}
        elif first in self._known:
            return self._known[first]
        row = _FOURS.match(text, first)
        found = None
        if row is not None:
            shown, between = row.group(0, 1)
            end = first + len(shown)
            found = list(map(int, shown.split(between))), between, end, is_one_of(text, end, b" ._/-")
        self._known[first] = found
        return found


_ROWS = _Rows()


def in_fours(count: int, fits: Callable[[str], bool], fit: Callable[[list[int], int], bool]) -> Check:
    """A check for a number of this many groups of four, perhaps with three digits behind, among others of four.

    In a row of many, as tables have them, it is one where it begins the row or follows another one.

    Args:
        count: Groups in the number.
        fits: Looks at its digits.
        fit: The same for the values of groups, of which the number's begin at a place.
    """
    whole = number(fits)

    def check(text: bytes, start: int, end: int) -> tuple[int, int] | int | None:
        first = start if text[start] in DIGITS else start + 1
        row = _ROWS.at(text, first)
        if row is None or len(row[0]) < count:
            return whole(text, start, end)
        groups, between, end, goes_on = row
        last = len(groups) - count
        if not goes_on and not last and not fit(groups, 0):
            return end  # as mostly
        step = 4 + len(between)
        more = _more(text, end, between) if goes_on else ""
        for place in range(last + 1 if last + count < _ROW else 1):
            stop = first + (place + count) * step - len(between)
            if more and place == last and fits(_bare(text[first + place * step : stop]) + more):
                stop += len(between) + len(more)
            elif not fit(groups, place):
                continue
            if _in_table(text, first, between, len(groups), count, fits):
                break
            if between == b"-" and (uuid := _around(_UUID, text, first)) is not None:
                return uuid
            return first + place * step, stop
        # Its last group may begin something else.
        return end - 5 if goes_on else end

    return check


def _bare(shown: bytes) -> str:
    return shown.translate(None, SEPARATORS).decode("latin-1")


def _around(form: re.Pattern[bytes], text: bytes, place: int) -> int | None:
    """Where something ends that has this form and in which a place lies, not far from its beginning; None: nothing."""
    for found in form.finditer(text, max(place - 24, 0), place + 48):
        if found.start() <= place < found.end():
            return found.end()
    return None


def _more(text: bytes, place: int, between: bytes) -> str:
    """Three digits behind a row of groups, or nothing."""
    if not text.startswith(between, place):
        return ""
    more = text[place : place + len(between) + 4]
    three = more[len(between) : len(between) + 3]
    alone = len(three) == 3 and three.isdigit() and not more[len(between) + 3 :].isdigit()
    return three.decode("latin-1") if alone else ""


def _in_table(text: bytes, first: int, between: bytes, groups: int, count: int, fits: Callable[[str], bool]) -> bool:
    """Whether so many groups from `first` are in a long row, not at its beginning nor behind a number that fits."""
    step = 4 + len(between)
    before = 0
    while before < _ROW and _is_group(text, first - (before + 1) * step, between):
        before += 1
    if not before or before + groups < _ROW:
        return False
    former = _bare(text[max(first - count * step, 0) : first])
    return before < count or not fits(former)


def _is_group(text: bytes, start: int, between: bytes) -> bool:
    return start >= 0 and text[start : start + 4].isdigit() and text.startswith(between, start + 4)
