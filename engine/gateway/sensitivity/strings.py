"""Long JSON strings, decoded and encoded piece by piece so that other requests run in between."""

import json
import re

import msgspec

from tokenmill.engine.gateway.body import SLICE_BYTES
from tokenmill.engine.gateway.sensitivity.turns import Turns

#: The longest beginning of a string's inside that ends with no escape cut, nor a pair of them that is one character.
_WHOLE = re.compile(
    rb"[^\"\\]*(?:\\(?:[^u]|u(?![dD][89abAB])[0-9A-Fa-f]{4}|u[dD][89abAB][0-9A-Fa-f]{2}\\u[0-9A-Fa-f]{4})[^\"\\]*){0,4096}"
)


async def decoded(raw: memoryview, turns: Turns) -> str:
    """The text of a JSON string.

    Args:
        raw: The string, UTF-8, with its quotes.
        turns: Says when others run.

    Raises:
        msgspec.DecodeError: It is none.
        DetectorError: It took too long.
    """
    parts = []
    start, last = 1, len(raw) - 1
    while start < last:
        found = _WHOLE.match(raw, start, min(start + SLICE_BYTES, last))
        stop = found.end() if found else start
        while stop < last and 0x80 <= raw[stop] < 0xC0:
            stop -= 1  # not inside a character
        if stop <= start:
            stop = last  # no JSON string; the decoder says so
        parts.append(msgspec.json.decode(b'"%b"' % bytes(raw[start:stop]), type=str))
        start = stop
        if turns.due():
            await turns.give()
    if len(raw) > SLICE_BYTES:
        await turns.give()
    return "".join(parts)


async def encoded(text: str, turns: Turns) -> str:
    """A text as a JSON string.

    Args:
        text: The text.
        turns: Says when others run.

    Raises:
        DetectorError: It took too long.
    """
    parts = ['"']
    for start in range(0, len(text), SLICE_BYTES // 2):
        parts.append(json.dumps(text[start : start + SLICE_BYTES // 2], ensure_ascii=False)[1:-1])
        if turns.due():
            await turns.give()
    return "".join((*parts, '"'))
