"""The other files that a LiteLLM proxy's file takes in: `include: [models.yaml]`."""

import os
from pathlib import Path

from tokenmill.engine.gateway import yaml_file
from tokenmill.engine.gateway.foreign_file import dotted
from tokenmill.engine.gateway.yaml_file import Place, YamlFile
from tokenmill.errors import ConfigurationError

_INCLUDE = "include"


def included(file: YamlFile) -> YamlFile:
    """The file with all that it includes, as LiteLLM does it: lists are extended, everything else is replaced.

    A name is looked up beside the file that it stands in, then beside the first one. Each file is taken in once.

    Args:
        file: The parsed file; it is changed.

    Raises:
        ConfigurationError: An included file cannot be read, or is none; one line with the place that names it.
    """
    taken = {file.path.resolve()}
    waiting = _paths(file, file.path)
    while waiting:
        path = waiting.pop(0)
        if path.resolve() in taken:
            continue
        taken.add(path.resolve())
        other = yaml_file.read(path)
        if not isinstance(other.value, dict):
            raise ConfigurationError(f"{path}:1: the file is not a mapping of settings")
        waiting += _paths(other, file.path)
        _take_in(file, other)
    return file


def _paths(file: YamlFile, first: Path) -> list[Path]:
    """The files that one names; the list itself is taken out of it."""
    names = file.value.pop(_INCLUDE, None)
    if names is None:
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigurationError(f"{file.where((_INCLUDE,))}: {_INCLUDE}: is not a list of file names")
    found: list[Path] = []
    for index, name in enumerate(names):
        place: Place = (_INCLUDE, index)
        beside = [one.parent / name for one in (file.path, first)]
        path = next((one for one in beside if os.path.isfile(one)), None)  # noqa: PTH113 - any text may stand there
        if path is None:
            raise ConfigurationError(f"{file.where(place)}: {dotted(place)}: there is no file {str(beside[0])!r}")
        found.append(path)
    return found


def _take_in(file: YamlFile, other: YamlFile) -> None:
    for key, value in other.value.items():
        mine = file.value.get(key)
        extends = isinstance(mine, list) and isinstance(value, list)
        first = len(mine) if extends else 0
        if extends:
            mine.extend(value)
        else:
            file.value[key] = value
            for place in [place for place in file.lines if place[:1] == (key,)]:
                del file.lines[place]
                file.paths.pop(place, None)
        for place, line in other.lines.items():
            if place[:1] != (key,) or (extends and len(place) == 1):
                continue
            at = place
            if extends and isinstance(place[1], int):
                at = (key, first + place[1], *place[2:])
            file.lines[at] = line
            file.paths[at] = other.path
            if place in other.repeated:
                file.repeated[at] = other.repeated[place]
