"""Disguises come off: what Unicode says about a character decides what it reads as."""

import sys
import unicodedata

import pytest

from tokenmill.engine.gateway.sensitivity.plain import plain, undisguised
from tokenmill.engine.gateway.sensitivity.scanner import Scanner

CARD = "4111111111111111"


@pytest.fixture(scope="module")
def scanner() -> Scanner:
    return Scanner(["credit_card", "email"])


def kinds(scanner: Scanner, text: str) -> set[str]:
    return {finding.kind for finding in scanner.find(text)}


def test_digits_of_every_script(scanner: Scanner) -> None:
    zeros = [chr(code) for code in range(0x80, sys.maxunicode) if unicodedata.decimal(chr(code), None) == 0]
    assert len(zeros) > 60
    for zero in zeros:
        shown = "".join(chr(ord(zero) + int(digit)) for digit in CARD)
        for text in (f"card {shown} ok", "card " + " ".join(shown[place : place + 4] for place in range(0, 16, 4))):
            assert kinds(scanner, text) == {"credit_card"}, f"U+{ord(zero):04X}"


@pytest.mark.parametrize("one, four", ["\u2460\u2463", "\u00b9\u2074", "\u2081\u2084", "\u2776\u2779"])
def test_digits_in_circles_and_above(one: str, four: str, scanner: Scanner) -> None:
    assert kinds(scanner, "card " + four + one * 15) == {"credit_card"}


def test_what_is_not_seen_or_parts_groups(scanner: Scanner) -> None:
    unseen = [chr(code) for code in range(1, sys.maxunicode) if unicodedata.category(chr(code)) in ("Cc", "Cf", "Mn")]
    separators = "\u115f\u3164\u00b7\u2022\u2028\u2029\u00a0\u2003\u3000\u2010\u2013\u2212"
    assert len(unseen) > 1500
    for between in [*unseen, *separators]:
        text = "card " + between.join(CARD[place : place + 4] for place in range(0, 16, 4)) + " ok"
        found = scanner.find(text)
        assert [one.kind for one in found] == ["credit_card"], f"U+{ord(between):04X}"
        assert text[found[0].start : found[0].end] == text[5:-3]


@pytest.mark.parametrize(
    "address",
    [
        "anna@m\u00fcnchen.de",
        "jan@\u0142\u00f3d\u017a.pl",
        "john.doe@\u0142\u00f3d\u017a.example.com",
        "\u0438\u0432\u0430\u043d@\u043f\u0440\u0438\u043c\u0435\u0440.\u0440\u0444",
        "ivan@\u043f\u0440\u0438\u043c\u0435\u0440.com",
        "\u7528\u6237@\u4f8b\u5b50.\u516c\u53f8",
        "taro@example\u3002com",
        "taro\uff20example\uff0ecom",
        "a@xn--e1afmkfd.xn--p1ai",
        '"john doe"@example.com',
    ],
)
def test_addresses_in_every_script(address: str, scanner: Scanner) -> None:
    for text in (address, f"write to {address} please", f"\u00fcber ({address}), ja?"):
        assert [text[one.start : one.end] for one in scanner.find(text)] == [address]


def test_named_references(scanner: Scanner) -> None:
    for text in (
        "john&commat;example.com",
        "john&commat;example&period;com",
        "a &amp;commat; john&amp;commat;example.com",
    ):
        assert kinds(scanner, text) == {"email"}
    assert undisguised("fish & chips; a&b; x=1&y=2") is None


def test_ordinary_texts_are_as_they_were() -> None:
    for text in ("plain\ttext\r\n", "Gr\u00f6\u00dfe", ""):
        assert plain(text) == (text.encode("latin-1"), None)
    assert plain("\u043f\u0440\u0438 x") == (b"??? x", None)
