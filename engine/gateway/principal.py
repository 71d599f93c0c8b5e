"""Whose request it is: what the governance stage found out about the key, for every stage below."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenmill.engine.gateway.wildcard import Wildcard


@dataclass(frozen=True)
class Principal:
    """The owner of a request.

    Attributes:
        key: The key's public id; `master` for the master key.
        organisation, team, app: Ids of the accounts above it; None where there is none.
        models: Model and tier names it may ask for, some with `*` for any text; None: all.
        metadata: What the key's maker attached.
        soft_limit_reached: An account of its chain has passed its soft limit: cheaper tiers are preferred.
    """

    key: str
    organisation: str | None = None
    team: str | None = None
    app: str | None = None
    models: tuple[str, ...] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    soft_limit_reached: bool = False

    @functools.cached_property
    def chain(self) -> tuple[str, ...]:
        """Ids of the accounts that its requests are charged to: its key's and all above it."""
        return tuple(one for one in (self.key, self.app, self.team, self.organisation) if one is not None)

    @functools.cached_property
    def _wildcards(self) -> tuple[Wildcard, ...]:
        return tuple(Wildcard(name) for name in self.models or () if "*" in name)

    def may_ask_for(self, model: str | None) -> bool:
        """Whether a model's or tier's name is on its list; where there is a list, a name must be given."""
        models = self.models
        if models is None or model in models:
            return True
        return model is not None and any(wildcard.matches(model) for wildcard in self._wildcards)
