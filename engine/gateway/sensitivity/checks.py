"""What tells a number or a token from its look-alikes once a pattern has found it: boundaries, groups, forms.

A check gets the text and a candidate's place in it. Texts are bytes, one for each character (`plain`).
"""

import functools
import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterator

from tokenmill.engine.gateway.sensitivity import checksums

#: (text, start, end) of a candidate to (start, end) of the finding in it (`NOWHERE`: no placeholder can stand for it),
#: or where the search goes on when it is none (None: behind its first letters or digits).
Check = Callable[[bytes, int, int], tuple[int, int] | int | None]
NOWHERE = (-1, -1)

DIGITS = b"0123456789"
ALNUM = DIGITS + b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
SEPARATORS = b" \t\r\n._/-"


def is_one_of(text: bytes, place: int, characters: bytes) -> bool:
    """Whether one of the characters stands at a place, which may lie outside."""
    return 0 <= place < len(text) and text[place] in characters


@functools.cache
def _runs(alphabet: bytes) -> re.Pattern[bytes]:
    return re.compile(b"[" + alphabet + b"]+")


def _prefixes(text: bytes, start: int, end: int, alphabet: bytes) -> Iterator[tuple[str, int]]:
    """(bare characters, end) of every beginning of a candidate that ends where a group of characters ends."""
    bare = ""
    for run in _runs(alphabet).finditer(text, start, end):
        bare += run[0].decode("ascii")
        if not is_one_of(text, run.end(), alphabet):
            yield bare, run.end()


def number(fits: Callable[[str], bool], alphabet: bytes = DIGITS, *, even: bool = True, apart: bool = False) -> Check:
    """A check for a number that does not go on and whose bare characters `fits`.

    Args:
        fits: Looks at the characters, separators left out.
        alphabet: What counts as a character.
        even: The same stands between all of its groups, but that a line may end once.
        apart: No other candidate can begin inside of one: the search goes on behind what is refused.
    """
    others = bytes(code for code in range(256) if code not in alphabet)

    def check(text: bytes, start: int, end: int) -> tuple[int, int] | int | None:
        shown = text[start:end].lstrip(others)
        start = end - len(shown)
        shown = shown.rstrip(others)
        end = start + len(shown)
        refused = end if apart else None
        if is_one_of(text, end, alphabet):
            return refused
        between = shown.translate(None, alphabet)
        if not between:
            if is_one_of(text, start - 1, b".") and is_one_of(text, start - 2, DIGITS):
                return refused  # a fraction
        elif even and len(set(between)) > 1 and not _evenly_apart(_runs(alphabet).split(shown)[1:-1]):
            return refused
        return (start, end) if fits(shown.translate(None, SEPARATORS).decode("latin-1")) else refused

    return check


#: The code of a country, in front of the rest of a telephone number.
_COUNTRY_CODE = re.compile(rb"\+[1-9][0-9]{0,2}[ .-]\Z")


def at_home(check: Check) -> Check:
    """The same check for what is not the rest of a number with a country's code."""

    def narrowed(text: bytes, start: int, end: int) -> tuple[int, int] | int | None:
        if text[start] not in DIGITS:
            start += 1
        before = text[max(start - 5, 0) : start]
        return end if b"+" in before and _COUNTRY_CODE.search(before) else check(text, start, end)

    return narrowed


#: Characters of the shortest hash, in hexadecimal (MD5).
_HASH = 32
_HEX = DIGITS + b"ABCDEFabcdef"


def not_in_hash(check: Check) -> Check:
    """The same check for what is not the middle of a long hexadecimal number."""

    def narrowed(text: bytes, start: int, end: int) -> tuple[int, int] | int | None:
        found = check(text, start, end)
        if isinstance(found, tuple) and (is_one_of(text, found[0] - 1, _HEX) or is_one_of(text, found[1], _HEX)):
            before, after = text[max(found[0] - _HASH, 0) : found[0]], text[found[1] : found[1] + _HASH]
            beside = len(before) - len(before.rstrip(_HEX)) + len(after) - len(after.lstrip(_HEX))
            if found[1] - found[0] + beside >= _HASH:
                return found[1]
        return found

    return narrowed


_PAIR = re.compile(rb"[^0-9][0-9]{2}[^0-9]\Z")


def in_pairs(text: bytes, start: int, end: int) -> tuple[int, int] | int:
    """A French telephone number, in pairs of digits: no row of more of them, and none that grow, as in a lottery."""
    if text[start] not in DIGITS:
        start += 1
    stop = start + len(b"01 23 45 67 89")
    between = text[start + 2 : start + 3]
    pairs = text[start:stop].split(between)
    if (pairs == sorted(pairs) and pairs[-1] <= b"50") or (
        text.startswith(between, stop) and is_one_of(text, stop + 1, DIGITS)
    ):
        return stop
    before = b" " + text[max(start - 4, 0) : start]
    return stop if _PAIR.search(before) and before[-1:] == between else (start, stop)


def _evenly_apart(between: list[bytes]) -> bool:
    counts = Counter(between)
    ends_once = any(count == 1 and b"\n" in one for one, count in counts.items())
    return len(counts) == 1 or (len(counts) == 2 and ends_once)


def last_token(alphabet: bytes, fits: Callable[[bytes], bool]) -> Check:
    """A check for a value behind a word that announces it: the candidate's last run of `alphabet`."""

    def check(text: bytes, start: int, end: int) -> tuple[int, int] | None:
        first = start + len(text[start:end].rstrip(alphabet))
        return (first, end) if not is_one_of(text, end, alphabet) and fits(text[first:end]) else None

    return check


def last_digits(count: int, fits: Callable[[str], bool]) -> Check:
    """The same for a number whose digits may be in groups."""

    def check(text: bytes, start: int, end: int) -> tuple[int, int] | None:
        bare, first = b"", end
        while first > start and len(bare) < count:
            first -= 1
            if text[first] in DIGITS:
                bare = text[first : first + 1] + bare
        alone = not is_one_of(text, end, DIGITS) and not is_one_of(text, first - 1, DIGITS)
        return (first, end) if len(bare) == count and alone and fits(bare.decode("ascii")) else None

    return check


def whole_word(text: bytes, start: int, end: int) -> tuple[int, int]:
    """All of a candidate but the character in front of it."""
    while text[start] not in ALNUM + b"-":
        start += 1
    return start, end


def iban(text: bytes, start: int, end: int) -> tuple[int, int] | None:
    """An account's number, in one piece or in fours, the country and the check digits perhaps apart."""
    while text[start] not in ALNUM:
        start += 1
    if text[start : start + 4].upper() == b"IBAN":
        start += 4
    bare = text[start:end].translate(None, SEPARATORS).decode("latin-1")
    length = checksums.IBAN_LENGTHS.get(bare[:2].upper(), 0)
    bare = bare[:length]
    if not checksums.iban(bare):
        return None
    groups: list[int] = []
    over = -length
    for run in _runs(ALNUM).finditer(text, start, end):
        groups.append(run.end() - run.start())
        over += groups[-1]
        if over >= 0:
            break
    stop = run.end() - over
    # A word may be glued to it; not any letters of a longer token.
    if is_one_of(text, stop, ALNUM) and (
        text[stop] in DIGITS or text[stop - 1] not in DIGITS or sum(map(str.isalpha, bare)) > 7
    ):
        return None
    inner = groups[2 if groups[:2] == [2, 2] else 0 : -1]
    return (start, stop) if set(inner) <= {4} else None


#: An escape in a JSON text or a program, behind its backslash; what it stands for may belong to a name.
_ESCAPE = re.compile(rb"[nrtbf]|u([0-9A-Fa-f]{4})")


#: What an address may have in front of its @ without quotes, and how many names with a dot behind are seen after it.
_LOCAL, _LABELS = ALNUM + b"._%+'?-" + bytes(range(0x80, 0x100)), 16


def email(text: bytes, start: int, end: int) -> tuple[int, int] | None:
    """An address without what stands before it: punctuation, or an escape of a string in a string."""
    goes_on = is_one_of(text, end, b".") and text.count(b".", text.rfind(b"@", start, end), end) >= _LABELS
    if goes_on or is_one_of(text, start - 1, _LOCAL):
        return NOWHERE  # only a piece of a longer one
    if is_one_of(text, start - 1, b"\\"):
        before = len(text[:start]) - len(text[:start].rstrip(b"\\"))
        escape = _ESCAPE.match(text, start)
        if text[start] in b"\"._+-'%?" or before % 2 == 0:
            return NOWHERE  # who knows what is read in the end
        if escape:
            if escape[1] and (chr(int(escape[1], 16)).isalnum() or chr(int(escape[1], 16)) in "._%+'?-"):
                return NOWHERE
            start = escape.end()
    while text[start] in b".'-%+?":
        start += 1
    if text[start] == ord("@"):
        return None
    return NOWHERE if text[start] == ord('"') and b"\\" in text[start:end] else (start, end)


#: A date, not more; a minus after a blank; and a date as a number.
_A_DATE = re.compile(
    rb"(?:(?:19|20)[0-9]{2}([./-])(?:0?[1-9]|1[0-2])\1(?:3[01]|[12][0-9]|0?[1-9])"
    rb"|(?:3[01]|[12][0-9]|0?[1-9])([./-])(?:3[01]|[12][0-9]|0?[1-9])\2(?:(?:19|20)[0-9]{2}|[0-9]{2}))(?![./-]?[0-9])"
)
_MINUS = re.compile(rb"[ \t]-[0-9]")


#: The code of North America, in front of a number that is searched both with it and without.
_ABROAD = re.compile(rb"(?<![0-9+])\+1[ .-]")


def phone(text: bytes, start: int, end: int) -> tuple[int, int] | int | None:
    """A telephone number: with the code of a country, or in the form of one country."""
    while text[start] not in b"+(0123456789":
        start += 1
    if text[start] in b"23456789" and is_one_of(text, start - 2, b"1") and _ABROAD.match(text, max(start - 3, 0)):
        return end
    shown = text[start:end]
    abroad = 0 if shown[0] == ord("+") else 2 if shown.startswith(b"00") else None
    glued = is_one_of(text, start - 1, ALNUM)
    minus = _MINUS.search(shown) if b" -" in shown or b"\t-" in shown else None
    if not minus and text[end - 1] in DIGITS and not is_one_of(text, end, DIGITS):
        # Mostly it is all of it.
        bare = shown.translate(None, _BETWEEN_PHONES).decode("ascii")
        if _callable(bare, abroad, len(shown), glued=glued):
            return start, end
    found = None
    for bare, stop in _prefixes(text, start, start + minus.start() if minus else end, DIGITS):
        if _callable(bare, abroad, stop - start, glued=glued):
            found = start, stop
    return found


_BETWEEN_PHONES = b"+ \t().\n/-"


def _callable(bare: str, abroad: int | None, length: int, *, glued: bool) -> bool:
    """Whether digits may be a telephone number.

    Args:
        bare: The digits.
        abroad: Where among them the code of a country begins; None: there is none.
        length: Of all that is shown.
        glued: A letter stands before it.
    """
    if not 7 <= len(bare) <= 15:
        return False
    if abroad is None:
        return True
    if bare[abroad] == "1":  # North America, where the codes of places and exchanges begin with 2 to 9
        return len(bare) == abroad + 11 and bare[abroad + 1] > "1" and bare[abroad + 4] > "1"
    if length <= len(bare) + 1:
        return len(bare) >= abroad + (11 if glued else 9)
    return len(bare) >= 7 + abroad // 2


def announced_phone(text: bytes, start: int, end: int) -> tuple[int, int] | None:
    """A number behind a word that announces one, which a date is not."""
    while text[start] not in b"+(0123456789":
        start += 1
    if _A_DATE.match(text, start):
        return None
    found = None
    for bare, stop in _prefixes(text, start, end, DIGITS):
        if 7 <= len(bare) <= 15:
            found = start, stop
    return found


#: First bytes of addresses of this machine, of many, and of nobody: those of masks.
_NOBODYS = frozenset((127, *range(224, 256)))
#: What stands before the number of a version.
_VERSION = re.compile(
    rb"(?i)(?:(?:\bv|[=<>~]=)[ :]?|version(?:[\"']? ?[:=] ?[\"']|=)"
    rb"|(?:chrom(?:e|ium)|safari|firefox|edg[ea]?|opr|version|crios)/)\Z"
)


def ipv4(text: bytes, start: int, end: int) -> tuple[int, int] | None:
    """An address of somebody: none of this machine or of many, no version, no number of a section."""
    if text[start] not in DIGITS:
        start += 1
    shown = text[start:end]
    if is_one_of(text, end, ALNUM) or (is_one_of(text, end, b".") and is_one_of(text, end + 1, DIGITS)):
        return None
    if len(shown) == 7 or shown.endswith(b".0.0.0") or int(shown[: shown.index(b".")]) in _NOBODYS:
        return None
    version = is_one_of(text, start - 1, b"vV =:/\"'") and _VERSION.search(text[max(start - 12, 0) : start])
    return None if version else (start, end)


#: How addresses begin that anybody has: with a number of four digits, or that of a translator (RFC 6052).
_ASSIGNED = re.compile(r"[0-9A-Fa-f]{4}:|64:ff9b:", re.IGNORECASE)


def ipv6(text: bytes, start: int, end: int) -> tuple[int, int] | None:
    """The same in the longer form."""
    while text[start] not in b":0123456789ABCDEFabcdef":
        start += 1
    if is_one_of(text, end, ALNUM + b":"):
        return None
    if text[end - 1] == ord(":") and text[end - 2] != ord(":"):
        end -= 1  # what follows is said of it
    if is_one_of(text, end, b".") and is_one_of(text, end + 1, DIGITS):
        return None
    shown = text[start:end].decode("ascii")
    if "::" not in shown and shown.count(":") < 6:
        return None  # hours
    if not any(character.isdigit() for character in shown):
        return None  # `fe::ed` is a name in a program
    if "::" in shown and "." not in shown and not _ASSIGNED.match(shown):
        return None  # `a[1::2]` is a slice
    try:
        address = ipaddress.ip_address(shown)
    except ValueError:
        return None
    return None if address.is_loopback or address.is_unspecified or address.is_multicast else (start, end)


def machine_zone(text: bytes, start: int, end: int) -> tuple[int, int] | None:
    """The second line of a passport's machine-readable zone."""
    while text[start] not in ALNUM:
        start += 1
    zone = text[start:end].decode("ascii")
    fits = checksums.mrz_field(zone[:9], zone[9]) and checksums.mrz_field(zone[13:19], zone[19])
    return (start, end) if fits and checksums.mrz_field(zone[21:27], zone[27]) else None


#: Names in programs and of packages: words, each with a short number at most.
_NAME = re.compile(rb"(?:[A-Za-z]{1,15}[0-9]{0,2}|[0-9]{1,4})(?:[-_](?:[A-Za-z]{1,15}[0-9]{0,2}|[0-9]{1,4}))+")


def key(text: bytes, start: int, end: int) -> tuple[int, int] | int:
    """A key of an API that is no name."""
    start, end = whole_word(text, start, end)
    return end if _NAME.fullmatch(text, start, end) else (start, end)


#: A place in a program where a secret is kept.
_KEPT = re.compile(
    rb"(?:self|this|settings|config|cfg|conf|os|env|process|app|args|options|params|ctx|context|request|req|secrets"
    rb"|data|vars?|module)\.[A-Za-z_][0-9A-Za-z_.]*"
)


#: What stands for a password in an example, or in a text with variables; not the escape that one begins with.
_EXAMPLE = re.compile(
    rb"(?i)(?:[*x.]+|[${\[(].*|%(?![0-9A-F]{2}).*|(?:my|your)?[ _-]?(?:password|passwd|pass|pwd|pw|secret))"
)


def in_address(text: bytes, start: int, end: int) -> tuple[int, int] | int:
    """The password of an address, `scheme://user:password@host`, from its `://` to its `@` (RFC 3986)."""
    first = text.index(b":", start + 1) + 1
    return end if _EXAMPLE.fullmatch(text, first, end - 1) else (first, end - 1)


def secret(sign: bytes, next_one: bytes = rb"\Z") -> Check:
    """A check for a value with letters and digits behind the first `sign` after the word that announces it.

    Args:
        sign: Pattern of what stands between the two.
        next_one: Pattern of what announces another value, at which this one ends.
    """
    said, next_said = re.compile(sign), re.compile(next_one)

    def check(text: bytes, start: int, end: int) -> tuple[int, int] | int:
        found = said.search(text, start, end)
        first = found.end() if found else start
        other = next_said.search(text, first, end)
        if other:
            end = other.start()
        value = text[first:end]
        letters, digits = value.translate(None, ALNUM[10:]), value.translate(None, DIGITS)
        mixed = len(letters) < len(value) and len(digits) < len(value)
        # What is none may hold the word that announces one.
        return (first, end) if mixed and not _KEPT.fullmatch(value) else first

    return check
