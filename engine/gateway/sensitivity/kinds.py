"""The kinds of personal and secret data that are recognised by their form, and how each is told from its look-alikes.

A kind has patterns for RE2 (linear in the text, so no prompt can stall the gateway) and a check that looks at what a
pattern found: check digits, ranges, boundaries. Patterns see text whose characters are one byte each (`scanner`), with
fancy digits, dashes and spaces already made plain.
"""

import functools
import ipaddress
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from tokenmill.engine.gateway.sensitivity import checksums

#: What the data is about; policies may name a class instead of a kind.
DataClass = Literal["contact", "financial", "government", "person", "secret"]
#: (text, start, end) of a candidate to (start, end) of the finding in it, or None.
Check = Callable[[bytes, int, int], tuple[int, int] | None]

#: Between the digits of a number as people write it.
_SEPARATOR = rb"[ \t\r\n._/-]{1,2}"
_START = rb"(?:\A|[^0-9])"
_END = rb"(?:\z|[^0-9])"
_WORD_START = rb"(?:\A|[^0-9A-Za-z])"
_MONTH = rb"(?:jan|feb|mar|m.r|apr|ma[yi]|jun|jul|aug|sep|o[ck]t|nov|de[cz])[a-z]{0,6}"
#: Letters beyond ASCII in Latin-1; the last one stands for those of other scripts, too (`plain`).
_LETTER = rb"\xaa\xb5\xba\xc0-\xd6\xd8-\xf6\xf8-\xff"
_DATE = re.compile(
    rb"(?:[0-9]{1,4}[./-][0-9]{1,2}[./-][0-9]{1,4}|[0-9]{1,2}[. ]{0,2}"
    + _MONTH
    + rb"[ .,]{1,2}[0-9]{4}|"
    + _MONTH
    + rb"[ .]{1,2}[0-9]{1,2}(?:st|nd|rd|th)?,? [0-9]{4})\Z",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Kind:
    """One kind of data.

    Attributes:
        name: As policies, audit and metrics call it.
        group: Its class.
        hint: The cheap pattern without which none of it is looked for (`scanner.HINTS`).
        patterns: RE2 patterns of candidates.
        check: Narrows a candidate to the finding or refuses it.
        redactable: A placeholder can stand for all of it.
    """

    name: str
    group: DataClass
    hint: str
    patterns: tuple[bytes, ...]
    check: Check
    redactable: bool = True


def _is(text: bytes, place: int, characters: bytes) -> bool:
    return 0 <= place < len(text) and text[place] in characters


_DIGITS = b"0123456789"
_ALNUM = _DIGITS + b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@functools.cache
def _runs(alphabet: bytes) -> re.Pattern[bytes]:
    return re.compile(b"[" + alphabet + b"]+")


def _prefixes(text: bytes, start: int, end: int, alphabet: bytes) -> Iterator[tuple[str, int]]:
    """(bare characters, end) of every beginning of a candidate that ends where a group of characters ends."""
    bare = ""
    for run in _runs(alphabet).finditer(text, start, end):
        bare += run[0].decode("ascii")
        if not _is(text, run.end(), alphabet):
            yield bare, run.end()


def numbers(lengths: range, fits: Callable[[str], bool], alphabet: bytes = _DIGITS, *, neat: bool = False) -> Check:
    """A check for a number of these lengths, separators not counted, that `fits`; the longest one that does.

    Args:
        lengths: How many characters it may have.
        fits: Looks at the bare characters.
        alphabet: What counts as a character.
        neat: It is written in one piece or in groups as on a card: two neighbours in a table are not one number.
    """

    runs = _runs(alphabet)

    def check(text: bytes, start: int, end: int) -> tuple[int, int] | None:
        while start < end and text[start] not in alphabet:
            start += 1
        if neat and text[max(start - 2, 0) : start] == b"0.":
            return None  # a fraction
        end = min(end, start + 3 * lengths.stop)
        groups = runs.findall(text, start, end)
        if groups and _is(text, end, alphabet) and _is(text, end - 1, alphabet):
            groups.pop()  # it goes on
        bare = b"".join(groups).decode("ascii")
        while groups:
            if len(bare) in lengths and (not neat or _neat([len(group) for group in groups])) and fits(bare):
                *_, last = itertools.islice(runs.finditer(text, start, end), len(groups))
                return start, last.end()
            bare = bare[: -len(groups.pop())]
        return None

    return check


def _neat(groups: list[int]) -> bool:
    return len(groups) == 1 or max(groups) <= 4 or groups in ([4, 6, 5], [4, 6, 4])


#: Lengths of card numbers by how they begin.
_CARD_LENGTHS = {
    "2": (16,), "30": range(14, 20), "34": (15,), "35": range(16, 20), "36": range(14, 20), "37": (15,),
    "38": range(14, 20), "39": range(14, 20), "4": (13, 16, 19), "5": (16,), "6": range(13, 20),
}  # fmt: skip


def _card(digits: str) -> bool:
    lengths = _CARD_LENGTHS.get(digits[:1]) or _CARD_LENGTHS.get(digits[:2], ())
    return len(digits) in lengths and checksums.luhn(digits)


def _iban(text: bytes, start: int, end: int) -> tuple[int, int] | None:
    while text[start] not in _ALNUM:
        start += 1
    length = checksums.IBAN_LENGTHS.get(text[start : start + 2].decode("latin-1").upper())
    groups: list[int] = []
    for bare, stop in _prefixes(text, start, end, _ALNUM) if length else ():
        groups.append(len(bare) - sum(groups))
        if len(bare) == length:
            # In one piece or in fours, the country and the check digits perhaps apart: words are not in fours.
            inner = groups[2 if groups[:2] == [2, 2] else 0 : -1]
            return (start, stop) if set(inner) <= {4} and checksums.iban(bare) else None
    return None


def last_token(alphabet: bytes, fits: Callable[[bytes], bool]) -> Check:
    """A check for a value behind a word that announces it: the candidate's last run of `alphabet`."""

    def check(text: bytes, start: int, end: int) -> tuple[int, int] | None:
        first = end
        while first > start and text[first - 1] in alphabet:
            first -= 1
        return (first, end) if not _is(text, end, alphabet) and fits(text[first:end]) else None

    return check


def _last_digits(count: int, fits: Callable[[str], bool]) -> Check:
    """The same for a number whose digits may be in groups."""

    def check(text: bytes, start: int, end: int) -> tuple[int, int] | None:
        bare, first = b"", end
        while first > start and len(bare) < count:
            first -= 1
            if text[first] in _DIGITS:
                bare = text[first : first + 1] + bare
        whole = not _is(text, end, _DIGITS) and not _is(text, first - 1, _DIGITS)
        return (first, end) if len(bare) == count and whole and fits(bare.decode("ascii")) else None

    return check


def _email(text: bytes, start: int, end: int) -> tuple[int, int] | None:
    while text[start] in b".'-%+?":
        start += 1
    return start, end


def _phone(text: bytes, start: int, end: int) -> tuple[int, int] | None:
    while text[start] not in b"+(0123456789":
        start += 1
    found = None
    for bare, stop in _prefixes(text, start, end, _DIGITS):
        if 7 <= len(bare) <= 15:
            found = start, stop
    return found


def _announced_phone(text: bytes, start: int, end: int) -> tuple[int, int] | None:
    while text[start] not in b"+(0123456789":
        start += 1
    return _phone(text, start, end)


def _address(text: bytes, start: int, end: int) -> tuple[int, int] | None:
    while text[start] not in b":0123456789ABCDEFabcdef":
        start += 1
    if _is(text, end, _ALNUM + b":") or (_is(text, end, b".") and _is(text, end + 1, _DIGITS)):
        return None
    shown = text[start:end].decode("ascii")
    if not any(character.isdigit() for character in shown):
        return None  # `fe::ed` is a name in a program
    try:
        address = ipaddress.ip_address(shown)
    except ValueError:
        return None
    return None if address.is_loopback or address.is_unspecified or address.is_multicast else (start, end)


def _whole_word(text: bytes, start: int, end: int) -> tuple[int, int] | None:
    while text[start] not in _ALNUM + b"-":
        start += 1
    return start, end


def _birth(text: bytes, start: int, end: int) -> tuple[int, int] | None:
    found = _DATE.search(text[start:end])
    return (start + found.start(), end) if found and not _is(text, end, _DIGITS) else None


def _mrz(text: bytes, start: int, end: int) -> tuple[int, int] | None:
    while text[start] not in _ALNUM:
        start += 1
    zone = text[start:end].decode("ascii")
    fits = checksums.mrz_field(zone[:9], zone[9]) and checksums.mrz_field(zone[13:19], zone[19])
    return (start, end) if fits and checksums.mrz_field(zone[21:27], zone[27]) else None


def _mixed(value: bytes) -> bool:
    return any(character in _DIGITS for character in value) and any(character in _ALNUM[10:] for character in value)


def _passport_number(value: bytes) -> bool:
    return 6 <= len(value) <= 9 and sum(character in _DIGITS for character in value) >= 4


#: Hints; see `scanner.HINTS`.
_AT, _NUMBER, _GROUPS, _DOTS, _COLONS = "at", "number", "groups", "dots", "colons"
_WORD, _KEY, _ANNOUNCED = "word", "key", "announced"


def _announced(words: bytes, value: bytes, gap: int = 30) -> bytes:
    return rb"(?i)(?:" + words + rb")[^0-9\n]{0,%d}" % gap + value


KINDS: tuple[Kind, ...] = (
    Kind(
        "email", "contact", _AT,
        (
            rb"(?:[0-9A-Za-z._%+'?\x80-\xff-]{1,64}|\"[^\"@\r\n]{1,64}\")@"
            rb"(?:[0-9A-Za-z\x80-\xff-]{1,63}\.){1,8}(?:xn--[0-9A-Za-z-]{2,59}|[A-Za-z" + _LETTER + rb"]{2,24})",
        ),
        _email,
    ),
    Kind(
        "phone", "contact", _NUMBER,
        (
            rb"\+[1-9](?:[ \t().\n/-]{0,3}[0-9]){6,14}",
            _START + rb"00[1-9](?:[ \t().\n/-]{0,3}[0-9]){7,14}",
            _START + rb"\(?[2-9][0-9]{2}\)?[ .\n-]{1,2}[2-9][0-9]{2}[ .\n-]{1,2}[0-9]{4}",
            # Mobile numbers of Germany and of the United Kingdom as they are written at home.
            _START + rb"\(?01[567][0-9]{1,2}\)?[ ./-]{1,3}[0-9](?:[ -]?[0-9]){5,7}" + _END,
            _START + rb"\(?07[1-9][0-9]{2}\)?[ -](?:[0-9]{6}|[0-9]{3}[ -][0-9]{3})" + _END,
        ),
        _phone,
    ),
    Kind(
        "phone", "contact", _ANNOUNCED,
        (
            rb"(?i)(?:phone|tel|mobile|mobil|cell|fax|call|dial|telefon|handy|whatsapp|sms)[^0-9+(\n]{0,20}"
            rb"[0-9(](?:[ ()./\n-]{0,2}[0-9]){6,14}",
            # Words that announce other numbers, too: only what begins as a number of another place, and no date.
            rb"(?i)\b(?:unter|ruf|anruf|erreich)[^0-9+(\n]{0,25}\(?0[1-9][0-9]{1,4}(?:[ ()./\n-]{0,2}[0-9]){4,10}",
        ),
        _announced_phone,
    ),
    Kind("ip_address", "contact", _DOTS, (rb"(?:\A|[^0-9.])[0-9]{1,3}(?:\.[0-9]{1,3}){3}",), _address),
    Kind(
        "ip_address", "contact", _COLONS,
        (rb"(?:\A|[^0-9A-Za-z:.])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,8}(?:\.[0-9]{1,3}){0,3}",), _address,
    ),
    Kind(
        "credit_card", "financial", _NUMBER,
        (
            _START + rb"[2-6][0-9]{12,18}" + _END,
            _START + rb"[3-6][0-9]{3}" + _SEPARATOR + rb"[0-9]{6}" + _SEPARATOR + rb"[0-9]{4,5}" + _END,
        ),
        numbers(range(13, 20), _card, neat=True),
    ),
    Kind(
        "credit_card", "financial", _GROUPS,
        (_START + rb"[2-6][0-9]{1,3}(?:" + _SEPARATOR + rb"[0-9]{2,4}){3,9}" + _END,),
        numbers(range(13, 20), _card, neat=True),
    ),
    Kind(
        "iban", "financial", _NUMBER,
        (
            _WORD_START + rb"[A-Za-z]{2}[ -]?[0-9]{2}[0-9A-Za-z]{11,30}",
            _WORD_START + rb"[A-Za-z]{2}[ -]?[0-9]{2}(?:[ \t\n.-]{1,2}[0-9A-Za-z]{4}){2,7}"
            rb"(?:[ \t\n.-]{1,2}[0-9A-Za-z]{1,3})?",
        ),
        _iban,
    ),
    Kind(
        "us_ssn", "government", _NUMBER,
        (_START + rb"[0-9]{3}[ \t\n./-]{1,3}[0-9]{2}[ \t\n./-]{1,3}[0-9]{4}",), numbers(range(9, 10), checksums.us_ssn),
    ),
    Kind(
        "us_ssn", "government", _ANNOUNCED, (_announced(rb"ssn|social.{0,3}security", rb"[0-9]{9}", 40),),
        _last_digits(9, checksums.us_ssn),
    ),
    Kind(
        "us_itin", "government", _NUMBER, (_START + rb"9[0-9]{2}[ ./-]{1,3}[0-9]{2}[ ./-]{1,3}[0-9]{4}",),
        numbers(range(9, 10), checksums.us_itin),
    ),
    Kind(
        "us_itin", "government", _ANNOUNCED, (_announced(rb"itin|taxpayer", rb"9[0-9]{8}", 40),),
        _last_digits(9, checksums.us_itin),
    ),
    Kind(
        "us_ein", "government", _ANNOUNCED, (_announced(rb"\bein\b|employer id|tax id", rb"[0-9]{2}-[0-9]{7}", 40),),
        _last_digits(9, lambda digits: digits[:2] != "00"),
    ),
    Kind(
        "de_tax_id", "government", _NUMBER, (_START + rb"[1-9][0-9]{10}" + _END,),
        numbers(range(11, 12), checksums.de_tax_id, neat=True),
    ),
    Kind(
        "de_tax_id", "government", _GROUPS,
        (_START + rb"[1-9][0-9]{1,3}(?:" + _SEPARATOR + rb"[0-9]{2,4}){2,4}" + _END,),
        numbers(range(11, 12), checksums.de_tax_id, neat=True),
    ),
    Kind(
        "uk_nino", "government", _NUMBER,
        (_WORD_START + rb"(?i)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z](?:[ -]?[0-9]{2}){3}[ -]?[A-D]",),
        numbers(range(9, 10), lambda bare: bare[:2].upper() not in ("BG", "GB", "KN", "NK", "NT", "TN", "ZZ"), _ALNUM),
    ),
    Kind(
        "uk_nhs", "government", _NUMBER, (_START + rb"[0-9]{3}[ -][0-9]{3}[ -][0-9]{4}",),
        numbers(range(10, 11), checksums.uk_nhs),
    ),
    Kind(
        "uk_nhs", "government", _ANNOUNCED, (_announced(rb"\bnhs", rb"[0-9]{10}"),), _last_digits(10, checksums.uk_nhs)
    ),
    Kind(
        "fr_nir", "government", _NUMBER,
        (
            _START + rb"[1-478][ .]?[0-9]{2}[ .]?[0-9]{2}[ .]?[0-9][0-9ABab][ .]?[0-9]{3}[ .]?[0-9]{3}[ .]?[0-9]{2}"
            + _END,
        ),
        numbers(range(15, 16), checksums.fr_nir, _DIGITS + b"ABab"),
    ),
    Kind(
        "es_nif", "government", _NUMBER,
        (
            _WORD_START + rb"[0-9XYZxyz][0-9]{7}[ .-]?[A-Za-z]",
            _WORD_START + rb"[0-9]{2}\.[0-9]{3}\.[0-9]{3}[ .-]?[A-Za-z]",
        ),
        numbers(range(9, 10), checksums.es_nif, _ALNUM),
    ),
    Kind(
        "it_codice_fiscale", "government", _WORD,
        (
            _WORD_START + rb"(?i)[A-Z]{6}[0-9L-V]{2}[A-EHLMPR-T][0-9L-V]{2}[A-Z][0-9L-V]{3}[A-Z]",
        ),
        numbers(range(16, 17), checksums.it_codice_fiscale, _ALNUM),
    ),
    Kind(
        "pl_pesel", "government", _NUMBER, (_START + rb"[0-9]{11}" + _END,),
        numbers(range(11, 12), checksums.pl_pesel, neat=True),
    ),
    Kind(
        "nl_bsn", "government", _ANNOUNCED, (_announced(rb"\bbsn|burgerservice|sofinummer", rb"[0-9]{9}", 40),),
        _last_digits(9, checksums.nl_bsn),
    ),
    Kind(
        "in_aadhaar", "government", _NUMBER, (_START + rb"[2-9][0-9]{3}[ -]{1,2}[0-9]{4}[ -]{1,2}[0-9]{4}",),
        numbers(range(12, 13), checksums.aadhaar),
    ),
    Kind(
        "in_aadhaar", "government", _ANNOUNCED, (_announced(rb"aadhaar|aadhar|uidai", rb"[2-9][0-9]{11}", 40),),
        _last_digits(12, checksums.aadhaar),
    ),
    Kind(
        "passport", "government", _WORD,
        (
            rb"(?i)(?:passport|reisepass|passeport|pasaporte|passaporto)[a-z]{0,8}"
            rb"(?:[^0-9A-Za-z]{1,3}(?:no|nr|number|num|id|is|was|code)){0,3}[^0-9A-Za-z]{1,6}[0-9A-Za-z]{6,9}",
        ),
        last_token(_ALNUM, _passport_number),
    ),
    Kind(
        "passport", "government", _NUMBER,
        (_WORD_START + rb"[0-9A-Z<]{9}[0-9][A-Z<]{3}[0-9]{7}[MFX<][0-9]{7}[0-9A-Z<]{14}[0-9<][0-9]",), _mrz,
    ),
    Kind(
        "date_of_birth", "person", _WORD,
        (
            rb"(?i)(?:born|birth|dob\b|d\.o\.b|geboren|geburtsdatum|geb\.)[^0-9\n]{0,25}"
            rb"(?:[0-9]{1,4}[./-][0-9]{1,2}[./-][0-9]{1,4}|[0-9]{1,2}[. ]{0,2}" + _MONTH + rb"[ .,]{1,2}[0-9]{4})",
            rb"(?i)(?:born|birth|dob\b|d\.o\.b)[^0-9\n]{0,25}" + _MONTH + rb"[ .]{1,2}[0-9]{1,2}(?:st|nd|rd|th)?,? "
            rb"[0-9]{4}",
        ),
        _birth,
    ),
    Kind(
        "api_key", "secret", _KEY,
        (
            _WORD_START + rb"(?:(?:sk|pk|rk)[-_][0-9A-Za-z_-]{16,}|A[KS]IA[0-9A-Z]{16}|gh[pousr]_[0-9A-Za-z]{20,}"
            rb"|github_pat_[0-9A-Za-z_]{20,}|glpat-[0-9A-Za-z_-]{20,}|xox[abeprs]-[0-9A-Za-z-]{10,}"
            rb"|AIza[0-9A-Za-z_-]{35}|hf_[0-9A-Za-z]{20,}|npm_[0-9A-Za-z]{30,}|pypi-[0-9A-Za-z_-]{30,}"
            rb"|SG\.[0-9A-Za-z_-]{16,}\.[0-9A-Za-z_-]{16,}"
            rb"|eyJ[0-9A-Za-z_-]{16,}(?:\.[0-9A-Za-z_-]*){0,2})",
        ),
        _whole_word,
    ),
    Kind(
        "private_key", "secret", _KEY, (rb"-----BEGIN [A-Z ]{0,24}PRIVATE KEY",), _whole_word, redactable=False,
    ),
    Kind(
        "credential", "secret", _WORD,
        (
            rb"(?i)(?:password|passwd|pwd|passphrase|passwort|secret|(?:api|access|secret)[_ -]?key"
            rb"|(?:access|auth)[_ -]?token)"
            rb"[\"']?[ \t]{0,2}(?:is|:|=|:=|=>)[ \t]{0,2}[\"']?[0-9A-Za-z!#$%&*+./:?@^_~-]{6,128}",
            rb"(?i)\b(?:bearer|basic)[ \t]{1,2}[0-9A-Za-z+/._~-]{16,}",
        ),
        last_token(_ALNUM + b"!#$%&*+./:?@^_~-", _mixed),
    ),
)  # fmt: skip

#: Names and their classes; `name` is found by Presidio alone.
CLASS_OF: dict[str, DataClass] = {kind.name: kind.group for kind in KINDS} | {"name": "person", "location": "person"}
CLASSES: tuple[DataClass, ...] = ("contact", "financial", "government", "person", "secret")
#: What cannot be replaced by a placeholder as a whole.
NOT_REDACTABLE = frozenset(kind.name for kind in KINDS if not kind.redactable)
