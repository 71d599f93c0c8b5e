"""Reads a YAML configuration file strictly, and remembers on which line each value stands.

YAML 1.2's core schema is used, so that `no`, `on`, `1:30` and `010` stay what they look like. Refused with the
line: tags, several documents, and files that are too large, too deep or expand (through aliases) to too many values.
Aliases that repeat a value are fine, and so are YAML 1.1's merge keys (`<<: *base`), as many have. Keys that stand more
than once are remembered: they are mistakes of our own files, while other programs take the last.
"""

import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tokenmill.errors import ConfigurationError

#: Place of a value: the keys and list positions that lead to it.
Place = tuple[str | int, ...]

MOST_BYTES = 1 << 20
MOST_VALUES = 20_000
MOST_DEPTH = 32

_TAG = "tag:yaml.org,2002:"
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?[0-9]+$|^0o[0-7]+$|^0x[0-9a-fA-F]+$")
_FLOAT = re.compile(
    r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
)


class _CoreSchemaLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the plain scalars of YAML 1.2's core schema instead of YAML 1.1's."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML extends the one that the class itself has


_PATTERNS = {"null": _NULL, "bool": _BOOL, "int": _INT, "float": _FLOAT}
for _name, _first in (
    ("null", ["~", "n", "N", ""]),
    ("bool", list("tTfF")),
    ("int", list("-+0123456789")),
    ("float", list("-+.0123456789")),
):
    _CoreSchemaLoader.add_implicit_resolver(_TAG + _name, _PATTERNS[_name], _first)


@dataclass
class YamlFile:
    """The content of one file.

    Attributes:
        path: Where it was read from; messages start with it.
        value: Its content as dicts, lists and scalars.
        lines: Line, from 1, of each key and list item.
        paths: Files of those that stand in another one, which was included.
        repeated: Keys that stand more than once in one mapping, of which the last counts, and the lines of the others.
    """

    path: Path
    value: Any = None
    lines: dict[Place, int] = field(default_factory=dict)
    paths: dict[Place, Path] = field(default_factory=dict)
    repeated: dict[Place, list[int]] = field(default_factory=dict)

    def where(self, place: Place) -> str:
        """`file:line` of the value at a place, or of the nearest value around it."""
        while place and place not in self.lines:
            place = place[:-1]
        return f"{self.paths.get(place, self.path)}:{self.lines.get(place, 1)}"

    def refuse_repeated(self) -> None:
        """Raises `ConfigurationError` if a key stands more than once; one line for the first."""
        for place, (line, *_) in self.repeated.items():
            raise ConfigurationError(
                f"{self.where(place)}: {place[-1]!r} stands here and on line {line}; keep one of them"
            )


def read(path: Path) -> YamlFile:
    """Reads one file.

    Raises:
        ConfigurationError: It cannot be read or is not acceptable YAML; the message starts with `file:line`.
    """
    try:
        with path.open("rb") as opened:
            raw = opened.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from None
    if len(raw) > MOST_BYTES:
        raise ConfigurationError(f"{path} is too long; a configuration has at most {MOST_BYTES} bytes")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigurationError(
            f"{path}:{line}: byte {raw[error.start]:#04x} is not UTF-8; save it as UTF-8"
        ) from None
    return _Reader(path).read(text)


class _Reader:
    """One reading of one file; counts what it builds."""

    def __init__(self, path: Path) -> None:
        self._file = YamlFile(path)
        self._values = 0

    def read(self, text: str) -> YamlFile:
        try:
            root = _CoreSchemaLoader(text).get_single_node()
        except yaml.MarkedYAMLError as error:
            raise self._error(_mark_line(error), _explain(error, text)) from None
        except yaml.YAMLError as error:  # a character that YAML forbids
            raise self._error(_character_line(error, text), str(error).splitlines()[0]) from None
        except RecursionError:
            raise self._error(1, f"the values are nested too deep; at most {MOST_DEPTH} levels") from None
        if root is None:
            raise self._error(1, "the file is empty; start from one of examples/*.yaml")
        self._file.value = self._build(root, ())
        return self._file

    def _build(self, node: yaml.Node, place: Place) -> Any:
        line = node.start_mark.line + 1
        self._file.lines.setdefault(place, line)
        self._count(line, len(place))
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._build_mapping(node, place)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self._build_item(item, (*place, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._build_scalar(node, line)
        raise self._error(line, f"the tag {node.tag.replace(_TAG, '!!')} is not accepted; remove it")

    def _build_item(self, node: yaml.Node, place: Place) -> Any:
        # Of a list that stands a second time the lines are others.
        self._file.lines[place] = node.start_mark.line + 1
        return self._build(node, place)

    def _count(self, line: int, depth: int) -> None:
        self._values += 1
        if self._values > MOST_VALUES:
            raise self._error(line, f"the file expands to more than {MOST_VALUES} values; use fewer aliases")
        if depth > MOST_DEPTH:
            raise self._error(line, f"the values are nested too deep; at most {MOST_DEPTH} levels")

    def _build_mapping(self, node: yaml.MappingNode, place: Place) -> dict[Hashable, Any]:
        built: dict[Hashable, Any] = {}
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            if _is_merge(key_node):
                merged.append(value_node)
                continue
            line = key_node.start_mark.line + 1
            key = self._key(key_node)
            at = (*place, key)
            if key in built:
                self._file.repeated.setdefault(at, []).append(self._file.lines[at])
            self._file.lines[at] = line
            built[key] = self._build(value_node, at)
        # What the mapping itself says wins, then the mappings in their order.
        for other in merged:
            for key_node, value_node in self._merged(other, len(place)):
                line, key = key_node.start_mark.line + 1, self._key(key_node)
                self._count(line, len(place))
                if key not in built:
                    self._file.lines[*place, key] = line
                    built[key] = self._build(value_node, (*place, key))
        return built

    def _merged(self, node: yaml.Node, depth: int) -> Iterator[tuple[yaml.Node, yaml.Node]]:
        """Keys and values of a mapping, or of a list of them, that is merged into another."""
        line = node.start_mark.line + 1
        self._count(line, depth)
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                yield from self._merged(item, depth + 1)
        elif isinstance(node, yaml.MappingNode):
            # Of a key that stands twice the last counts, here, too.
            own = {self._key(pair[0]): pair for pair in node.value if not _is_merge(pair[0])}
            yield from own.values()
            for key_node, value_node in node.value:
                if _is_merge(key_node):
                    yield from self._merged(value_node, depth + 1)
        else:
            raise self._error(line, "<< merges mappings; write an alias of one, or a list of them")

    def _key(self, node: yaml.Node) -> str:
        line = node.start_mark.line + 1
        key = self._build_scalar(node, line) if isinstance(node, yaml.ScalarNode) else None
        if not isinstance(key, str):
            shown = node.value if isinstance(node, yaml.ScalarNode) else "a list or mapping"
            raise self._error(line, f"the key {shown} is not text; put it in quotes")
        return key

    def _build_scalar(self, node: yaml.ScalarNode, line: int) -> Any:
        text: str = node.value
        kind = node.tag.removeprefix(_TAG)
        if kind in _PATTERNS and _PATTERNS[kind].match(text) is None:  # as a tag has it
            raise self._error(line, f"the tag !!{kind} does not go with {text[:40]!r}; remove it")
        match kind:
            case "str":
                if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
                    raise self._error(line, "the text holds half of a character (a surrogate); write the whole one")
                return text
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int":
                if len(text) > 30:
                    raise self._error(line, f"the number {text[:12]}... has {len(text)} digits; at most 30")
                number = int(text, 0) if text[:2] in ("0x", "0o") else int(text)
                if not -(1 << 63) <= number < 1 << 63:
                    raise self._error(line, f"the number {text} does not fit into 64 bits")
                return number
            case "float":
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        raise self._error(line, f"the tag {node.tag.replace(_TAG, '!!')} is not accepted; remove it")

    def _error(self, line: int, message: str) -> ConfigurationError:
        return ConfigurationError(f"{self._file.path}:{line}: {message}")


def _is_merge(key: yaml.Node) -> bool:
    return isinstance(key, yaml.ScalarNode) and key.value == "<<" and key.style is None


def _mark_line(error: yaml.MarkedYAMLError) -> int:
    mark = error.problem_mark or error.context_mark
    return mark.line + 1 if mark is not None else 1


def _explain(error: yaml.MarkedYAMLError, text: str) -> str:
    """PyYAML's problem in one line, with a remedy for the usual ones."""
    problem = " ".join(part for part in (error.context, error.problem) if part)
    lines = text.splitlines()
    line = _mark_line(error)
    shown = lines[line - 1] if line <= len(lines) else ""
    if "\t" in shown[: len(shown) - len(shown.lstrip())] or "'\\t'" in problem:
        return "a tab indents this line; YAML accepts only spaces"
    if "expected a single document" in problem:
        return "a second document starts here ('---'); keep one document per file"
    if "mapping values are not allowed" in problem:
        return "a ': ' stands where no key can be; check the indentation, or put the text in quotes"
    return f"not valid YAML: {problem}; check quotes, brackets and indentation"


def _character_line(error: yaml.YAMLError, text: str) -> int:
    position = getattr(error, "position", 0)
    return text.count("\n", 0, position if isinstance(position, int) else 0) + 1
