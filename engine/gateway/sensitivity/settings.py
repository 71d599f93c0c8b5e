"""What the gateway is told about sensitive data; plain data that travels to the workers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tokenmill.engine.gateway.sensitivity.kinds import CLASS_OF

#: What happens to a request that holds a kind of data, the mildest first: it goes anywhere; it goes anywhere with
#: placeholders in the data's place; it goes to trusted zones only; it goes nowhere.
Action = Literal["allow", "redact", "stay", "refuse"]
ACTIONS: tuple[Action, ...] = ("allow", "redact", "stay", "refuse")
Zone = Literal["on-premises", "edge", "cloud"]


@dataclass(frozen=True)
class PresidioSettings:
    """How Microsoft Presidio is asked.

    Attributes:
        language: Two letters.
        entities: Presidio's names of what to look for.
        min_score: What it is less sure of is left alone.
        model: A spaCy model that is installed; None: a blank one, which finds no names by itself.
    """

    language: str = "en"
    entities: tuple[str, ...] = ("PERSON", "LOCATION")
    min_score: float = 0.5
    model: str | None = None


@dataclass(frozen=True)
class SensitivitySettings:
    """The policy.

    Attributes:
        policies: Kind or class of data to what happens; a kind goes before its class.
        default: What happens to kinds that no policy names.
        trusted_zones: Zones that may see everything.
        unreadable: What happens to what cannot be searched: all that is not known to be text.
        timeout_s: A search that takes longer has failed.
        patterns: The operator's own kinds: name to pattern.
        presidio: Ask Presidio, too; None: do not.
    """

    policies: Mapping[str, Action] = field(default_factory=dict)
    default: Action = "stay"
    trusted_zones: tuple[Zone, ...] = ("on-premises",)
    unreadable: Literal["stay", "allow"] = "stay"
    timeout_s: float = 2.0
    patterns: Mapping[str, str] = field(default_factory=dict)
    presidio: PresidioSettings | None = None

    def action(self, kind: str) -> Action:
        """What happens to a request that holds this kind."""
        return self.policies.get(kind) or self.policies.get(CLASS_OF.get(kind, ""), self.default)
