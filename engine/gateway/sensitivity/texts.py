"""The texts of a request as a model will read them: JSON decoded, keys beside values, parts joined where they meet.

Nothing is left out but the model's name: a field that no one knows yet may carry text, too.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

import msgspec

from tokenmill.engine.gateway.body import SLICE_BYTES, Body
from tokenmill.engine.gateway.sensitivity import unreadable
from tokenmill.engine.gateway.sensitivity.strings import decoded
from tokenmill.engine.gateway.sensitivity.turns import Turns

#: Strings up to this length are searched together.
SHORT = 512
#: As many of them together.
_TOGETHER = 1024
#: Objects and lists up to this length are decoded in one go: at worst, nothing but brackets, some three milliseconds.
_PIECE_BYTES = 48 * 1024
#: Numbers below this are no one's.
_LONG_NUMBER = 10**6
#: Stands between short strings: nothing that is looked for reaches across it.
_WALL = "\n\0\0\0\n"
#: What a zero character of the request itself is searched as: as unseen, and no wall.
_UNSEEN = "\u200b"
#: How much of neighbouring parts of a message is also read as one text.
_SEAM = 64
#: Members that hold a part's text.
_PART_TEXTS = frozenset({"text", "thinking", "refusal"})
_QUOTE, _BRACE, _BRACKET = b'"{['
#: Values that hold no picture, whatever their name.
_NOTHING, _LONGEST_NOTHING = frozenset({b"null", b"false", b"true", b"0", b"[]", b"{}", b'""'}), 6
_NUMBERS = b"-0123456789"
#: Without one of these a list of numbers holds nothing to search.
_SEARCHABLE = re.compile(rb'"|[0-9]{7}')
#: Where a file begins in a data URL; code that puts one together has no file behind the comma. The literal stands first
#: because that is what makes the pattern quick.
_FILE = re.compile(r"64,(?<=(?i:;base64,))\s{0,8}[\w+/%-]{8}")
_LONGEST_FILE_MARK = 32
#: And in a mail's part, behind the lines of its head.
_PART_OF_MAIL = re.compile(
    r"ncoding:[ \t]?(?i:base64)[ \t\r]{0,8}\n(?:[!-9;-~]{1,64}:[^\n]{0,998}\n|[ \t][^\n]{1,998}\n){0,8}\r?\n[\w+/]{16}"
)
_LONGEST_HEAD = 4096


class UnreadableError(Exception):
    """The body cannot be read as a model would read it."""


class RepeatedError(UnreadableError):
    """A member stands twice."""

    def __init__(self) -> None:
        super().__init__("a member stands in it twice")


#: Where the parts so far end, joined without a seam and by lines.
_Ends = tuple[str, str]
_NO_PARTS: _Ends = ("", "")


class Texts:
    """What there is to search.

    Attributes:
        all: Every text: long strings one by one, short ones together (from `finish` on).
        unreadable: What cannot be searched, in a word; empty: nothing.
    """

    def __init__(self) -> None:
        self.all: list[str] = []
        self.unreadable = ""
        self._short: list[str] = []
        self._before = _NO_PARTS

    def add(self, key: str, text: str, *, part: bool = False) -> None:
        """One string, the name it stands under, and whether it is a part of a message itself."""
        if "\0" in text or "\0" in key:
            key, text = key.replace("\0", _UNSEEN), text.replace("\0", _UNSEEN)
        if part or key in _PART_TEXTS:
            self._join(text)
        if len(text) <= SHORT:
            self._short.append(f"{key}: {text}{_WALL}" if key else text + _WALL)
        else:
            self.all.append(f"{key}: {text}" if key else text)

    def _join(self, text: str) -> None:
        """Where one part of a message ends and the next begins: templates join them without a seam, vLLM by a line."""
        direct, lined = self._before
        if direct:
            head = text[:_SEAM] + _WALL
            self._short += (direct + head, f"{lined}\n{head}")
        tail = text[-_SEAM:]
        self._before = _after(self._before, (tail, tail))

    def begin_list(self) -> _Ends:
        """What follows does not join what was before; returns that, for `end_list`."""
        before, self._before = self._before, _NO_PARTS
        return before

    def end_list(self, before: _Ends) -> None:
        """What follows joins what was before the list, with the parts in it in between."""
        self._before = _after(before, self._before)

    async def finish(self, turns: Turns) -> None:
        """Puts short strings together and looks for files in all of the texts."""
        for start in range(0, len(self._short), _TOGETHER):
            self.all.append("".join(self._short[start : start + _TOGETHER]))
            if turns.due():
                await turns.give()
        for text in self.all:
            for start in range(0, len(text), SLICE_BYTES):
                stop = start + SLICE_BYTES
                if _FILE.search(text, start, stop + _LONGEST_FILE_MARK):
                    self.unreadable = "a file"
                elif _PART_OF_MAIL.search(text, start, stop + _LONGEST_HEAD):
                    self.unreadable = "a mail's part in base64"
                if turns.due():
                    await turns.give()

    def walk(self, value: Any, key: str = "", *, content: bool = True, listed: bool = False) -> None:
        """Collects the strings of a decoded value, in the order in which they stand.

        Args:
            value: What `json` decoded.
            key: The name it stands under.
            content: It may hold what cannot be searched; False: settings, arguments of a tool.
            listed: It is an item of a list, a member of `NAMED_PARTS`, or a field that may be a part itself.
        """
        if isinstance(value, str):
            self.add(key, value, part=listed and key in unreadable.PART_LISTS)
        elif isinstance(value, dict):
            kind = value.get("type") if content else None
            if content and unreadable.may_be_part(key, listed) and not unreadable.is_text(kind, value, key):
                self.unreadable = unreadable.PART
            named = key in unreadable.NAMED_PARTS
            for name, member in value.items():
                if content and member and member is not True and unreadable.names_media(name):
                    self.unreadable = unreadable.MEDIA
                if isinstance(member, (dict, list)):
                    self.add("", name)
                    inside = content and not unreadable.is_free(name, kind)
                    self.walk(member, name, content=inside, listed=named)
                else:
                    self.walk(member, name)
        elif isinstance(value, list):
            before = self.begin_list()
            for item in value:
                if isinstance(item, (int, float)) and not isinstance(item, bool):
                    if content:
                        self.unreadable = unreadable.TOKENS
                    if abs(item) < _LONG_NUMBER:
                        continue  # the list's name was taken in once
                self.walk(item, key, content=content, listed=True)
            self.end_list(before)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) >= _LONG_NUMBER:
            self.add(key, str(value))
        elif key:
            self.add("", key)


def _after(before: _Ends, then: _Ends) -> _Ends:
    """Where the parts end when these two ends follow each other."""
    if not (before[0] and then[0]):
        return then if then[0] else before
    return (before[0] + then[0])[-_SEAM:], f"{before[1]}\n{then[1]}"[-_SEAM:]


async def texts_of(body: Body, address: str, turns: Turns) -> Texts:
    """Everything to search in a request; long bodies are decoded in slices with the event loop running between.

    Args:
        body: The request's.
        address: Its path and query string.
        turns: Says when others run.

    Raises:
        UnreadableError: A field holds broken JSON.
        DetectorError: It took too long.
    """
    texts = Texts()
    members = _whole(body.raw)
    if members is not None:
        texts.add("", address)
        for name, value in members.items():
            if name != "model":
                content = _field(texts, body, name)
                try:
                    texts.walk(value, name, content=content, listed=name in unreadable.ASKED)
                except RecursionError:  # a decoder in C may go deeper
                    raise UnreadableError(f"the field {name} cannot be decoded") from None
            if turns.due():
                await turns.give()
        await texts.finish(turns)
        return texts
    views = {name: body.view(name) or memoryview(b"") for name in body.names()}
    await _check_distinct(memoryview(body.raw), views.values(), turns)
    texts.add("", address)
    for name, raw in views.items():
        if name == "model":
            continue
        try:
            content = _field(texts, body, name)
            await _collect(texts, raw, name, turns, content=content, listed=name in unreadable.ASKED)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise UnreadableError(f"the field {name} cannot be decoded") from None
        if turns.due():
            await turns.give()
    await texts.finish(turns)
    return texts


def _whole(raw: bytes) -> dict[str, Any] | None:
    """A short body, decoded in one go; None: a long one, or one that cannot be.

    Raises:
        RepeatedError: A member stands twice in an object.
    """
    if len(raw) > _PIECE_BYTES:
        return None
    try:
        members: dict[str, Any] = _DECODER.decode(raw.decode())
    except (ValueError, RecursionError):
        return None  # field by field it shows which
    return members


def _field(texts: Texts, body: Body, name: str) -> bool:
    """Takes in the name of a field; whether what is in it may be what cannot be searched."""
    texts.add("", name)
    if name in unreadable.SETTINGS:
        return False
    why = unreadable.of_field(name)
    if why and not _asks_for_nothing(name, body.view(name) or memoryview(b"null")):
        texts.unreadable = why
    return True


def _asks_for_nothing(name: str, raw: memoryview) -> bool:
    """Whether a field with the name of sound or pictures holds none: null, or how the answer is to sound."""
    if _is_nothing(raw):
        return True
    spoken = name == "audio" and raw[0] == _BRACE and len(raw) < SHORT
    return spoken and unreadable.SPOKEN.issuperset(msgspec.json.decode(raw))


def _is_nothing(raw: memoryview) -> bool:
    """Whether a value is empty, or only says yes or no."""
    return len(raw) < _LONGEST_NOTHING and bytes(raw) in _NOTHING


async def _collect(
    texts: Texts, raw: memoryview, key: str, turns: Turns, *, content: bool, listed: bool = False
) -> None:
    """`Texts.walk` for a value that is not decoded yet, piece by piece where it is long."""
    if raw[0] == _QUOTE and len(raw) > SLICE_BYTES:
        texts.add(key, await decoded(raw, turns), part=listed and key in unreadable.PART_LISTS)
    elif raw[0] == _QUOTE or len(raw) <= _PIECE_BYTES:
        texts.walk(_DECODER.decode(str(raw, "utf-8")), key, content=content, listed=listed)
    elif raw[0] == _BRACE:
        await _object(texts, raw, key, turns, content=content, listed=listed)
    elif raw[0] == _BRACKET:
        await _list(texts, raw, key, turns, content=content)
    else:
        texts.add(key, bytes(raw).decode())


async def _object(texts: Texts, raw: memoryview, key: str, turns: Turns, *, content: bool, listed: bool) -> None:
    await turns.give()
    members = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    await _check_distinct(raw, map(memoryview, members.values()), turns)
    named = members.get("type") if content else None
    kind = msgspec.json.decode(named) if named is not None and len(memoryview(named)) < SHORT else named
    if content and unreadable.may_be_part(key, listed) and not unreadable.is_text(kind, members, key):
        texts.unreadable = unreadable.PART
    for name, encoded in members.items():
        member = memoryview(encoded)
        if content and not _is_nothing(member) and unreadable.names_media(name):
            texts.unreadable = unreadable.MEDIA
        texts.add("", name)
        inside = content and not unreadable.is_free(name, kind)
        await _collect(texts, member, name, turns, content=inside, listed=key in unreadable.NAMED_PARTS)
        if turns.due():
            await turns.give()


async def _list(texts: Texts, raw: memoryview, key: str, turns: Turns, *, content: bool) -> None:
    before = texts.begin_list()
    if await _nothing_in(raw, turns):
        if content:
            texts.unreadable = unreadable.TOKENS
        texts.end_list(before)
        return
    await turns.give()
    for item in msgspec.json.decode(raw, type=list[msgspec.Raw]):
        view = memoryview(item)
        if content and view[0] in _NUMBERS:
            texts.unreadable = unreadable.TOKENS
        await _collect(texts, view, key, turns, content=content, listed=True)
        if turns.due():
            await turns.give()
    texts.end_list(before)


async def _nothing_in(raw: memoryview, turns: Turns) -> bool:
    """Whether a long list holds no string and no number that is someone's."""
    for start in range(0, len(raw), _PIECE_BYTES):
        if _SEARCHABLE.search(raw, start, start + _PIECE_BYTES + 6):
            return False
        if turns.due():
            await turns.give()
    return True


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise RepeatedError
    return members


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct)
_NAME = re.compile(rb'\s*[{,]\s*("(?:[^"\\]|\\.)*")\s*:\s*')


async def _check_distinct(raw: memoryview, members: Iterable[memoryview], turns: Turns) -> None:
    """Raises where a member stands twice: only one of the two was decoded, but both would be sent."""
    place = 0
    for member in members:
        found = _NAME.match(raw, place)
        if found is None or not _stands_at(raw, found.end(), member):
            raise RepeatedError
        place = found.end() + len(member)
        if turns.due():
            await turns.give()
    if bytes(raw[place:]).strip() not in (b"}", b"{}"):
        raise RepeatedError


def _stands_at(raw: memoryview, place: int, member: memoryview) -> bool:
    """Whether a member's two ends stand where it would; where another does, the walk does not end at the brace."""
    stop, edge = place + len(member), min(_SEAM, len(member))
    return raw[place : place + edge] == member[:edge] and raw[stop - edge : stop] == member[len(member) - edge :]
