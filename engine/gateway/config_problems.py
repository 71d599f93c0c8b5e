"""What pydantic finds wrong with a configuration, in one line each: where, what, and what to do about it."""

import math
import re
from collections.abc import Iterator
from typing import Any

from pydantic_core import ErrorDetails

from tokenmill.engine.gateway import yaml_file

#: What a value should have been, by pydantic's type of error.
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping of fields",
    "model_type": "a mapping of fields",
}


#: Fields whose values are shown to nobody.
_SECRETS = frozenset({"api_key", "master_key"})


def explain(details: ErrorDetails, file: yaml_file.YamlFile) -> Iterator[str]:
    """One line per problem that pydantic reports."""
    kind, found = details["type"], details.get("input")
    place = _place(details["loc"], file)
    if kind == "missing":
        place = (*place, details["loc"][-1])
    if kind == "unknown_fields":
        for key, hint in details["ctx"]["hints"].items():
            yield f"{file.where((*place, key))}: {_dotted((*place, key))}: unknown field; {hint}"
        return
    at = f"{file.where(place)}: {_dotted(place)}: "
    if place and place[-1] in _SECRETS and kind != "missing":
        yield f"{at}is no key; it has printable characters and no blanks"
        return
    if kind == "missing":
        yield f"{at}is missing; add it (docs/configuration.md describes it)"
    elif kind in _EXPECTED:
        yield f"{at}{shown(found)} is not {_EXPECTED[kind]}{_quoting_hint(kind, found)}"
    elif kind == "value_error":
        yield at + str(details["ctx"]["error"])
    elif isinstance(found, (dict, list)):
        yield at + details["msg"].lower()
    else:
        yield f"{at}{shown(found)}: {details['msg'][:1].lower()}{details['msg'][1:]}"


def _place(loc: tuple[int | str, ...], file: yaml_file.YamlFile) -> yaml_file.Place:
    """pydantic's location without the steps that do not stand in the file (tags of unions)."""
    place: yaml_file.Place = ()
    value = file.value
    for step in loc:
        inside = (isinstance(value, dict) and step in value) or (
            isinstance(value, list) and isinstance(step, int) and step < len(value)
        )
        if inside:
            value = value[step]
            place = (*place, step)
    return place


def _dotted(place: yaml_file.Place) -> str:
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    return text.lstrip(".") or "the file"


def shown(value: Any) -> str:
    """A value of the file in a message, shortened."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _quoting_hint(kind: str, found: Any) -> str:
    if kind == "string_type" and isinstance(found, (bool, int, float)):
        return f'; put it in quotes: "{shown(found)}"'
    if kind in ("int_type", "float_type") and isinstance(found, str) and re.fullmatch(r"[-+0-9.]+", found):
        return "; remove the quotes"
    return ""
