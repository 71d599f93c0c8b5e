"""The fast path: which kinds of data stand where in a text.

A text is cut into windows at fixed places. What was found in a window is remembered under a hash of its characters, so
a prompt that grows, or a conversation that repeats its history, is searched only where it is new. In a window one pass
of an RE2 set tells which hints it holds, one pass for each of those hints which of its patterns match anywhere, and
only those patterns run.
"""

import functools
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import re2

from tokenmill.engine.gateway.sensitivity.kinds import KINDS, Check

#: Characters from one window's beginning to the next one's.
STRIDE = 4096
#: How far a window reaches into the next one: more than any number with the words that announce it.
OVERLAP = 512
#: Windows remembered; about 200 bytes each.
MAX_ENTRIES = 16_384
#: How often escapes inside escapes are taken off.
_DEPTH = 3

#: Without one of these a window holds none of the kinds behind it.
HINTS: dict[str, bytes] = {
    "at": rb"@",
    "number": rb"[0-9](?:[ \t\r\n._/()-]{0,3}[0-9]){4}",
    "announced": rb"(?i)(?:ssn|security|itin|taxpayer|\bein\b|employer id|tax id|\bnhs"
    rb"|\bbsn|burgerservice|sofinummer|aadha|uidai|phone|tel|mobil|cell|fax|call|dial|handy|whatsapp|sms)[^0-9\n]*[0-9]",
    "dots": rb"[0-9]\.[0-9]{1,3}\.[0-9]",
    "colons": rb"[0-9A-Fa-f:]:[0-9A-Fa-f]{0,4}:",
    "word": rb"(?i)passport|reisepass|passeport|pasaporte|passaporto|born|birth|dob\b|d\.o\.b|geboren|geburt|geb\."
    rb"|passw|pwd|passphrase|secret|api[_ -]?key|token|[a-z]{6}[0-9]{2}[a-z][0-9]{2}[a-z][0-9]{3}[a-z]",
    "key": rb"[spr]k[-_]|A[KS]IA|gh[pousr]_|github_pat_|glpat-|xox[abeprs]-|AIza|hf_|npm_|pypi-|SG\.|eyJ|-----BEGIN",
}

_ESCAPE = re.compile(
    r"\\u([0-9A-Fa-f]{4})|\\x([0-9A-Fa-f]{2})|\\([nrt\"'\\/])|%([0-9A-Fa-f]{2})|&#([0-9]{1,7});|&#[xX]([0-9A-Fa-f]{1,6});"
)
_NAMED_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}
#: Characters that are not seen: they may stand inside a number and are left out before it is looked for.
_UNSEEN = "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\u2061\u2062\u2063\u2064\ufe0e\ufe0f\ufeff"


class Finding(NamedTuple):
    """Something found in a text.

    Attributes:
        kind: Its kind's name.
        start, end: Where, in characters; both -1 when it shows only after escapes are taken off.
    """

    kind: str
    start: int
    end: int


@functools.cache
def _options() -> Any:
    options = re2.Options()
    options.encoding = re2.Options.Encoding.LATIN1
    options.never_capture = True
    options.log_errors = False
    return options


def compile_pattern(pattern: bytes) -> Any:
    """An RE2 pattern over one-byte characters; raises `re2.error`."""
    return re2.compile(pattern, _options())


@functools.cache
def _plain_characters() -> dict[int, str]:
    """Digits, letters, dashes and spaces of other scripts and styles that read as an ASCII character."""
    table = {}
    for code in (*range(0x80, 0x3100), *range(0xFE00, 0x10000), *range(0x1D400, 0x1D800), *range(0x1F100, 0x1F1B0)):
        character = chr(code)
        kind = unicodedata.category(character)
        plain = unicodedata.normalize("NFKC", character)
        if kind == "Nd":
            table[code] = str(unicodedata.decimal(character))
        elif kind == "Pd" or code == 0x2212:
            table[code] = "-"
        elif kind == "Zs":
            table[code] = " "
        elif len(plain) == 1 and plain.isascii():
            table[code] = plain
    return table


@functools.cache
def _fancy() -> frozenset[str]:
    return frozenset({*map(chr, _plain_characters()), *_UNSEEN})


def prepare() -> None:
    """Builds the tables now rather than at the first text that needs them (some 20 ms)."""
    _fancy()


def plain(text: str) -> tuple[bytes, list[int] | None]:
    """A text as the patterns see it, one byte a character, and each byte's place in the text (None: the same)."""
    places = None
    if not text.isascii() and not _fancy().isdisjoint(set(text)):
        text = text.translate(_plain_characters())
        if any(character in text for character in _UNSEEN):
            places = [place for place, character in enumerate(text) if character not in _UNSEEN]
            text = "".join(text[place] for place in places)
    return text.encode("latin-1", "replace"), places


def _unescaped(match: re.Match[str]) -> str:
    four, two, named, percent, decimal, hexadecimal = match.groups()
    if named:
        return _NAMED_ESCAPES.get(named, named)
    code = int(decimal) if decimal else int(four or two or percent or hexadecimal, 16)
    return chr(code) if code < 0x110000 and not 0xD800 <= code < 0xE000 else "?"


def undisguised(text: str) -> str | None:
    """The text with JSON, percent and character-reference escapes taken off, also nested ones; None without any."""
    if "\\" not in text and "%" not in text and "&#" not in text:
        return None
    bare = text
    for _ in range(_DEPTH):
        bare, count = _ESCAPE.subn(_unescaped, bare)
        if not count:
            break
    return None if bare == text else bare


class Scanner:
    """Finds data by its form.

    Args:
        wanted: Names of the kinds to look for; None: all.
        patterns: Kinds of the operator's own: name to RE2 pattern.
        max_entries: Windows remembered.
    """

    def __init__(
        self,
        wanted: Iterable[str] | None = None,
        patterns: Mapping[str, str] | None = None,
        max_entries: int = MAX_ENTRIES,
    ) -> None:
        kinds = KINDS if wanted is None else tuple(kind for kind in KINDS if kind.name in set(wanted))
        self._max_entries = max_entries
        self._seen: dict[bytes, tuple[Finding, ...]] = {}
        self._hints = re2.Set.SearchSet(_options())
        self._behind: list[tuple[Any, list[tuple[str, Any, Check]]]] = []
        forms = {
            hint: [(one.name, form, one.check) for one in kinds if one.hint == hint for form in one.patterns]
            for hint in HINTS
        }
        own = {name: text.encode("latin-1", "replace") for name, text in (patterns or {}).items()}
        for hint, pattern in (*HINTS.items(), *own.items()):
            behind = forms.get(hint, [(hint, pattern, _whole)])
            if behind:
                self._hints.Add(pattern)
                self._behind.append(_searchers(behind))
        self._empty = not self._behind
        if not self._empty:
            self._hints.Compile()
        prepare()

    def windows(self, text: str) -> Iterator[tuple[Finding, ...]]:
        """The findings of one window of the text after the other, places counted from the text's beginning."""
        for begin in range(0, max(len(text) - OVERLAP, 1), STRIDE):
            # One character before tells whether what stands at the beginning really begins there.
            start = max(begin - 1, 0)
            stop = begin + STRIDE + OVERLAP
            found = self._window(text[start:stop], start > 0, stop < len(text))
            yield tuple(_moved(finding, start, text) for finding in found) if found else ()

    def find(self, text: str) -> list[Finding]:
        """Everything found in a text, in the order of windows; what lies in two of them stands twice."""
        return [finding for found in self.windows(text) for finding in found]

    def _window(self, text: str, before: bool, after: bool) -> tuple[Finding, ...]:
        if self._empty:
            return ()
        key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16, key=b"%d%d" % (before, after))
        digest = key.digest()
        known = self._seen.pop(digest, None)
        if known is None:
            known = tuple(self._search(text, before, after))
            if len(self._seen) >= self._max_entries:
                del self._seen[next(iter(self._seen))]
        self._seen[digest] = known
        return known

    def _search(self, text: str, before: bool, after: bool) -> Iterator[Finding]:
        seen, places = plain(text)
        for kind, start, end in _without_look_alikes(list(self._candidates(seen))):
            # Cut off by the window's edge: the next window, or the one before, sees it whole.
            if (before and start == 0) or (after and end == len(seen) and start > STRIDE):
                continue
            yield Finding(kind, places[start], places[end - 1] + 1) if places else Finding(kind, start, end)
        bare = undisguised(text)
        if bare is not None:
            shown = {(kind, seen[start:end]) for kind, start, end in self._candidates(seen)}
            hidden, _ = plain(bare)
            for kind in {
                kind for kind, start, end in self._candidates(hidden) if (kind, hidden[start:end]) not in shown
            }:
                yield Finding(kind, -1, -1)

    def _candidates(self, seen: bytes) -> Iterator[tuple[str, int, int]]:
        for hint in self._hints.Match(seen) or ():
            which, searchers = self._behind[hint]
            for number in which.Match(seen) or ():
                name, pattern, check = searchers[number]
                place = 0
                while (match := pattern.search(seen, place)) is not None:
                    start, end = match.span()
                    found = check(seen, start, end)
                    if found is not None:
                        yield (name, *found)
                    place = max(found[1], start + 1) if found else start + 1


def _without_look_alikes(found: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Without telephone numbers that are part of something else: the digits of a bank account are none."""
    return [
        one
        for one in dict.fromkeys(found)
        if one[0] != "phone"
        or not any(other[0] != "phone" and other[1] <= one[1] and one[2] <= other[2] for other in found)
    ]


def _searchers(forms: list[tuple[str, bytes, Check]]) -> tuple[Any, list[tuple[str, Any, Check]]]:
    """A set that tells which of the patterns match, and the patterns."""
    which = re2.Set.SearchSet(_options())
    for _, pattern, _ in forms:
        which.Add(pattern)
    which.Compile()
    return which, [(name, compile_pattern(pattern), check) for name, pattern, check in forms]


def _whole(_text: bytes, start: int, end: int) -> tuple[int, int] | None:
    return (start, end) if end > start else None


def _moved(finding: Finding, by: int, text: str) -> Finding:
    """A window's finding with places of the whole text; one that the window cut off goes on to its token's end."""
    kind, start, end = finding
    if start < 0:
        return finding
    start, end = start + by, end + by
    if end - start >= OVERLAP - 1:
        while end < len(text) and (text[end].isalnum() or text[end] in "-_."):
            end += 1
    return Finding(kind, start, end)
