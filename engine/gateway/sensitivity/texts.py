"""The texts of a request as a model will read them: JSON decoded, keys beside values, parts joined where they meet.

Nothing is left out but the model's name: a field that no one knows yet may carry text, too.
"""

import asyncio
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from tokenmill.engine.gateway.body import SLICE_BYTES, Body

#: Strings up to this length are searched together, in one text.
SHORT = 512
#: Numbers below this are no one's.
_LONG_NUMBER = 10**6
#: Stands between short strings: nothing that is looked for reaches across it.
_WALL = "\n\0\0\0\n"
#: How much of neighbouring parts of a message is also read without the seam.
_SEAM = 64
#: Members that hold what cannot be read as text.
_MEDIA = frozenset(
    {
        "image_url",
        "input_image",
        "input_audio",
        "audio_url",
        "video_url",
        "image",
        "audio",
        "video",
        "file",
        "file_data",
    }
)
_CONTENT_FIELDS = frozenset({"messages", "input", "prompt", "documents", "query", "text_1", "text_2"})
_QUOTE, _BRACE, _BRACKET = b'"{['
_TOKEN_IDS = re.compile(rb"\s*(\[\s*)+-?[0-9]")
_DATA_URL = re.compile(r"data:[^,]{0,200};base64,")


class UnreadableError(Exception):
    """The body cannot be read as a model would read it."""


class RepeatedError(UnreadableError):
    """A member stands twice."""

    def __init__(self) -> None:
        super().__init__("a member stands in it twice")


class Texts:
    """What there is to search.

    Attributes:
        long: Long strings, one by one.
        unreadable: What cannot be searched, in a word; empty: nothing.
    """

    def __init__(self) -> None:
        self.long: list[str] = []
        self.unreadable = ""
        self._short: list[str] = []
        self._joined: str | None = None

    def all(self) -> Iterator[str]:
        """Every text; the short ones together as the last."""
        yield from self.long
        if self._short:
            yield "".join(self._short)

    def add(self, key: str, text: str) -> None:
        """One string and the name it stands under."""
        if key == "text":
            # Where one part of a message ends and the next begins: templates join them without a seam.
            if self._joined:
                self._short.append(self._joined + text[:_SEAM] + _WALL)
            self._joined = ((self._joined or "") + text[-_SEAM:])[-_SEAM:]
        if len(text) <= SHORT:
            self._short.append(f"{key}: {text}{_WALL}" if key else text + _WALL)
            return
        if key:
            self._short.append(key + _WALL)
        if _DATA_URL.match(text):
            self.unreadable = "a file"
        else:
            self.long.append(text)

    def new_list(self) -> None:
        """What follows does not join what was before."""
        self._joined = None

    def walk(self, value: Any, key: str = "", *, content: bool = True) -> None:
        """Collects the strings of a decoded value, in the order in which they stand."""
        if isinstance(value, str):
            self.add(key, value)
        elif isinstance(value, dict):
            for name, member in value.items():
                if content and name in _MEDIA and member is not None:
                    self.unreadable = "a picture, sound or file"
                if isinstance(member, (dict, list)):
                    self.add("", name)
                self.walk(member, name, content=content)
        elif isinstance(value, list):
            self.new_list()
            for item in value:
                self.walk(item, key, content=content)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) >= _LONG_NUMBER:
            self.add(key, str(value))
        elif key:
            self._short.append(key + _WALL)


async def texts_of(body: Body, query: str = "") -> Texts:
    """Everything to search in a request; long bodies are decoded in slices with the event loop running between.

    Raises:
        UnreadableError: A field holds broken JSON.
    """
    texts = Texts()
    _check_distinct(memoryview(body.raw), {name: body.view(name) or memoryview(b"") for name in body.names()})
    if query:
        texts.add("", query)
    for name in body.names():
        raw = body.view(name)
        if raw is None or name == "model":
            continue
        texts.add("", name)
        try:
            await _collect(texts, raw, name, content=name in _CONTENT_FIELDS)
        except RepeatedError:
            raise
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise UnreadableError(f"the field {name} cannot be decoded") from None
    return texts


async def _collect(texts: Texts, raw: memoryview, key: str, *, content: bool) -> None:
    if content and key in ("prompt", "input") and _TOKEN_IDS.match(raw):
        texts.unreadable = "token ids"
    elif len(raw) <= SLICE_BYTES:
        texts.walk(_DECODER.decode(str(raw, "utf-8")), key, content=content)
    elif raw[0] == _QUOTE:
        texts.add(key, await _long_string(raw))
    elif raw[0] == _BRACE:
        await asyncio.sleep(0)
        members = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        _check_distinct(raw, {name: memoryview(member) for name, member in members.items()})
        for name, member in members.items():
            if content and name in _MEDIA:
                texts.unreadable = "a picture, sound or file"
            texts.add("", name)
            await _collect(texts, memoryview(member), name, content=content)
    elif raw[0] == _BRACKET:
        await asyncio.sleep(0)
        done = 0
        texts.new_list()
        for item in msgspec.json.decode(raw, type=list[msgspec.Raw]):
            view = memoryview(item)
            await _collect(texts, view, key, content=content)
            done += len(view) + 64
            if done > SLICE_BYTES:
                done = 0
                await asyncio.sleep(0)
    else:
        texts.add(key, bytes(raw).decode())


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise RepeatedError
    return members


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct)
_NAME = re.compile(rb'\s*[{,]\s*("(?:[^"\\]|\\.)*")\s*:\s*')


def _check_distinct(raw: memoryview, members: Mapping[str, memoryview]) -> None:
    """Raises where a member stands twice: only one of the two was decoded, but both would be sent."""
    place = 0
    for member in members.values():
        found = _NAME.match(raw, place)
        if found is None or not _stands_at(raw, found.end(), member):
            raise RepeatedError
        place = found.end() + len(member)
    if bytes(raw[place:]).strip() not in (b"}", b"{}"):
        raise RepeatedError


def _stands_at(raw: memoryview, place: int, member: memoryview) -> bool:
    """Whether a member's two ends stand where it would; where another does, the walk does not end at the brace."""
    stop, edge = place + len(member), min(_SEAM, len(member))
    return raw[place : place + edge] == member[:edge] and raw[stop - edge : stop] == member[len(member) - edge :]


async def _long_string(raw: memoryview) -> str:
    """Decodes a JSON string piece by piece."""
    parts = []
    start, last = 1, len(raw) - 1
    await asyncio.sleep(0)
    while start < last:
        stop = min(start + SLICE_BYTES, last)
        while stop < last and stop > start + 12 and _inside(raw, stop):
            stop -= 1
        if stop <= start + 12:
            stop = last  # nothing but escapes: in one go
        parts.append(msgspec.json.decode(b'"' + bytes(raw[start:stop]) + b'"', type=str))
        start = stop
        await asyncio.sleep(0)
    return "".join(parts)


def _inside(raw: memoryview, place: int) -> bool:
    """Whether a cut here could fall inside an escape (a surrogate pair has 12 bytes) or a character."""
    return b"\\" in bytes(raw[place - 12 : place]) or 0x80 <= raw[place] < 0xC0
