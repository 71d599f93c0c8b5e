"""What every part of the configuration file has in common: strict fields, and help with misspelt ones."""

import difflib
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


def nearest(word: str, known: list[str]) -> str:
    """A hint for a misspelt word: the nearest known one, or all of them."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"


class Section(BaseModel):
    """A part of the file: no unknown fields, no silent conversion between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    #: Fields of an alternative to this section; a misspelt one is recognised, too.
    hinted_fields: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _only_known_fields(cls, value: Any) -> Any:
        if isinstance(value, dict):
            unknown = [key for key in value if key not in cls.model_fields]
            if unknown:
                known = [*cls.model_fields, *cls.hinted_fields]
                hints = {key: nearest(str(key), known) for key in unknown}
                raise PydanticCustomError("unknown_fields", "unknown fields", {"hints": hints})
        return value
