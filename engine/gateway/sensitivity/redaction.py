"""Placeholders in the place of data, and the data back in the place of the placeholders.

Every value gets a placeholder `[KIND_N]` that occurs nowhere else in the request, so that putting the values back is
exact: an answer that repeats the request word for word is the unredacted request word for word.
"""

import functools
import hashlib
import json
import re
from collections.abc import Mapping

import msgspec

from tokenmill.engine.gateway.body import SLICE_BYTES, Body
from tokenmill.engine.gateway.sensitivity.needles import Needles, TangleError
from tokenmill.engine.gateway.sensitivity.strings import decoded, encoded
from tokenmill.engine.gateway.sensitivity.turns import DetectorError, Turns

#: What every placeholder looks like.
_MARK = re.compile(r"\[[A-Z0-9_]+\]")
#: The rest of a string in a JSON text; of one with very many escapes the beginning of the rest.
_REST = re.compile(r'[^"\\]*(?:\\.[^"\\]*){0,4096}')
#: An escape that may hide a character of a placeholder, how long it is, and how much is looked at in one go.
_ESCAPE, _ESCAPE_BYTES, _SLICE = re.compile(rb"\\u00([0-9A-Fa-f]{2})"), 6, 16 * 1024
#: What follows the name of a member.
_COLON = re.compile(r"\s*:")
#: Members with a text that is JSON itself: arguments of tools.
JSON_TEXTS = frozenset({"arguments", "partial_json"})


class BrokenJsonError(Exception):
    """A text that is JSON would be none with placeholders in it."""


class Redaction:
    """The placeholders of one request.

    Args:
        values: What is to be replaced, each with its kind.
        taken: The request's body, `unescaped`: no placeholder may occur in it.
    """

    def __init__(self, values: Mapping[str, str], taken: bytes) -> None:
        labels = {kind: _label(kind, taken) for kind in dict.fromkeys(values.values())}
        self.placeholders: dict[str, str] = {}
        counts = dict.fromkeys(labels.values(), 0)
        for value, kind in values.items():
            label = labels[kind]
            counts[label] += 1
            self.placeholders[value] = f"[{label}_{counts[label]}]"
        self._values = {placeholder: value for value, placeholder in self.placeholders.items()}
        self._labels = [f"[{label}_" for label in counts]
        self._needles = Needles(self.placeholders)
        #: The values that were found in what was hidden so far.
        self.hidden: set[str] = set()
        self._longest = max(map(len, self._values), default=0)

    async def hide(self, text: str, turns: Turns) -> str:
        """The text with placeholders; of values that overlap the longer one gets its own.

        Args:
            text: Any text of the request.
            turns: Says when others run.

        Raises:
            DetectorError: It took too long, or the values cannot be told apart.
        """
        pieces: list[str] = []
        done = 0
        try:
            for places in self._needles.places(text):
                for start, end, value in places:
                    pieces += (text[done:start], self.placeholders[value])
                    self.hidden.add(value)
                    done = end
                if turns.due():
                    await turns.give()
        except TangleError:
            raise DetectorError("too much of what was found overlaps") from None
        return "".join((*pieces, text[done:])) if pieces else text

    async def left(self, turns: Turns) -> bool:
        """Whether a value stands in none of the texts that were hidden: pieces of it are in several.

        A value inside of another went with that. An address at a part's end that the next part's first word continues
        counts as what it is without the word.

        Args:
            turns: Says when others run.

        Raises:
            DetectorError: It took too long.
        """
        gone = "\0".join(self.hidden)
        for value in self.placeholders:
            if value not in self.hidden and value not in gone and not self._without_a_word(value):
                return True
            if turns.due():
                await turns.give()
        return False

    def _without_a_word(self, value: str) -> bool:
        """Whether an address was hidden that goes on with a word here."""
        end = len(value)
        while "@" in value and end and value[end - 1].isalpha():
            end -= 1
            if value[:end] in self.hidden:
                return True
        return False

    def restore(self, text: str) -> str:
        """The text with the values back."""
        return _MARK.sub(lambda match: self._values.get(match[0], match[0]), text) if "[" in text else text

    def restore_json(self, text: str, *, twice: bool = False) -> str:
        """The same inside a text that is JSON itself (arguments of a tool): values are escaped as JSON wants it.

        Args:
            text: The text.
            twice: It is JSON in a string of JSON.
        """
        if "[" not in text:
            return text
        escaped = self._escaped[1 if twice else 0]
        return _MARK.sub(lambda match: escaped.get(match[0], match[0]), text)

    @functools.cached_property
    def _escaped(self) -> tuple[dict[str, str], dict[str, str]]:
        """The values as they stand in JSON, and in JSON in a string of JSON."""
        once = {placeholder: json.dumps(value, ensure_ascii=False)[1:-1] for placeholder, value in self._values.items()}
        return once, {placeholder: json.dumps(value, ensure_ascii=False)[1:-1] for placeholder, value in once.items()}

    def may_be_in(self, raw: bytes) -> bool:
        """Whether a placeholder may stand in a text, which may be JSON that escapes any of its characters."""
        return b"\\u00" in raw or any(label.encode() in raw for label in self._labels)

    def held_back(self, text: str) -> int:
        """How many characters at the text's end may be the beginning of a placeholder."""
        start = text.rfind("[", max(len(text) - self._longest, 0))
        return len(text) - start if start >= 0 and self._begins(text[start:]) else 0

    def _begins(self, text: str) -> bool:
        """Whether a text is the beginning of a placeholder, but for its last character."""
        # Numbers begin with 1: all that a number begins with are numbers of placeholders, too.
        return f"{text}]" in self._values or any(label.startswith(text) for label in self._labels)

    async def body(self, body: Body, turns: Turns) -> Body:
        """A request's body with placeholders in its strings; everything else, numbers too, keeps its bytes.

        Args:
            body: The request's.
            turns: Says when others run.

        Raises:
            BrokenJsonError: Arguments of a tool would be no JSON any more.
            DetectorError: It took too long.
        """
        changes: dict[str, msgspec.Raw] = {}
        for name in body.names():
            raw = body.raw_field(name)
            if raw is not None and name != "model":
                hidden = await self._field(name, raw.decode(), turns)
                if hidden is not None:
                    changes[name] = msgspec.Raw(hidden.encode())
                if turns.due():
                    await turns.give()
        whole = body.with_fields(changes)
        if turns.due() or len(whole) > SLICE_BYTES:
            await turns.give()
        return Body(whole)

    async def _field(self, name: str, raw: str, turns: Turns) -> str | None:
        """A field's JSON text with placeholders in its strings, not in names; None where it holds none of the data."""
        parts: list[str] = []
        done, start = 0, raw.find('"')
        while start >= 0:
            end = start + 1
            while raw[end := _end(raw, end)] != '"':
                if turns.due():
                    await turns.give()
            end += 1
            piece = raw[start:end]
            if _COLON.match(raw, end):
                name = json.loads(piece)
            else:
                if "\\" not in piece:
                    text = piece[1:-1]
                elif len(piece) <= SLICE_BYTES:
                    text = json.loads(piece)
                else:
                    text = await decoded(memoryview(piece.encode()), turns)
                hidden = await self.hide(text, turns)
                if hidden != text:
                    if name in JSON_TEXTS and not _stays_json(text, hidden):
                        raise BrokenJsonError
                    parts += (raw[done:start], await encoded(hidden, turns))
                    done = end
            if turns.due():
                await turns.give()
            start = raw.find('"', end)
        return "".join((*parts, raw[done:])) if parts else None


async def unescaped(raw: bytes, turns: Turns) -> bytes:
    """A JSON text with `\\u00..` escapes taken off, also where they are none: to see what could be read in it."""
    if b"\\u00" not in raw:
        return raw
    parts, start = [], 0
    while start < len(raw):
        stop = start + _SLICE
        cut = raw.rfind(b"\\", stop - _ESCAPE_BYTES + 1, stop)
        stop = stop if cut < 0 else cut
        parts.append(_ESCAPE.sub(lambda match: bytes((int(match[1], 16),)), raw[start:stop]))
        start = stop
        if turns.due():
            await turns.give()
    return b"".join(parts)


def _stays_json(text: str, hidden: str) -> bool:
    """Whether a text is JSON with placeholders if it was without."""
    return _is_json(hidden) or not _is_json(text)


def _is_json(text: str) -> bool:
    try:
        # Checks all of it and makes nothing of it: a millisecond for a megabyte.
        msgspec.json.decode(text, type=msgspec.Raw)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return False
    return True


def _end(raw: str, place: int) -> int:
    """Where a string ends; of one with very many escapes where the next of them stands."""
    quote = raw.find('"', place)
    if raw.find("\\", place, quote) < 0:
        return quote
    found = _REST.match(raw, place)
    return found.end() if found else place


def _label(kind: str, taken: bytes) -> str:
    """The kind in capitals, with a number where the request itself holds something that looks like a placeholder."""
    label = re.sub(r"[^A-Z]", "_", kind.upper())
    for number in ("", "1", "2", "3"):
        if f"[{label}{number}_".encode() not in taken:
            return label + number
    # A request may hold any of the short ones, but not the hash of itself.
    return f"{label}{int.from_bytes(hashlib.blake2b(taken, digest_size=8).digest())}"
