"""The configuration's `sensitivity` section."""

from typing import Literal

import re2
from pydantic import Field, field_validator, model_validator

from tokenmill.engine.gateway.sections import Section, nearest
from tokenmill.engine.gateway.sensitivity.kinds import CLASS_OF, CLASSES, NOT_REDACTABLE
from tokenmill.engine.gateway.sensitivity.presidio import kind_of
from tokenmill.engine.gateway.sensitivity.scanner import compile_pattern
from tokenmill.engine.gateway.sensitivity.settings import Action, PresidioSettings, SensitivitySettings, Zone


class PresidioSection(Section):
    """Ask Microsoft Presidio, too (`pip install "tokenmill[presidio]"`): slow, but it knows names."""

    language: str = Field("en", description="Language of the requests, two letters.", pattern=r"^[a-z]{2}$")
    entities: list[str] = Field(
        ["PERSON", "LOCATION"],
        description="Presidio's names of what to look for.",
        min_length=1,
    )
    min_score: float = Field(0.5, description="What it is less sure of is left alone.", ge=0, le=1)
    model: str | None = Field(
        None,
        description="A spaCy model that is installed, e.g. `en_core_web_lg`; without one only Presidio's own patterns "
        "are used, which find no names.",
        min_length=1,
    )


class Sensitivity(Section):
    """Where requests with personal or secret data may go. Without this section nothing is searched."""

    policies: dict[str, Action] = Field(
        default_factory=dict,
        description="Kind of data (`email`, `iban`, ...) or class (`contact`, `financial`, `government`, `person`, "
        "`secret`) to what happens: `allow`, `redact` (placeholders, put back in the answer), `stay` (trusted zones "
        "only), `refuse`. A kind goes before its class.",
    )
    default: Action = Field("stay", description="What happens to kinds that no policy names.")
    trusted_zones: list[Zone] = Field(
        ["on-premises"],
        description="Zones that may see everything.",
        min_length=1,
    )
    unreadable: Literal["stay", "allow"] = Field(
        "stay",
        description="What happens to what cannot be searched: parts of types that are not known to be text, members "
        "whose names speak of pictures, sound or files, data URLs, token ids, conversations that the backend keeps.",
    )
    timeout_seconds: float = Field(
        2.0,
        description="A search that computes for longer has failed; its request stays in trusted zones.",
        gt=0,
        le=60,
    )
    patterns: dict[str, str] = Field(
        default_factory=dict,
        description="Kinds of your own: name to regular expression (RE2), e.g. `employee: 'E-[0-9]{6}'`.",
    )
    presidio: PresidioSection | None = Field(None, description="Ask Microsoft Presidio, too; default: do not.")

    @field_validator("patterns")
    @classmethod
    def _patterns_compile(cls, value: dict[str, str]) -> dict[str, str]:
        for name, pattern in value.items():
            if name in CLASS_OF or name in CLASSES or not name.isidentifier() or not name.islower():
                raise ValueError(f"{name!r} cannot name a kind; use lower-case letters and '_', no name that exists")
            try:
                compiled = compile_pattern(pattern.encode("latin-1"))
            except (re2.error, UnicodeEncodeError) as error:
                raise ValueError(
                    f"{name}: {pattern[:60]!r} is no RE2 pattern of Latin-1 characters ({error})"
                ) from None
            if compiled.search(b"") is not None:
                raise ValueError(f"{name}: {pattern[:60]!r} matches an empty text, so everything; ask for a character")
        return value

    @model_validator(mode="after")
    def _policies_name_kinds(self) -> "Sensitivity":
        own = [kind_of(entity) for entity in self.presidio.entities] if self.presidio else []
        known = [*CLASS_OF, *CLASSES, *self.patterns, *own]
        for name, action in self.policies.items():
            if name not in known:
                raise ValueError(f"policies: {name!r} is no kind of data; {nearest(name, known)}")
            if name in NOT_REDACTABLE and action == "redact":
                raise ValueError(f"policies: no placeholder can stand for a whole {name}; use stay or refuse")
        return self

    def settings(self) -> SensitivitySettings:
        """What the workers are told."""
        asked = self.presidio
        presidio = None
        if asked is not None:
            presidio = PresidioSettings(asked.language, tuple(asked.entities), asked.min_score, asked.model)
        return SensitivitySettings(
            dict(self.policies),
            self.default,
            tuple(self.trusted_zones),
            self.unreadable,
            self.timeout_seconds,
            dict(self.patterns),
            presidio,
        )
