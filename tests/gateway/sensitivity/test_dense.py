"""Texts full of candidates: what makes them quick loses nothing."""

import random
import re
from dataclasses import replace
from typing import Any

import pytest

from tokenmill.engine.gateway.sensitivity import scanner
from tokenmill.engine.gateway.sensitivity.kinds import KINDS, Kind, _aadhaar, _aadhaar_in_fours, _card, _card_in_fours
from tokenmill.engine.gateway.sensitivity.scanner import Scanner, compile_pattern

SWIFT = [kind for kind in KINDS if kind.swift]
#: Numbers that the patterns of several kinds match, and pieces of others.
NUMBERS = (
    "078-05-1120", "900-70-1234", "+1 212 555 0123", "212-555-0123", "(212) 555-0123", "+49 30 1234567",
    "07911 123456", "0151 23456789", "86095742719", "86 095 742 719", "943 476 5919", "44051401458",
    "4111 1111 1111 1111", "0049301234567", "3782 822463 10005", "4111111111111111", "2341 2341 2346", "192.168.1.17",
    "06 12 34 56 98", "01.23.45.67.89", "04-67-12-98-33", "090-1234-5678", "03-5857-7627", "03 12 25 33 41",
    "12", "123", "1234", "1", "999", "20 345",
)  # fmt: skip
BETWEEN = (" ", "  ", "-", ".", "/", "_", "\n", "\t", " - ", ", ", "x", "+", "\r\n", "", " (", ") ", "g")


def text(dice: random.Random) -> bytes:
    return "".join(dice.choice(NUMBERS) + dice.choice(BETWEEN) for _ in range(40)).encode()


@pytest.mark.parametrize("kind", SWIFT, ids=lambda kind: f"{kind.name}-{kind.hint}")
def test_both_engines_find_the_same_candidates(kind: Kind) -> None:
    dice, met = random.Random(kind.name), 0
    for pattern in kind.patterns:
        one, other = compile_pattern(pattern), replace(kind, not_behind=b"").swift_form(pattern)
        assert other is not None
        for _ in range(300):
            searched, place = text(dice), dice.choice((0, dice.randrange(60)))
            spans = [match.span() for match in one.finditer(searched, place)]
            assert spans == [match.span() for match in other.finditer(searched, place)]
            met += len(spans)
    assert met > 100


@pytest.mark.parametrize("kind", SWIFT, ids=lambda kind: f"{kind.name}-{kind.hint}")
def test_no_finding_begins_inside_of_what_is_passed_over(kind: Kind) -> None:
    dice, met = random.Random(kind.name), 0
    for pattern in filter(None, map(kind.swift_form, kind.patterns)):
        for _ in range(300):
            searched = text(dice)
            found = findings(kind, pattern, searched, lambda refused: refused)
            met += len(found)
            # Behind the first character of whatever is refused.
            every = findings(kind, pattern, searched, lambda _: None)
            assert found == (every if kind.name != "phone" else [one for one in every if not known(searched, one)])
    assert met > 20


@pytest.mark.parametrize("kind", [kind for kind in SWIFT if kind.not_behind], ids=lambda kind: kind.name)
def test_what_the_engine_passes_over_would_be_refused(kind: Kind) -> None:
    dice, fewer = random.Random(kind.name), 0
    all_of_them = replace(kind, not_behind=b"")
    for pattern in kind.patterns:
        some, every = kind.swift_form(pattern), all_of_them.swift_form(pattern)
        assert some is not None
        assert every is not None
        for _ in range(1000):
            searched = text(dice).replace(b" 212", b" +1 212").replace(b" 943", dice.choice((b" +44 943", b" +1-943")))
            found, candidates = [], []
            for form in (some, every):
                found.append(findings(kind, form, searched, lambda refused: refused))
                candidates.append(len(form.findall(searched)))
            assert found[0] == found[1]
            fewer += candidates[1] - candidates[0]
    assert fewer > 100


@pytest.mark.parametrize(("fits", "fit", "count"), [(_card, _card_in_fours, 4), (_aadhaar, _aadhaar_in_fours, 3)])
def test_groups_of_four_are_what_their_digits_are(fits: Any, fit: Any, count: int) -> None:
    dice, fitting = random.Random(count), 0
    for _ in range(20_000):
        groups = [dice.choice((2000 + dice.randrange(800), dice.randrange(10_000))) for _ in range(count + 1)]
        digits = "".join(f"{group:04d}" for group in groups[1:])
        assert fit(groups, 1) == fits(digits)
        fitting += fits(digits)
    assert fitting > 300


def known(searched: bytes, finding: tuple[int, int]) -> bool:
    """Whether a telephone number has the code of North America in front of it, with which it is found, too."""
    return re.search(rb"(?:\A|[^0-9+])\+1[ .-]\Z", searched[: finding[0]]) is not None


def findings(kind: Kind, pattern: re.Pattern[bytes], searched: bytes, go_on: Any) -> list[tuple[int, int]]:
    """What the check lets pass, the search going on where `go_on` says of what it answers."""
    found, place = [], 0
    while match := pattern.search(searched, place):
        start, end = match.span()
        answer = kind.check(searched, start, end)
        if isinstance(answer, tuple):
            found.append(answer)
            place = max(answer[1], start + 1)
        else:
            place = max(go_on(answer) or start + 1, start + 1)
    return found


def test_the_engine_changes_in_the_middle_of_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    dice = random.Random(5)
    texts = ["".join(dice.choice(NUMBERS) + dice.choice(BETWEEN) for _ in range(300)) for _ in range(30)]
    found = []
    for dense in (1, 2, 16, 10**9):
        monkeypatch.setattr(scanner, "_DENSE", dense)
        found.append([Scanner().find(one) for one in texts])
    assert found[0] == found[1] == found[2] == found[3]
    assert sum(map(len, found[0])) > 1000
