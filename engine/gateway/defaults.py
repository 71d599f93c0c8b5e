"""What a backend's configuration adds to chat completions that do not say it themselves."""

from collections.abc import Mapping
from typing import Any

from tokenmill.engine.gateway.body import DECISIVE, Body

PATH = "/v1/chat/completions"
#: Each of these says how long an answer may be: who says one wants no other.
LENGTHS = frozenset({"max_tokens", "max_completion_tokens"})
#: Each of these says how hard a model is to think.
_EFFORTS = frozenset({"reasoning_effort", "thinking"})
#: What is decided before a backend is chosen, by what the client wrote.
NEVER = DECISIVE - LENGTHS


def defaults_for(defaults: Mapping[str, Any], endpoint: str, body: Body) -> dict[str, Any]:
    """Those of the defaults that a request lacks, or has as null; none where it is no chat completion."""
    if endpoint != PATH:
        return {}
    said = {name for name in (*defaults, *LENGTHS, *_EFFORTS) if body.raw_field(name) not in (None, b"null")}
    for same in (LENGTHS, _EFFORTS):
        if said & same:
            said |= same
    return {name: value for name, value in defaults.items() if name not in said}


def longest(defaults: Mapping[str, Any]) -> int:
    """The longest answer, in tokens, that the defaults alone let a request have; 0: they do not say."""
    lengths = [value for name, value in defaults.items() if name in LENGTHS]
    return max((value for value in lengths if isinstance(value, int)), default=0)
