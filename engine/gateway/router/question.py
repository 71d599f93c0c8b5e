"""The text of a request's last message, which rules and the classifier look at; of a long one its two ends.

Decoding takes time with a text's length: only the ends of a long one are decoded, as the text that they are.
"""

from collections.abc import Sequence

import msgspec

#: Of a longer text, this much of its beginning and of its end is looked at.
END_BYTES = 4096
#: Up to this length all is decoded.
_LONG = 16_384
#: The longest that one character can be in JSON: two escapes of a surrogate.
_CHARACTER = 12
_QUOTE = ord('"')
_TEXT = msgspec.json.Decoder(str)
_WRONG = (msgspec.MsgspecError, UnicodeDecodeError)


def text_of(raw: memoryview) -> bytes:
    """A JSON string in Latin-1; of any other value the JSON itself, or its ends."""
    try:
        if len(raw) <= _LONG:
            return _ends(_TEXT.decode(raw))
        if raw[0] == _QUOTE:
            return _latin(_beginning(raw, END_BYTES)) + b"\n" + _latin(_end(raw, END_BYTES))
    except _WRONG:
        pass
    return bytes(raw) if len(raw) <= 2 * END_BYTES else bytes(raw[:END_BYTES]) + b"\n" + bytes(raw[-END_BYTES:])


def text_of_parts(texts: Sequence[msgspec.Raw | str]) -> bytes:
    """The texts of a message's parts by lines, in Latin-1.

    Args:
        texts: JSON, of which what is no string, or an empty one, is left out; or text.
    """
    head, whole = _side(texts, at_end=False)
    if whole:
        return _ends("\n".join(head))
    tail, _ = _side(texts[::-1], at_end=True)
    return _latin("\n".join(head)) + b"\n" + _latin("\n".join(reversed(tail)))


def _latin(text: str) -> bytes:
    return text.encode("latin-1", "replace")


def _ends(text: str) -> bytes:
    if len(text) <= 2 * END_BYTES:
        return _latin(text)
    return _latin(text[:END_BYTES]) + b"\n" + _latin(text[-END_BYTES:])


def _side(texts: Sequence[msgspec.Raw | str], *, at_end: bool) -> tuple[list[str], bool]:
    """(the first of the texts, of the last one its beginning or end, as far as is looked at; whether that is all)."""
    found: list[str] = []
    left = END_BYTES
    for text in texts:
        if left <= 0:
            return found, False
        raw = memoryview(text if isinstance(text, msgspec.Raw) else msgspec.json.encode(text))
        if raw[0] != _QUOTE or len(raw) <= len('""'):
            continue
        found.append(_end(raw, left) if at_end else _beginning(raw, left))
        left -= len(raw)
    return found, left >= 0


def _beginning(string: memoryview, size: int) -> str:
    """What the first bytes of a JSON string say; a character that they cut is left out."""
    if len(string) <= size:
        return _TEXT.decode(string)
    for cut in range(_CHARACTER):
        try:
            return _TEXT.decode(b'%b"' % bytes(string[: max(size - cut, 1)]))
        except _WRONG:
            continue
    return ""


def _end(string: memoryview, size: int) -> str:
    """What the last bytes say; of an escape that they cut its rest may stand in front."""
    if len(string) <= size:
        return _TEXT.decode(string)
    for cut in range(_CHARACTER):
        try:
            return _TEXT.decode(b'"' + bytes(string[min(len(string) - size + cut, len(string) - 1) :]))
        except _WRONG:
            continue
    return ""
