"""Where some of many strings stand in a text: one pass, however many they are (Aho and Corasick, 1975)."""

import re
from collections.abc import Iterable, Iterator

from ahocorasick_rs import AhoCorasick, Implementation

#: A longer string is found by its beginning: memory and the time to begin with grow with what is looked for.
_HEAD = 32
#: Characters that are looked through at one go: with beginnings inside of beginnings less than three milliseconds.
_SLICE = 1024
#: Comparisons after which others may run, and how many occurrences in so little text are nobody's data.
_BREATH, _MOST = 256, 10_000
#: Half of a character, which UTF-8 does not have; what stands for it.
_SURROGATE, _ANY = re.compile("[\ud800-\udfff]"), "\ufffd"


class TangleError(Exception):
    """More occurrences overlap than can be told apart in reasonable time."""


#: Where a needle stands, in characters, and which: (start, end, needle).
Place = tuple[int, int, str]
#: (start, end, rank among the needles, needle)
_Match = tuple[int, int, int, str]


class Needles:
    """Finds the occurrences of many strings.

    Where two overlap, the longer one counts, then the one that came first among `needles`, then the first in the text.

    Args:
        needles: Different ones, none of them empty.
    """

    def __init__(self, needles: Iterable[str]) -> None:
        heads: dict[str, list[tuple[int, str]]] = {}
        for rank, needle in enumerate(sorted(needles, key=len, reverse=True)):
            heads.setdefault(_encodable(needle[:_HEAD]), []).append((rank, needle))
        self._behind = list(heads.values())
        # Of the kinds of automata the one that is made soonest: most texts are looked through once.
        self._heads = AhoCorasick(list(heads), implementation=Implementation.NoncontiguousNFA) if heads else None
        self._longest = max(map(len, heads), default=0)

    def places(self, text: str) -> Iterator[list[Place]]:
        """Places that do not overlap, a few at a time and in order; often none: others may run then.

        Args:
            text: Any.

        Raises:
            TangleError: Too many overlap each other.
        """
        if self._heads is None:
            return
        found: list[_Match] = []
        compared = 0
        for begin in range(0, len(text), _SLICE):
            first = max(begin - self._longest + 1, 0)
            piece = _encodable(text[first : begin + _SLICE])
            for which, start, end in self._heads.find_matches_as_indexes(piece, overlapping=True):
                if first + end <= begin:
                    continue  # the piece before held it
                behind, at = self._behind[which], first + start
                for rank, needle in behind:
                    if text.startswith(needle, at):
                        found.append((at, at + len(needle), rank, needle))
                compared += len(behind)
                if compared >= _BREATH:
                    compared = 0
                    yield []
                if len(found) > _MOST:
                    raise TangleError
            # What is found from here on begins no earlier than this.
            settled, found = _apart(found, begin + _SLICE - self._longest + 1)
            yield settled
        yield _apart(found, len(text))[0]


def _encodable(text: str) -> str:
    return text if text.isascii() else _SURROGATE.sub(_ANY, text)


def _apart(found: list[_Match], until: int) -> tuple[list[Place], list[_Match]]:
    """Those that count of the places that overlap none that reach beyond a place, in order; and the others."""
    found.sort()
    settled: list[Place] = []
    tangle: list[_Match] = []
    reach = 0
    for number, match in enumerate(found):
        start, end, _, _ = match
        if start < reach:
            tangle.append(match)
        else:
            if len(tangle) == 1:  # as mostly
                settled.append((tangle[0][0], tangle[0][1], tangle[0][3]))
            elif tangle:
                settled += _longest(tangle)
            tangle = [match]
        if end > reach:
            reach = end
            if reach > until:
                return settled, found[number + 1 - len(tangle) :]
    return settled + _longest(tangle), []


def _longest(tangle: list[_Match]) -> list[Place]:
    """Of places that overlap each other those that count, in order."""
    first = min((start for start, _, _, _ in tangle), default=0)
    taken = bytearray(max((end for _, end, _, _ in tangle), default=0) - first)
    kept = []
    for start, end, _, needle in sorted(tangle, key=lambda match: (match[2], match[0])):
        # Those before are as long at least: none lies inside.
        if not taken[start - first] and not taken[end - 1 - first]:
            taken[start - first : end - first] = b"\1" * (end - start)
            kept.append((start, end, needle))
    return sorted(kept)
