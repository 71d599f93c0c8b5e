"""The fast path: what it finds, what it leaves alone, and that it finds the same whatever stands around it."""

import random
from collections import Counter

import pytest

from tests.gateway.sensitivity.generator import MAKERS, prose, text_with
from tokenmill.engine.gateway.sensitivity.kinds import CLASS_OF, KINDS
from tokenmill.engine.gateway.sensitivity.scanner import OVERLAP, STRIDE, Scanner, undisguised

#: Generated values of each kind.
COUNT = 300


@pytest.fixture(scope="module")
def scanner() -> Scanner:
    return Scanner()


@pytest.mark.parametrize("kind", MAKERS)
def test_finds_every_generated_value(kind: str, scanner: Scanner) -> None:
    dice = random.Random(kind)
    missed = []
    for _ in range(COUNT):
        value = MAKERS[kind](dice)
        text = text_with(dice, value)
        found = {finding.kind for finding in scanner.find(text)}
        if kind not in found:
            missed.append((value, found))
    assert not missed, f"{len(missed)} of {COUNT} missed: {missed[:3]}"


def test_every_kind_is_generated() -> None:
    assert {kind.name for kind in KINDS} - set(MAKERS) == {"private_key"}
    assert set(CLASS_OF) - {kind.name for kind in KINDS} == {"name", "location"}


ORDINARY = [
    "The meeting is at 12:30:45 on 2025-11-24 in room 204; version 1.2.3 is due.",
    "std::vector<int> a::b; int x = 1234567; float pi = 3.14159265358979;",
    "ORDER 123456 of 2024-01-02 costs 1,234.56 EUR for 40 chairs",
    "The numbers 100000 200000 300000 400000 500000 grow.",
    "password = get_password()  # token: str",
    "uuid 123e4567-e89b-12d3-a456-426614174000 and sha 9f86d081884c7d659a2feaa0c55ad015",
    "ISBN 978-3-16-148410-0, DOI 10.1000/182, RFC 2616, ISO 8601",
    "@app.route('/a') def f(): return a @ b",
    "Population 83200000, area 357022, GDP 4456081000000",
    "Unter 01.02.2024 12:30 und unter 500 000 Euro, Aufruf 0815, Kundennummer 0123456789",
    "The bearer of this letter has basic understanding; Basic Attention Tokens; bearer responsibilities",
    "fish & chips; a=1&b=22&copy=3; caf\u00e9 \u00ab10 \u2022 20 \u2022 30\u00bb",
    "127.0.0.1 and ::1 and 0.0.0.0 are at home",
    "She was born in Paris. The passport office opens at 9.",
    "4111 1111 1111 1112 and GB29 NWBK 6016 1331 9268 18 and 000-12-3456 have wrong check digits",
]


@pytest.mark.parametrize("text", ORDINARY)
def test_leaves_ordinary_text_alone(text: str, scanner: Scanner) -> None:
    assert scanner.find(text) == []


@pytest.mark.parametrize("begin", [0, 1, STRIDE - 30, STRIDE - 3, STRIDE, STRIDE + OVERLAP - 10, 3 * STRIDE - 7])
@pytest.mark.parametrize("kind", ["credit_card", "iban", "email", "us_ssn", "date_of_birth", "passport"])
def test_finds_it_wherever_windows_meet(kind: str, begin: int, scanner: Scanner) -> None:
    dice = random.Random(begin)
    value = MAKERS[kind](dice)
    front = (prose(dice, 4000) + " ")[-begin:] if begin else ""
    text = front[:-1] + " " * bool(front) + value + " " + prose(dice, 2000)
    found = [finding for finding in scanner.find(text) if finding.kind == kind]
    assert found
    for finding in found:
        assert text[finding.start : finding.end] in value


def test_a_long_token_is_found_whole(scanner: Scanner) -> None:
    token = "eyJ" + "a1" * 700 + ".eyJ" + "b2" * 900 + "." + "c3" * 30
    for gap in (0, 100, STRIDE - 20):
        text = "x " * (gap // 2) + token + " end"
        assert any(text[found.start : found.end] == token for found in scanner.find(text))


@pytest.mark.parametrize(
    "text",
    [
        "４１１１ １１１１ １１１１ １１１１",
        "4111\u200b1111\u200b1111\u200b1111",
        "4111\u20131111\u20131111\u20131111",
        "4111\u00a01111\u00a01111\u00a01111",
        "٤١١١ ١١١١ ١١١١ ١١١١",
        "größe: 4111 1111 1111 1111 für Jürgen",
        r"4111\u00201111\u00201111\u00201111",
        "4111%201111%201111%201111",
        "4111&#32;1111&#x20;1111&#32;1111",
        r"{\"a\": \"{\\\"b\\\": \\\"\\u0034111 1111 1111 1111\\\"}\"}",
    ],
)
def test_sees_through_disguises(text: str, scanner: Scanner) -> None:
    assert "credit_card" in {finding.kind for finding in scanner.find(text)}


def test_unicode_places_are_the_texts_own(scanner: Scanner) -> None:
    text = "naïve \u200b 😀 bob@example.com and 41\u200b11 1111 1111 1111 é"
    shown = {text[found.start : found.end] for found in scanner.find(text)}
    assert shown == {"bob@example.com", "41\u200b11 1111 1111 1111"}


def test_a_seen_text_is_not_searched_again() -> None:
    scanner = Scanner(max_entries=8)
    text = prose(random.Random(1), 3000) + " bob@example.com"
    first = scanner.find(text)
    searched: Counter[str] = Counter()
    original = scanner._search

    def counting(window: str, before: bool, after: bool):  # type: ignore[no-untyped-def]
        searched[window] += 1
        return original(window, before, after)

    scanner._search = counting  # type: ignore[method-assign]
    assert scanner.find(text) == first
    assert not searched
    assert scanner.find(text + " and anna@example.com")[-1].kind == "email"
    assert sum(searched.values()) == 1
    for number in range(50):
        scanner.find(str(number) * 20)
    assert len(scanner._seen) == 8


def test_undisguised_ends() -> None:
    assert undisguised("nothing here") is None
    assert undisguised(r"C:\temp") == "C:\temp"
    assert undisguised("100% of \\ &# it") is None
    assert undisguised("%ud800 \\ud800") == "%ud800 ?"


def test_only_what_is_wanted_is_looked_for() -> None:
    scanner = Scanner(["iban"], {"employee": "E-[0-9]{6}"})
    text = "bob@example.com 4111 1111 1111 1111 DE89 3704 0044 0532 0130 00 E-123456"
    assert [finding.kind for finding in scanner.find(text)] == ["iban", "employee"]
    assert Scanner([]).find(text) == []
