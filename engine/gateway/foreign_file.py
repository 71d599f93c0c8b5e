"""Reads a configuration file in somebody else's format: typed values, and a list of what nobody asked for.

Unlike our own files, whose unknown fields are errors, a file made for another program is read as far as it is
understood. What was not read is known at the end, with its line.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from tokenmill.engine.gateway.yaml_file import Place, YamlFile
from tokenmill.errors import ConfigurationError

T = TypeVar("T")

ENVIRONMENT = "os.environ/"
#: YAML 1.1, which other programs read, has these words for true and false.
_FLAGS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
#: Longest text of a value in a message.
_SHOWN = 60


class ForeignFile:
    """A file and what was read of it so far.

    Args:
        file: The parsed file.
        environment: Where `os.environ/NAME` looks first; the process's own environment comes second.
    """

    def __init__(self, file: YamlFile) -> None:
        self.file = file
        self.problems: list[tuple[Place, str]] = []
        self.environment: Mapping[str, str] = {}
        self._read: set[Place] = set()
        self._looked_into: set[Place] = set()
        self._reasons: dict[Place, str] = {}
        self._asked: set[str] = set()

    def problem(self, place: Place, text: str) -> None:
        """Something is wrong at a place; `check` raises it."""
        self.problems.append((place, text))

    @contextmanager
    def for_one(self, place: Place) -> Iterator[list[tuple[Place, str]]]:
        """What turns out to be wrong meanwhile has what stands at this place left out, and not the file refused.

        Gives the list of it.
        """
        earlier, self.problems = self.problems, []
        wrong = self.problems
        yield wrong
        self.problems = earlier
        if wrong:
            at, text = wrong[0]
            inside = at[len(place) :] if at[: len(place)] == place else at
            self.leave(place, f"{dotted(inside)}: {text}" if inside else text)

    def check(self, more: Iterable[str] = ()) -> None:
        """Raises `ConfigurationError` with one line for each problem found so far, then those of other files."""
        lines = [f"{self.file.where(place)}: {dotted(place)}: {text}" for place, text in self.problems]
        lines += more
        if lines:
            raise ConfigurationError("\n".join(dict.fromkeys(lines)))

    def leave(self, place: Place, reason: str) -> None:
        """Says why what stands at a place is not used."""
        self._reasons[place] = reason

    def raw(self, place: Place) -> Any:
        """What stands at a place, None where nothing does; counts as read with all that is inside."""
        value = self.peek(place)
        if value is not None:
            self._read.add(place)
        return value

    def peek(self, place: Place) -> Any:
        """What stands at a place, without reading it."""
        value = self.file.value
        for step in place:
            inside = isinstance(value, (dict, list)) and (
                step in value if isinstance(value, dict) else isinstance(step, int) and step < len(value)
            )
            if not inside:
                return None
            value = value[step]
        return value

    def keys(self, place: Place) -> list[Any]:
        """The keys of a mapping, or the positions of a list; none where there is neither."""
        value = self.peek(place)
        if isinstance(value, list):
            return list(range(len(value)))
        return list(value) if isinstance(value, dict) else []

    def text(self, place: Place) -> str | None:
        """A text, or a number as one; `os.environ/NAME` becomes that variable's value."""
        value = self.raw(place)
        if isinstance(value, str):
            return self._resolved(place, value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        if value is not None:
            self.problem(place, f"{shown(value)} is not text; put it in quotes")
        return None

    def variable(self, place: Place) -> str | None:
        """The name in `os.environ/NAME`, if that is what stands there; the variable is not looked up."""
        value = self.peek(place)
        if not isinstance(value, str) or not value.startswith(ENVIRONMENT):
            return None
        return value.removeprefix(ENVIRONMENT)

    def lookup(self, name: str) -> str | None:
        """A variable's value, in the file or else in the process; None where it is not set."""
        return self.inside(name) or os.environ.get(name, "").strip() or None

    def inside(self, name: str) -> str | None:
        """A variable's value in the file; None where it is not set there."""
        self._asked.add(name)
        return self.environment.get(name) or None

    def not_asked(self) -> list[str]:
        """The file's variables that nobody has asked for."""
        return [name for name in self.environment if name not in self._asked]

    def number(self, place: Place, low: float, high: float) -> float | None:
        """A number within limits."""
        value = self.raw(place)
        if isinstance(value, str) and value.startswith(ENVIRONMENT):
            value = self._resolved(place, value)
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                self.problem(place, f"{shown(value)} is not a number")
                return None
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.problem(place, f"{shown(value)} is not a number")
            return None
        if not low <= value <= high:
            self.problem(place, f"{value:g} is outside {low:g} to {high:g}")
            return None
        return value

    def whole(self, place: Place, low: int, high: int) -> int | None:
        """A whole number within limits."""
        value = self.number(place, low, high)
        if value is not None and value != int(value):
            self.problem(place, f"{value:g} is not a whole number")
            return None
        return None if value is None else int(value)

    def flag(self, place: Place) -> bool:
        """True or false; false where nothing stands."""
        value = self.raw(place)
        if isinstance(value, str) and value.startswith(ENVIRONMENT):
            value = self._resolved(place, value)
        if isinstance(value, str) and value.lower() in _FLAGS:
            return _FLAGS[value.lower()]
        if value is not None and not isinstance(value, bool):
            self.problem(place, f"{shown(value)} is not true or false")
        return value is True

    def kind(self, place: Place, expected: type[T], what: str) -> T | None:
        """The value at a place if it is of this type; anything else but nothing is a problem.

        It is not read by it, but looked into: what of it is left over is told piece by piece.
        """
        value = self.peek(place)
        self._looked_into.add(place)
        if value is None:
            self._read.add(place)
            return None
        if not isinstance(value, expected):
            self.problem(place, f"{shown(value)} is not {what}")
            self._read.add(place)
            return None
        return value

    def left_over(self) -> Iterator[tuple[Place, str]]:
        """What was not read, the outermost places that nobody looked into, with the reason where one was given."""
        inside = (*self._read, *self._reasons, *self._looked_into)
        known = {place[:length] for place in inside for length in range(len(place) + 1)}
        yield from self._unread((), known)

    def _unread(self, place: Place, known: set[Place]) -> Iterator[tuple[Place, str]]:
        if place in self._reasons:
            yield place, self._reasons[place]
        elif place in self._read:
            return
        elif place and place not in known:
            if self.peek(place) not in ({}, [], None):
                yield place, ""
        else:
            for key in self.keys(place):
                yield from self._unread((*place, key), known)

    def _resolved(self, place: Place, value: str) -> str | None:
        if not value.startswith(ENVIRONMENT):
            return value
        name = value.removeprefix(ENVIRONMENT)
        found = self.lookup(name)
        if found is None:
            self.problem(place, f"the variable {name[:_SHOWN]} is not set; export it")
            return None
        return found


def dotted(place: Place) -> str:
    """A place as people write it: `model_list[0].litellm_params`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    return "".join(letter if letter.isprintable() else "?" for letter in text.lstrip(".")[:200]) or "the file"


def shown(value: Any) -> str:
    """A value in a message, shortened."""
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
