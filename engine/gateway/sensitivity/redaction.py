"""Placeholders in the place of data, and the data back in the place of the placeholders.

Every value gets a placeholder `[KIND_N]` that occurs nowhere else in the request, so that putting the values back is
exact: an answer that repeats the request word for word is the unredacted request word for word.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from tokenmill.engine.gateway.body import Body


class Redaction:
    """The placeholders of one request.

    Args:
        values: What is to be replaced, each with its kind.
        taken: The request's body: no placeholder may occur in it.
    """

    def __init__(self, values: Mapping[str, str], taken: bytes) -> None:
        if b"\\u" in taken:
            taken = msgspec.json.encode(msgspec.json.decode(taken))
        self.placeholders: dict[str, str] = {}
        counts: dict[str, int] = {}
        for value, kind in values.items():
            counts[kind] = counts.get(kind, 0) + 1
            self.placeholders[value] = f"[{_label(kind, taken)}_{counts[kind]}]"
        self._values = {placeholder: value for value, placeholder in self.placeholders.items()}
        self._ordered = sorted(self.placeholders.items(), key=lambda pair: -len(pair[0]))
        # Replacing one after the other is a hundred times faster, and the same, where none can touch a placeholder.
        self._plain = not any(
            "[" in value or "]" in value or any(value in mark for mark in self._values) for value in self.placeholders
        )
        self._data = _alternatives(self.placeholders)
        self._marks = _alternatives(self._values)
        self.longest = max(map(len, self._values), default=0)

    def hide(self, text: str) -> str:
        """The text with placeholders."""
        if self._plain:
            for value, placeholder in self._ordered:
                text = text.replace(value, placeholder)
            return text
        return self._data.sub(lambda match: self.placeholders[match[0]], text)

    def restore(self, text: str) -> str:
        """The text with the values back."""
        return self._marks.sub(lambda match: self._values[match[0]], text) if "[" in text else text

    def restore_json(self, text: str) -> str:
        """The same inside a text that is JSON itself (arguments of a tool): values are escaped as JSON wants it."""
        if "[" not in text:
            return text
        return self._marks.sub(lambda match: json.dumps(self._values[match[0]], ensure_ascii=False)[1:-1], text)

    def held_back(self, text: str) -> int:
        """How many characters at the text's end may be the beginning of a placeholder."""
        start = text.rfind("[", max(len(text) - self.longest, 0))
        if start < 0:
            return 0
        tail = text[start:]
        return len(tail) if any(mark.startswith(tail) and mark != tail for mark in self._values) else 0

    def body(self, body: Body) -> Body:
        """A request's body with placeholders in all of its strings; fields without any keep their bytes."""
        changes: dict[str, Any] = {}
        for name in body.names():
            raw = body.raw_field(name)
            if raw is not None and name != "model":
                value = msgspec.json.decode(raw)
                hidden = mapped(value, self.hide)
                if hidden != value:
                    changes[name] = hidden
        return Body(body.with_fields(changes))


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every string (not the names of members) changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {name: mapped(member, change) for name, member in value.items()}
    if isinstance(value, list):
        return [mapped(item, change) for item in value]
    return value


def _alternatives(texts: Mapping[str, str]) -> re.Pattern[str]:
    """One pattern for all of them, longer ones first: a value may contain another."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)")


def _label(kind: str, taken: bytes) -> str:
    """The kind in capitals, with a number where the request itself holds something that looks like a placeholder."""
    label = re.sub(r"[^A-Z]", "_", kind.upper())
    number = 0
    while f"[{label}{number or ''}_".encode() in taken:
        number += 1
    return f"{label}{number or ''}"
