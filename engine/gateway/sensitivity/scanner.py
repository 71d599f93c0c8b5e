"""The fast path: which kinds of data stand where in a text.

A text is cut into windows at fixed places. What was found in a window is remembered under a hash of its characters, so
a prompt that grows, or a conversation that repeats its history, is searched only where it is new. In a window one pass
of an RE2 set tells which hints it holds, one pass for each of those hints which of its patterns match anywhere, and
only those patterns run.
"""

import bisect
import functools
import hashlib
import itertools
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import re2

from tokenmill.engine.gateway.sensitivity.checks import Check
from tokenmill.engine.gateway.sensitivity.kinds import KINDS
from tokenmill.engine.gateway.sensitivity.plain import CONTROLS, plain, prepare, undisguised, without_controls

#: Characters from one window's beginning to the next one's.
STRIDE = 4096
#: How far a window reaches into the next one: more than any number with the words that announce it.
OVERLAP = 512
#: Windows remembered, of about 200 bytes each, and findings in all of them, of about 130: a page may be full of them.
MAX_ENTRIES, MAX_FINDINGS = 16_384, 131_072
#: The place of control characters among the hints.
_CONTROLS = 0
#: How far a token is followed that a window cuts off; a longer one has no end that a placeholder could stand for.
_LONGEST_TOKEN = 16_384
#: From a window's beginning no finding reaches farther.
REACH = STRIDE + OVERLAP + 1 + _LONGEST_TOKEN
_RESTS = {
    kind.name: re.compile(rf"[{kind.rest}]{{0,{_LONGEST_TOKEN}}}(?![{kind.rest}])(?=[\t\n\r -~]|\Z)")
    for kind in KINDS
    if kind.rest
}
#: Found by one pattern in a window after which nothing more is: no placeholders stand for so many.
_MOST = 256
#: A refused candidate's beginning, behind which the search goes on.
_GROUP = re.compile(rb"[^0-9A-Za-z]?[0-9A-Za-z]+|[\x00-\xff]")
#: Candidates after which a window in which there are many lets others run: less than a millisecond's worth.
_BREATH = 64
#: Candidates of one pattern in a window after which Python's own engine goes on where it may (`Kind.swift`).
_DENSE = 16
#: Without one of these a window holds none of the kinds behind it.
HINTS: dict[str, bytes] = {
    "at": rb"@",
    "number": rb"[0-9](?:[ \t\r\n._/()-]{0,3}[0-9]){4}",
    # Apart from "number", whose other patterns would multiply the states of these: 7 ms for each page of numbers.
    "groups": rb"[0-9]{2}[ \t\r\n._/-]{1,6}[0-9]{2,6}[ \t\r\n._/-]{1,6}[0-9]{2}",
    "announced": rb"(?i)(?:ssn|security|itin|taxpayer|(?:\b|_)ein(?:\b|_)|employer id|tax id|(?:\b|_)nhs"
    rb"|(?:\b|_)bsn|burgerservice|sofinummer|aadha|uidai)[^0-9\n]*[0-9]",
    # Apart from "announced", for the same reason.
    "phones": rb"(?i)(?:phone|t[e\xe9\xc9]l|mobil|cell|fax|handy|whatsapp|sms|\bunter|\bruf|\banruf|\berreich)"
    rb"[^0-9\n]*[0-9]",
    "calls": rb"(?i)(?:call|dial|cell)[^0-9\n]*[0-9]",
    "dots": rb"[0-9]\.[0-9]{1,3}\.[0-9]",
    # Hours have fewer.
    "colons": rb"::|(?:[0-9A-Fa-f]{1,4}:){6}",
    "word": rb"(?i)pass(?:port|eport|aport|w|phrase|nummer|-?nr)|reisepass|pasaporte|paspoort|paszport"
    rb"|born|birth|dob\b|d\.o\.b|gebor|geburt|geb\.|geboorte|\bn.e? le\b|na(?:iss|cid|cim|scid|scim|scit)"
    rb"|\bnat[oa] |urodz|\bur\."
    rb"|pwd|secret|(?:api|access|account)[_ -]?key|token|bearer|basic[ \t]"
    rb"|kennwort|wachtwoord|mot de passe|contrase.a|senha|has.o"
    rb"|[a-z]{6}[0-9]{2}[a-z][0-9]{2}[a-z][0-9]{3}[a-z]",
    # Apart from "word": they are seldom, and its patterns are searched with all the more states the more there are.
    "settings": rb"(?i)identified (?:by|as|with)|\bcurl |[?&]sig=|-signature=|_(?:token|pat)[\"'`\]]{0,2}[ \t]{0,2}:?="
    rb"|authorization|subscription[-_]key|\bx-[a-z-]{0,42}(?:key|token)"
    rb"|_token[\"'`]{0,1}[ \t]{0,2}:|\"auth\"|\blogin[ \t\r\n]|</key>|[ \t\n]value[ \t]{0,2}=|\bpassword[ \t]{1,4}'",
    "key": rb"[spr]k[-_]|A[KS]IA|gh[pousr]_|github_pat_|glpat-|xox[abeprs]-|AIza|hf_|npm_|pypi-|SG\.|eyJ|-----BEGIN"
    rb"|gsk_|nvapi-|xai-|do[opr]_v1_|whsec_|hv[sb]\.|glsa_|glc_|dckr_pat_|r8_|lin_api_|ya29\.|tgp_v1_|sq0|AGE-SECRET"
    rb"|hooks\.slack|LS0tLS1CRUdJTi|PuTTY-U|ATATT3|shp[a-z]{2}_|dapi[0-9a-f]|key-[0-9a-f]|SK[0-9a-f]{4}|:AA|[78]Q~",
}


#: (kind, pattern, the same for Python's own engine where it may, check).
_Searcher = tuple[str, Any, re.Pattern[bytes] | None, Check]


class Finding(NamedTuple):
    """Something found in a text.

    Attributes:
        kind: Its kind's name.
        start, end: Where, in characters; both -1 when it shows only after escapes are taken off.
    """

    kind: str
    start: int
    end: int

    def moved(self, by: int) -> "Finding":
        """The same with its place counted from so many characters before."""
        kind, start, end = self
        return Finding(kind, start + by, end + by) if start >= 0 else self


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
        self._remembered = 0
        self._hints = re2.Set.SearchSet(_options())
        self._behind: list[tuple[Any, list[_Searcher]]] = []
        forms = {
            hint: [
                (one.name, form, one.swift_form(form), one.check)
                for one in kinds
                if one.hint == hint
                for form in one.patterns
            ]
            for hint in HINTS
        }
        own = {name: text.encode("latin-1", "replace") for name, text in (patterns or {}).items()}
        self._hints.Add(CONTROLS)
        self._behind.append(_searchers([]))
        for hint, pattern in (*HINTS.items(), *own.items()):
            behind = forms.get(hint, [(hint, pattern, None, _whole)])
            if behind:
                self._hints.Add(pattern)
                self._behind.append(_searchers(behind))
        self._empty = len(self._behind) == 1
        if not self._empty:
            self._hints.Compile()
        prepare()

    def windows(self, text: str) -> Iterator[tuple[int, tuple[Finding, ...]]]:
        """One window of the text after the other: where it begins, and its findings, their places counted from there.

        Nothing is found in between where a window takes long: whoever asks may let others run then.
        """
        for begin in range(0, max(len(text) - OVERLAP, 1), STRIDE):
            # One character before tells whether what stands at the beginning really begins there.
            start = max(begin - 1, 0)
            stop = begin + STRIDE + OVERLAP
            for found in self._window(text[start:stop], start > 0, stop < len(text)):
                if found and stop < len(text) and max(map(_end_of, found)) == stop - start:
                    yield start, tuple(_whole_of(finding, text, start, stop) for finding in found)
                else:
                    yield start, found

    def find(self, text: str) -> list[Finding]:
        """Everything found in a text, in the order of windows; what lies in two of them stands twice."""
        return [finding.moved(begin) for begin, found in self.windows(text) for finding in found]

    def _window(self, text: str, before: bool, after: bool) -> Iterator[tuple[Finding, ...]]:
        """The findings of one window, last; while they are looked for, nothing from time to time."""
        if self._empty:
            return
        key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16, key=b"%d%d" % (before, after))
        digest = key.digest()
        known = self._seen.pop(digest, None)
        if known is None:
            findings: list[Finding] = []
            for _ in self._search(text, before, after, findings):
                yield ()
            known = tuple(findings)
            # Another request may have searched the same in between.
            self._remembered += len(known) - len(self._seen.pop(digest, ()))
            while self._seen and (len(self._seen) >= self._max_entries or self._remembered > MAX_FINDINGS):
                self._remembered -= len(self._seen.pop(next(iter(self._seen))))
        self._seen[digest] = known
        yield known

    def _search(self, text: str, before: bool, after: bool, findings: list[Finding]) -> Iterator[None]:
        """Adds the findings of one window that nobody remembers; stops from time to time."""
        seen, places, hints = self._seen_as(text)
        candidates: list[Finding] = []
        yield from self._candidates(seen, hints, candidates)
        size = len(seen)
        for candidate in _without_look_alikes(candidates):
            kind, start, end = candidate
            if places is None and start > 0 and end < size:
                findings.append(candidate)
                continue
            cut = after and end == size
            # Cut off by the window's edge: the next window, or the one before, sees it whole. But not the word that
            # announces a token, which the token's own characters continue (`_whole_of`).
            if (before and start == 0) or (cut and start > STRIDE and kind not in _RESTS):
                continue
            if start < 0:
                findings.append(Finding(kind, -1, -1))
                continue
            first, last = (places[start], places[end - 1] + 1) if places else (start, end)
            findings.append(Finding(kind, first, len(text) if cut else last))
        bare = undisguised(text)
        if bare is not None:
            shown = {(kind, seen[start:end]) for kind, start, end in candidates}
            hidden, _, hints = self._seen_as(bare)
            candidates = []
            yield from self._candidates(hidden, hints, candidates)
            kinds = {kind for kind, start, end in candidates if (kind, hidden[start:end]) not in shown}
            findings += (Finding(kind, -1, -1) for kind in kinds)

    def _seen_as(self, text: str) -> tuple[bytes, list[int] | None, list[int]]:
        """A text as `plain` makes it, without control characters, and the hints in it."""
        seen, places = plain(text)
        hints = self._hints.Match(seen) or []
        if _CONTROLS in hints:
            seen, places = without_controls(seen, places)
            hints = self._hints.Match(seen) or []
        return seen, places, hints

    def _candidates(self, seen: bytes, hints: Iterable[int], passed: list[Finding]) -> Iterator[None]:
        """Adds what its check let pass; stops after every `_BREATH` that were looked at."""
        looked = 0
        for hint in hints:
            which, searchers = self._behind[hint]
            for number in which.Match(seen) or ():
                name, pattern, swift, check = searchers[number]
                count = tried = 0
                place: int | None = 0
                while place is not None:
                    matches, place = pattern.finditer(seen, place), None
                    for match in matches:
                        start, end = match.span()
                        found = check(seen, start, end)
                        if isinstance(found, tuple):
                            first, last = found
                            passed.append(Finding(name, first, last))
                            goes_on = end if first < 0 else last if last > start else start + 1
                            count += 1
                            if count == _MOST:
                                passed.append(Finding(name, -1, -1))
                                break
                        else:
                            if found is None:
                                group = _GROUP.match(seen, start)
                                found = group.end() if group else start
                            goes_on = found if found > start else start + 1
                        tried += 1
                        looked += 1
                        if looked % _BREATH == 0:
                            yield
                        if tried == _DENSE and swift is not None:
                            pattern, place = swift, goes_on
                            break
                        if goes_on != end:
                            place = goes_on
                            break


def _without_look_alikes(found: list[Finding]) -> list[Finding]:
    """Without telephone numbers that are part of something else: the digits of a bank account are none."""
    phones = any(one[0] == "phone" for one in found)
    others = sorted((start, end) for kind, start, end in found if kind != "phone") if phones else []
    if not others:
        return list(dict.fromkeys(found))
    # The farthest end of those that begin here or before.
    ends = list(itertools.accumulate((end for _, end in others), max))

    def inside(start: int, end: int) -> bool:
        before = bisect.bisect_right(others, (start, ends[-1]))
        return before > 0 and ends[before - 1] >= end

    return [one for one in dict.fromkeys(found) if one[0] != "phone" or not inside(one[1], one[2])]


def _searchers(forms: list[tuple[str, bytes, re.Pattern[bytes] | None, Check]]) -> tuple[Any, list[_Searcher]]:
    """A set that tells which of the patterns match, and the patterns."""
    which = re2.Set.SearchSet(_options())
    for _, pattern, _, _ in forms:
        which.Add(pattern)
    which.Compile()
    return which, [(name, compile_pattern(pattern), swift, check) for name, pattern, swift, check in forms]


def _whole(_text: bytes, start: int, end: int) -> tuple[int, int] | int:
    return (start, end) if end > start else start + 1


_end_of = operator.itemgetter(2)


def _whole_of(finding: Finding, text: str, start: int, stop: int) -> Finding:
    """A finding of the window from `start` to `stop`; one that the window cut off goes on to its token's end.

    Where that cannot be told, no placeholder can stand for it: none of a token may be left.
    """
    kind, first, last = finding
    if last != stop - start:
        return finding
    rest = _RESTS[kind].match(text, stop) if kind in _RESTS else None
    return Finding(kind, -1, -1) if rest is None else Finding(kind, first, rest.end() - start)
