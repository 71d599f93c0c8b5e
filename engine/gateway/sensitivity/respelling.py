"""Changes strings of a JSON text; all else stays as it is spelt: numbers, blanks, escapes, names that stand twice."""

import json
import re
from typing import Any

from tokenmill.engine.gateway.sensitivity.redaction import Redaction

_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"')


class _Members(list[tuple[str, Any]]):
    """An object with all of its members in their order."""


_DECODER = json.JSONDecoder(object_pairs_hook=_Members)


def respelled(raw: bytes, content: Any, redaction: Redaction) -> bytes:
    """A JSON text whose strings are those of `content`.

    Args:
        raw: The text.
        content: What it decodes to, with other strings, or nothing, in the place of some.
        redaction: Where a string differs by its values alone, the rest of it keeps its bytes, too.

    Raises:
        ValueError: It is no JSON in UTF-8.
        RecursionError: It is nested too deeply.
    """
    text = raw.decode("utf-8", "surrogatepass")  # halves of characters, as some servers send them
    strings: list[tuple[str, Any]] = []
    _pair(_DECODER.decode(text), content, strings)
    parts: list[str] = []
    done = 0
    for found, (before, after) in zip(_STRING.finditer(text), strings, strict=True):
        if before != after:
            parts += (text[done : found.start()], _spelt(found[0], after, redaction))
            done = found.end()
    return "".join((*parts, text[done:])).encode("utf-8", "surrogatepass")


def _pair(before: Any, after: Any, strings: list[tuple[str, Any]]) -> None:
    """Adds all strings of a value in the order in which they stand, names too, each with what takes its place."""
    if isinstance(before, str):
        strings.append((before, after))
    elif isinstance(before, _Members):
        # Of those that stand twice the last one was decoded.
        last = None if len(before) == len(after) else {name: place for place, (name, _) in enumerate(before)}
        for place, (name, member) in enumerate(before):
            strings.append((name, name))
            if isinstance(member, (str, list)):
                decoded = last is None or last[name] == place
                _pair(member, after[name] if decoded else _plain(member), strings)
    elif isinstance(before, list):
        for item, other in zip(before, after, strict=True):
            if isinstance(item, (str, list)):
                _pair(item, other, strings)


def _plain(value: Any) -> Any:
    """What nothing takes the place of, as it would have been decoded."""
    if isinstance(value, _Members):
        return {name: _plain(member) for name, member in value}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _spelt(string: str, after: Any, redaction: Redaction) -> str:
    """A JSON string that becomes another one, or nothing."""
    if "[" in string:
        for twice in (False, True):
            restored = redaction.restore_json(string, twice=twice)
            if json.loads(restored) == after:
                return restored
    return json.dumps(after, ensure_ascii="\\u" in string)
